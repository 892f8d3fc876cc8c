"""AdamW with 8-bit moments, the memory-saving baseline."""

from typing import Literal

from pydantic import NonNegativeInt

from lowmem.optim.formats import Blockwise8
from lowmem.optim.method import ByRole, Dense
from lowmem.optim.methods.arguments import Betas, Eps
from lowmem.optim.methods.spec import MethodSpec
from lowmem.optim.rules import Adam


def adam8bit(
    *,
    betas: Betas = (0.9, 0.999),
    eps: Eps = 1e-8,
    states: Literal["8bit"] = "8bit",
    min_8bit: NonNegativeInt = 4096,
    floor_codes: bool = True,
) -> ByRole:
    """8-bit Adam: AdamW whose moments are bytes with one scale per 256 elements.

    The step uses the fresh float32 moments; they are then requantised to the nearest of 256
    values. Tensors below `min_8bit` elements keep float32 moments. `floor_codes` never stores a
    positive second moment as zero; False gives the published codes.

    Source: Dettmers et al., arXiv:2110.02861. State: 2.03 bytes per element.
    """
    adam = Dense(Adam(betas, eps, "inside", Blockwise8(min_8bit, floor_codes)))
    return ByRole(adam, adam)


SPEC = MethodSpec(
    adam8bit,
    {"1b": {"lr": 1e-3}, "7b": {"lr": 3e-4}},
    "as adamw: arXiv:2110.02861 changes no setting",
    why_states="only 8bit: with fp32 or bf16 moments it is adamw",
)
