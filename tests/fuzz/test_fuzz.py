"""A short form of `run.py`, and the command line itself with hostile input."""

import json
import shutil
from pathlib import Path

import pytest

from lowmem.cli.errors import EXIT_CODES
from lowmem.cli.main import run
from lowmem.data.shards import Corpus, open_corpus, verify_corpus
from lowmem.data.sources import find_inputs
from lowmem.errors import ConfigError, DataError
from tests.fuzz import verdict
from tests.fuzz.run import fuzz_configurations, fuzz_files
from tests.fuzz.verdict import Tally


@pytest.mark.parametrize(
    ("configurations", "damaged"),
    [(100, 36), pytest.param(20_000, 6_000, marks=pytest.mark.slow)],
)
def test_bad_input_ends_in_an_error_that_helps(configurations: int, damaged: int) -> None:
    tallies = {"configurations": fuzz_configurations(configurations, seed=1)}
    tallies |= fuzz_files(damaged, seed=1)
    for name, tally in tallies.items():
        assert not tally.failures, f"{name}: " + "\n".join(tally.failures[:5])
        assert tally.refused, f"{name}: nothing was refused, so nothing was tested"
        assert tally.fine, f"{name}: nothing passed, so nothing was tested"


def test_the_verdict_tells_helpful_errors_from_tracebacks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(error: BaseException) -> None:
        raise error

    tally = Tally()
    tally.run("fine", lambda: None)
    tally.run("refused", lambda: fail(ConfigError("a = 0", "at least 1", "a = 1")))
    tally.run("traceback", lambda: fail(KeyError("a")))
    tally.run("no help", lambda: fail(ConfigError("a = 0", "at least 1")))
    tally.run("jargon", lambda: fail(ConfigError("a", "Input should be 1", "a = 1")))
    monkeypatch.setattr(verdict, "SECONDS", 0.01)
    tally.run("no time", lambda: sum(range(3_000_000)))
    assert (tally.fine, tally.refused, tally.cases) == (1, {2: 1}, 6)
    names = [failure.partition(":")[0] for failure in tally.failures]
    assert names == ["traceback", "no help", "jargon", "no time"]


def told(capsys: pytest.CaptureFixture[str], *command: str) -> tuple[int, str]:
    """(exit code, stderr) of a command."""
    code = run(command)
    return code, capsys.readouterr().err


HOSTILE = [
    ("config", "show", "--set", "model.hidden_size=3"),
    ("config", "show", "--set", "optimizer.options=3"),
    ("config", "show", "--set", f"optimizer.x={'[' * 200}{']' * 200}"),
    ("config", "show", "--set", "optimizer.x=0x" + "f" * 5000),
    ("config", "show", "--set", "optimizer.x=1979-05-27"),
    ("config", "show", "--set", "run.name=\udce4"),
    ("config", "show", "--batch", " " * 50_000 + "y"),
    ("config", "show", "--data", "x" * 10_000_000),
    ("plan", "--model", "x" * 300),
    ("plan", "--model", "llama-tiny", "--seq-len", "9" * 400),
    ("plan", "--gpu", "-4GB"),
    ("plan", "--gpu", "0GB"),
    ("plan", "--gpu", "12 parsecs"),
    ("plan", "--gpu", "9000GB"),
    ("plan", "--gpu", "1e300"),
    ("resume", "x" * 300),
    ("eval", "x" * 300),
    ("sample", "a\0b"),
    ("export", "x" * 300, "out"),
    ("data", "prepare", "sample", "--max-tokens", "0"),
    ("data", "info", "/dev/null"),
    ("methods", "x" * 100_000),
    ("methods", "\x1b[31m"),
]


@pytest.mark.parametrize("command", HOSTILE, ids=map(str, range(len(HOSTILE))))
def test_hostile_arguments_end_in_a_short_error(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    code, error = told(capsys, *command)
    assert code in EXIT_CODES
    assert code in (2, 3, 4, 5)
    assert error.startswith("error: ")
    assert "\n  fix: " in error
    assert len(error) < 4000
    assert all(letter.isprintable() or letter == "\n" for letter in error)


@pytest.mark.parametrize("source", ["~nobody-of-that-name/x", "x" * 300, "/dev/null"])
def test_sources_that_are_no_text_are_refused(source: str) -> None:
    with pytest.raises(DataError):
        find_inputs(source)


def test_check_names_every_wrong_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = {
        "method": '[optimizer]\nmethod = "galor"\n',
        "card": 'gpu = "rtx409"\n',
        "model": 'model = "llama-6m"\n',
        "key": "[train]\nupdats = 3\n",
        "good": 'gpu = "24GB"\n',
    }
    paths = {name: tmp_path / f"{name}.toml" for name in texts}
    for name, path in paths.items():
        path.write_text(texts[name])
    assert run(["config", "check", *map(str, paths.values()), str(tmp_path / "none")]) == 2
    out, err = capsys.readouterr()
    assert f"{paths['good']}: ok" in out
    assert "5 of 6 files are wrong" in err
    assert all(f"{path}: " in err for name, path in paths.items() if name != "good")
    for hint in ("`galore`", "rtx4090", "`llama-60m`", "`updates`"):
        assert f"did you mean {hint}" in err


@pytest.mark.parametrize(
    "text",
    [
        '"optimizer.rank" = 3\n[optimizer]\nrank = {mlp = 3}\n',
        'optimizer.rank.mlp = 3\n"optimizer.rank" = 3\n',
    ],
)
def test_keys_that_contradict_each_other_in_one_file_are_told(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    code, error = told(capsys, "config", "check", str(path))
    assert code == 2
    assert "`optimizer.rank` is given too" in error


@pytest.mark.parametrize("file", ["../../x", "/etc/passwd", "", "..", "a/b", "\0"])
def test_a_manifest_names_files_of_its_own_folder_only(corpus_copy: Path, file: str) -> None:
    path = corpus_copy / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["splits"]["train"]["shards"][0]["file"] = file
    path.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"splits\.train\.shards\.0\.file"):
        open_corpus(corpus_copy)


def test_ids_beyond_the_vocabulary_are_told_and_not_trained_on(corpus_copy: Path) -> None:
    shard = corpus_copy / "train-00000.bin"
    content = bytearray(shard.read_bytes())
    content[21] = 0xFF
    shard.write_bytes(content)
    stream = open_corpus(corpus_copy).train
    assert stream is not None
    assert len(stream.read(0, 5)) == 5
    with pytest.raises(DataError, match="holds id 65"):
        stream.read(0, 20)
    with pytest.raises(DataError, match=r"train-00000\.bin is damaged"):
        verify_corpus(corpus_copy)


def test_counts_that_are_not_those_of_the_tokens_are_told(corpus_copy: Path) -> None:
    path = corpus_copy / "train-counts.bin"
    content = bytearray(path.read_bytes())
    content[7] ^= 0x80
    path.write_bytes(content)
    stream = open_corpus(corpus_copy).train
    assert stream is not None
    with pytest.raises(DataError, match=r"train-counts\.bin is damaged"):
        stream.unigram_loss()


@pytest.fixture
def corpus_copy(tiny_corpus: Corpus, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_corpus.folder, tmp_path / "corpus"))
