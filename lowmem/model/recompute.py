"""Which tensors a block keeps for its backward, and which it computes anew there.

    keep   everything: no extra work, most memory
    attn   what attention made; the two wide matrices of the MLP are computed again
    full   only the block's input: the whole block but its last product is computed again

The last block's backward comes right after its forward and needs the full set at that moment
anyway, so it always keeps: recomputing there would cost time and save nothing.
"""

from lowmem.config.schema import Level


def level_of(index: int, blocks: int, level: Level) -> Level:
    """The level of block `index` (0-based) of `blocks` in a model trained at `level`."""
    return "keep" if index == blocks - 1 else level


def keeps_attention(level: Level) -> bool:
    """Whether rstd1, q, k, v, the attention output, its statistics and x1 survive the forward."""
    return level != "full"


def keeps_mlp(level: Level) -> bool:
    """Whether rstd2, gate and up survive the forward."""
    return level == "keep"
