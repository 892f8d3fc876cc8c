"""Finding files, their split, and reading their lines, good and bad."""

import gzip
import json
import re
import sys
from pathlib import Path

import pytest

from lowmem.data import sources
from lowmem.data.sources import Bad, Reader, find_inputs, is_c4_copy
from lowmem.errors import DataError, HardwareError
from tests.data.conftest import documents, write_lines


def read(path: Path, key: str = "text") -> list[tuple[int, str | Bad]]:
    (source,) = find_inputs(str(path))
    return list(Reader(source, key).lines())


def why(path: Path, key: str = "text") -> list[tuple[int, str]]:
    return [(n, line.why) for n, line in read(path, key) if isinstance(line, Bad)]


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")


def test_a_folder_is_searched_in_sorted_order_without_hidden_files(tmp_path: Path) -> None:
    touch(tmp_path, "b.txt", "a/z.jsonl", "a/y.json.gz", "c.parquet", "d.txt.gz")
    touch(tmp_path, ".git/x.txt", ".hidden.txt", "README.md", "notes.txt.zst", "a/.x/y.txt")
    names = [one.name for one in find_inputs(str(tmp_path))]
    assert names == ["a/y.json.gz", "a/z.jsonl", "b.txt", "c.parquet", "d.txt.gz"]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("c4-train.00000-of-01024.json.gz", "train"),
        ("c4-validation.00000-of-00008.json.gz", "validation"),
        ("wiki_valid.txt", "validation"),
        ("val.jsonl", "validation"),
        ("Test.txt", "validation"),
        ("test/a.txt", "validation"),
        ("validity.txt", "train"),
        ("latest.txt", "train"),
        ("contest-2.txt", "train"),
    ],
)
def test_the_split_follows_from_a_word_of_the_name(tmp_path: Path, name: str, split: str) -> None:
    touch(tmp_path / "validation", name)  # the folder that was asked for does not count
    (found,) = find_inputs(str(tmp_path / "validation"))
    assert found.split == split


def test_a_copy_of_c4_is_only_its_english_part(tmp_path: Path) -> None:
    touch(tmp_path, "en/c4-train.00000-of-00002.json.gz", "en/c4-validation.00000-of-00001.json.gz")
    touch(tmp_path, "en.noblocklist/c4-train.00000-of-00002.json.gz", "README.txt")
    assert [one.split for one in find_inputs(str(tmp_path))] == ["train", "validation"]
    assert is_c4_copy(str(tmp_path))
    assert not is_c4_copy(str(tmp_path / "en"))


def test_no_source_and_no_text_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist") as caught:
        find_inputs(str(tmp_path / "nothing"))
    assert "--data" not in caught.value.why + caught.value.fix  # `data prepare` has no such flag
    touch(tmp_path, "README.md")
    with pytest.raises(DataError, match="no text in") as caught:
        find_inputs(str(tmp_path))
    assert ".jsonl.gz" in caught.value.why
    with pytest.raises(DataError, match=r"no text in .*README\.md"):
        find_inputs(str(tmp_path / "README.md"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz"])
def test_json_lines_give_their_texts(tmp_path: Path, name: str) -> None:
    texts = documents(20, 1)
    lines = read(write_lines(tmp_path / name, texts))
    assert lines == list(enumerate(texts, start=1))


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_plain_text_gives_its_lines(tmp_path: Path, name: str) -> None:
    text = "\ufeffone\n\ntwo \u4e2d\r\nthree"
    content = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    lines = read(tmp_path / name)
    assert "".join(str(line) for _, line in lines) == text[1:]
    assert [number for number, _ in lines] == [1, 2, 3, 4]


def test_parquet_gives_its_texts(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts: list[str | None] = [*documents(3000, 1), None, "  ", "a\0b"]
    table = pa.table({"body": texts, "number": list(range(len(texts)))})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=700)
    lines = read(tmp_path / "a.parquet", "body")
    assert lines[:3000] == list(enumerate(documents(3000, 1), start=1))
    assert lines[3000:] == [
        (3001, Bad("is null, not text")),
        (3003, Bad("holds a NUL byte, so this is no text")),
    ]
    with pytest.raises(DataError, match=r"no column 'text'") as caught:
        read(tmp_path / "a.parquet")
    assert "body, number" in caught.value.why
    with pytest.raises(DataError, match=r"column 'number' .* is int64, not text"):
        read(tmp_path / "a.parquet", "number")


def test_parquet_of_dictionaries_and_large_strings(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for kind in (pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        pq.write_table(pa.table({"text": pa.array(["x", "y"]).cast(kind)}), tmp_path / "a.parquet")
        assert read(tmp_path / "a.parquet") == [(1, "x"), (2, "y")]


def test_a_damaged_parquet_file_is_bad(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nonsense PAR1")
    ((number, reason),) = why(tmp_path / "a.parquet")
    assert number == 1
    assert "parquet file is damaged" in reason


def test_a_column_name_that_is_no_utf8_is_bad(tmp_path: Path) -> None:
    """Found by fuzzing: pyarrow decodes names itself."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "a.parquet")
    raw = (tmp_path / "a.parquet").read_bytes()
    for at in (found.start() for found in re.finditer(b"text", raw)):
        broken = raw[: at + 3] + b"\xf4" + raw[at + 4 :]
        (tmp_path / "b.parquet").write_bytes(broken)
        try:
            refused = why(tmp_path / "b.parquet")
        except DataError:  # the column is missing by now
            continue
        assert all("parquet file is damaged" in reason for _, reason in refused)


def test_parquet_without_pyarrow_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(HardwareError, match="pyarrow") as caught:
        read(tmp_path / "a.parquet")
    assert caught.value.fix == "pip install 'lowmem[hub]'"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "cut', "is not JSON"),
        (b'{\n"text": "pretty"}', "one object per line"),
        (b"[1, 2]", "is a JSON list"),
        (b'"only a string"', "is a JSON str"),
        (b'{"body": "x", "id": 3}', "has no key 'text'; its keys: body, id"),
        (b'{"text": 5}', "'text' is int, not text"),
        (b'{"text": null}', "'text' is NoneType, not text"),
        (b'{"text": "a\\u0000b"}', "holds a NUL"),
        (b'{"text": "a\0b"}', "holds a NUL"),
        (b'{"text": "\\ud800"}', "surrogate"),
        (b'{"text": "\xff"}', r"is not UTF-8 (byte 11"),
        (b"[" * 100_000, "is not JSON"),
    ],
)
def test_a_bad_json_line_is_told_with_its_number(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "also good"}\n')
    bad = why(path)
    assert bad[0][0] == 3
    assert reason in bad[0][1]
    assert read(path)[0] == (1, "good")
    assert read(path)[-1][1] == "also good"


def test_a_huge_line_is_bad_and_the_next_one_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MAX_LINE_BYTES", 100)
    path = write_lines(tmp_path / "a.jsonl", ["short", "x" * 200, "again"])
    assert why(path) == [(2, "is longer than 100 B; put one document on a line")]
    assert read(path)[-1] == (3, "again")


def test_a_cut_gzip_file_gives_what_was_whole(tmp_path: Path) -> None:
    texts = documents(2000, 1)
    path = write_lines(tmp_path / "a.jsonl.gz", texts)
    path.write_bytes(path.read_bytes()[:-2000])
    lines = read(path)
    good = len(lines) - 1
    assert 1000 < good < 2000
    assert lines[:good] == list(enumerate(texts[:good], start=1))
    last = lines[-1][1]
    assert isinstance(last, Bad)
    assert "cut off" in last.why


@pytest.mark.parametrize("content", [b"", b"this is no gzip file", b"\x1f\x8b"])
def test_no_gzip_at_all_is_bad(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json.gz").write_bytes(content)
    ((number, reason),) = why(tmp_path / "a.json.gz")
    assert number == 1
    assert "gzip" in reason


@pytest.mark.parametrize("where", ["deflate block", "checksum"])
def test_damage_inside_a_gzip_file_is_bad(tmp_path: Path, where: str) -> None:
    path = write_lines(tmp_path / "a.json.gz", documents(500, 1))
    content = bytearray(path.read_bytes())
    place = 10 if where == "deflate block" else len(content) - 8
    content[place : place + 4] = b"\xff\xff\xff\xff"
    path.write_bytes(content)
    ((_, reason),) = why(path)
    assert "damaged" in reason
    assert len(read(path)) == (1 if where == "deflate block" else 501)


def test_reading_tells_how_far_it_is(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl.gz", documents(3000, 1))
    (source,) = find_inputs(str(path))
    reader = Reader(source, "text")
    seen = [reader.bytes_done() for _ in reader.lines()]
    assert seen == sorted(seen)
    assert 0 < seen[0] < source.bytes
    assert reader.bytes_done() == source.bytes


def test_a_corpus_inside_the_source_is_no_text(tmp_path: Path) -> None:
    touch(tmp_path, "a.txt", "tokens/tokenizer.json", "half/.pieces/x", "half/tokenizer.json")
    (tmp_path / "tokens/manifest.json").write_text(json.dumps({"format": "lowmem tokens"}))
    assert [one.name for one in find_inputs(str(tmp_path))] == ["a.txt"]
