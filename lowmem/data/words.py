"""Ids of text word by word: each word is encoded once, and looked up from then on.

    "the rank of\\nthe basis"    ids of "the", "rank", "of", "the" (known), "basis", joined

These are the ids of the whole text where the tokenizer cuts at white space before all else, as T5's
does, and no character reaches over a space. Other tokenizers, and the few texts with such
characters, are left to the package `tokenizers`.
"""

import json
import string
import unicodedata
from collections.abc import Callable, Sequence

import tokenizers

_MOST_WORDS = 2**18  # about 50 MB
_ALONE = {"Lu", "Ll", "Lt", "Nd", "Pc", "Pd", "Pe", "Pf", "Pi", "Po", "Ps", "Sc", "Sm", "So"}
"""Categories of which no character joins a space beside it to one grapheme, and graphemes are what
normalizers look at (UAX #29): neither marks that belong to what stands before them, nor signs that
belong to what follows."""


_CHARACTERS = 5
"""Of a token, more than there are on average; a text that has more is encoded twice."""


class WordEncoder:
    """Encodes texts by their words, and remembers those."""

    def __init__(self, whole: Callable[[Sequence[str]], list[bytes]], width: int) -> None:
        """whole: ids of texts, by a tokenizer for which `cuts_at_spaces`. width: bytes of an id."""
        self._whole, self._width = whole, width
        self._known: dict[str, bytes | None] = {"": b""}  # None: it may reach over a space

    def encode(self, texts: Sequence[str], most: int | None = None) -> list[bytes]:
        """The ids of each text, or at least the first `most` of them."""
        if most is None:
            return self._encode(texts)
        begun = [_beginning(text, _CHARACTERS * most) for text in texts]
        found = self._encode(begun)
        again = [
            number
            for number, ids in enumerate(found)
            if len(ids) < most * self._width and len(begun[number]) < len(texts[number])
        ]
        for number, ids in zip(again, self._encode([texts[n] for n in again]), strict=True):
            found[number] = ids
        return found

    def _encode(self, texts: Sequence[str]) -> list[bytes]:
        split = [text.replace("\n", " ").split(" ") for text in texts]
        if len(self._known) > _MOST_WORDS:
            self._known = {"": b""}
        words = list(set().union(*split) - self._known.keys())
        for word, ids in zip(words, self._whole(words), strict=True):
            self._known[word] = ids if _alone(word[0]) and _alone(word[-1]) else None
        joined = [self._joined(words) for words in split]
        others = [text for text, ids in zip(texts, joined, strict=True) if ids is None]
        whole = iter(self._whole(others))
        return [next(whole) if ids is None else ids for ids in joined]

    def _joined(self, words: list[str]) -> bytes | None:
        try:
            return b"".join(map(self._known.__getitem__, words))  # type: ignore[arg-type]
        except TypeError:  # there is a None
            return None


def cuts_at_spaces(encoder: tokenizers.Tokenizer) -> bool:
    """Whether a word has the same ids wherever it stands between spaces or newlines."""
    parts = json.loads(encoder.to_str())
    cuts = parts["pre_tokenizer"] or {}
    kinds = [(one["type"], one.get("prepend_scheme")) for one in cuts.get("pretokenizers", [])]
    return (
        kinds == [("WhitespaceSplit", None), ("Metaspace", "always")]
        and parts["model"]["type"] == "Unigram"
        and all(token["special"] for token in parts["added_tokens"])  # looked for in no text
        and _keeps_ascii(encoder)
    )


def _keeps_ascii(encoder: tokenizers.Tokenizer) -> bool:
    """Whether white space stays white space, and the rest of ASCII what it is."""
    if encoder.normalizer is None:
        return True
    if json.loads(encoder.to_str())["normalizer"]["type"] != "Precompiled":
        return False
    normal = encoder.normalizer.normalize_str
    rest = string.ascii_letters + string.digits + string.punctuation
    return bool(normal(rest) == rest and normal(" ").isspace() and normal("\n").isspace())


def _beginning(text: str, characters: int) -> str:
    """Whole words of at least so many characters together; all where one may reach over the end."""
    end = text.find(" ", characters)
    safe = end > 0 and _alone(text[end - 1]) and _alone(text[end + 1 : end + 2])
    return text[:end] if safe else text


def _alone(character: str) -> bool:
    return character.isascii() or unicodedata.category(character) in _ALONE
