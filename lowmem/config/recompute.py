"""Which tensors a block keeps for its backward, and which it computes anew there.

    keep   everything: no extra work, most memory
    attn   what attention made; the two wide matrices of the MLP are computed again
    full   only the block's input: the whole block but its last product is computed again

One level for all blocks, or levels from the last block downwards, each but the lowest with the
number of blocks that have it: "keep:10,attn:4,full". The backward of a high block comes first, so
what it keeps is gone when gradients of lower blocks have piled up.

The last block's backward comes right after its forward and needs the full set at that moment
anyway, so it always keeps: recomputing there would cost time and save nothing.
"""

from functools import cache
from typing import Literal, get_args

Level = Literal["keep", "attn", "full"]
LEVELS: tuple[Level, ...] = get_args(Level)
_FORM = 'a level (keep, attn, full), or e.g. "keep:10,attn:4,full" from the last block downwards'


@cache
def levels_of(recompute: str, blocks: int) -> tuple[Level, ...]:
    """The level of every block, the first block first. ValueError: no such form, or too many."""
    *counted, rest = recompute.split(",")
    found: list[Level] = []
    for part in counted:
        word, colon, count = part.partition(":")
        if not colon or not count.isascii() or not count.isdigit() or len(count) > 6:
            raise ValueError(f"{recompute!r} is not {_FORM}")
        found += [_level(word, recompute)] * int(count)
    if len(found) > blocks:
        raise ValueError(f"{recompute!r} names {len(found)} blocks, the model has {blocks}")
    found += [_level(rest, recompute)] * (blocks - len(found))
    found[:1] = ["keep"] if found else []
    return tuple(reversed(found))


def in_words(keep: int, attn: int, blocks: int) -> str:
    """The shortest form for that many blocks at `keep`, then at `attn`, and the others at `full`.

    keep: at least 1, for the last block.
    """
    if keep >= blocks:
        return "keep"
    if keep + attn >= blocks:
        return f"keep:{keep},attn" if keep > 1 else "attn"
    if keep <= 1 and not attn:
        return "full"
    return f"keep:{keep}," + (f"attn:{attn}," if attn else "") + "full"


def one_level_down(recompute: str, blocks: int) -> str:
    """Every block but the last keeps less: keep becomes attn, attn becomes full."""
    levels = levels_of(recompute, blocks)[:-1]
    return in_words(1, levels.count("keep"), blocks)


def checked(recompute: str) -> str:
    """`recompute` without blanks, if any model could have it. ValueError otherwise."""
    plain = recompute.replace(" ", "")
    levels_of(plain, 10**4)
    return plain


def _level(word: str, recompute: str) -> Level:
    for level in LEVELS:
        if word == level:
            return level
    raise ValueError(f"{recompute!r} is not {_FORM}")


def keeps_attention(level: Level) -> bool:
    """Whether rstd1, q, k, v, the attention output, its statistics and x1 survive the forward."""
    return level != "full"


def keeps_mlp(level: Level) -> bool:
    """Whether rstd2, gate and up survive the forward."""
    return level == "keep"
