"""Ids by word are those of the whole text, and where they may not be, the whole text is encoded."""

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from lowmem.data import words
from lowmem.data.tokenizer import load_tokenizer
from lowmem.data.words import WordEncoder, cuts_at_spaces
from tests.data.conftest import documents, ids_of

LONG = ["\u2581gradient", "\u2581moments", "\u2581while", "\u2581basis", "\u2581falls"]
ODD = [
    *("", " ", "\n", "  two  spaces ", "\n\nlines\n\n", "tab\tand\r\nreturn", "a \u0301b"),
    *(
        "\u0600 a",
        "a\u00a0b \u2003c",
        "\u4e2d \u6587\n\u4e2d",
        "e\u0301 \U0001f600 \u201cquoted\u201d",
    ),
    "\u200d \u200d",
]


def by_word() -> Tokenizer:
    """As T5's: white space first, then pieces of words, some of them longer than five letters."""
    letters = sorted(set("".join([*documents(50, 0), *ODD])) - set(" \n\t\r"))
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    pieces += [(piece, -1.0) for piece in LONG] + [(letter, -3.0) for letter in letters]
    model = Tokenizer(models.Unigram(pieces, unk_id=2))
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    model.add_special_tokens([AddedToken(name) for name in ("<pad>", "</s>", "<unk>")])
    return model


def expected(model: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    return [one.ids for one in model.encode_batch(texts, add_special_tokens=False)]


def test_ids_by_word_are_those_of_the_package(tmp_path: Path) -> None:
    model = by_word()
    model.save(str(tmp_path / "tokenizer.json"))
    assert cuts_at_spaces(model)
    tokenizer = load_tokenizer(str(tmp_path))
    rng = random.Random(0)
    mixed = ["".join(rng.choices([*ODD, "the", " ", "rank"], k=9)) for _ in range(300)]
    for texts in (documents(100, 1), ODD, mixed, mixed):  # the last is known by then
        assert ids_of(tokenizer, texts) == expected(model, texts)


@pytest.mark.parametrize("most", [1, 7, 40])
def test_the_first_ids_are_those_of_the_package(tmp_path: Path, most: int) -> None:
    """Of long pieces, of which fewer come from the beginning of a text than are wanted, too."""
    model = by_word()
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path))
    texts = [*documents(100, 2), "gradient moments " * 50, "gradient \u0301" * 50, *ODD]
    found = [ids.hex() for ids in tokenizer.encode(texts, most)]
    whole = [ids[:most] for ids in expected(model, texts)]
    assert found == [b"".join(i.to_bytes(2, "little") for i in ids).hex() for ids in whole]


def reaching(texts: Sequence[str]) -> list[bytes]:
    """A tokenizer whose normalizer sees a space and the mark beside it as one character."""
    joined = (text.replace(" \u0301", "X").replace("\u0600 ", "Y") for text in texts)
    return ["".join(text.split()).encode() for text in joined]


@pytest.mark.parametrize("most", [None, 3])
def test_text_that_reaches_over_a_space_is_encoded_whole(most: int | None) -> None:
    texts = [
        "plain text",
        "a \u0301b",
        "a\u0600 b",
        "more of the same text \u0301 here",
        "ok \u00e9",
    ]
    found = WordEncoder(reaching, width=1).encode(texts, most)
    assert [ids[:most] for ids in found] == [ids[:most] for ids in reaching(texts)]
    for text in ("x" * 15 + " \u0301", "x" * 14 + "\u0600 y"):  # where a beginning may be cut
        (ids,) = WordEncoder(reaching, width=1).encode([text], 3)
        assert reaching([text])[0].startswith(ids)


def test_words_are_encoded_once_and_forgotten_when_there_are_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(words, "_MOST_WORDS", 4)
    asked: list[str] = []

    def whole(texts: Sequence[str]) -> list[bytes]:
        asked.extend(texts)
        return [text.encode() for text in texts]

    encoder = WordEncoder(whole, width=1)
    assert encoder.encode(["a b a", "b\nc"]) == [b"aba", b"bc"]
    assert sorted(asked) == ["a", "b", "c"]
    encoder.encode(["a d"])
    assert sorted(asked) == ["a", "b", "c", "d"]
    encoder.encode(["a"])  # five were known
    assert sorted(asked) == ["a", "a", "b", "c", "d"]


def test_other_tokenizers_are_not_cut(tokenizer_folder: Path) -> None:
    assert not cuts_at_spaces(
        tokenizers.Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    )
    split, space = pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace
    for cuts in (
        None,
        space(),
        pre_tokenizers.Sequence([split]),
        pre_tokenizers.Sequence([split, space(prepend_scheme="first")]),
        pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), space()]),
    ):
        model = by_word()
        model.pre_tokenizer = cuts
        assert not cuts_at_spaces(model)
    for normalizer in (normalizers.NFKC(), normalizers.Replace("\n", "N")):
        model = by_word()
        model.normalizer = normalizer
        assert not cuts_at_spaces(model)
    model = by_word()
    model.add_tokens(["of a"])
    assert not cuts_at_spaces(model)
