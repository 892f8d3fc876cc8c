"""Q-GaLore: GaLore with a 4-bit basis, 8-bit moments, 8-bit weights, and fewer refreshes."""

from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from lowmem.config.schema import StateFormat
from lowmem.optim.bases import Solver
from lowmem.optim.formats import format_named
from lowmem.optim.lifts import ProjectBack
from lowmem.optim.method import ByRole, Dense, OnRefresh, Projected
from lowmem.optim.methods.arguments import Betas, Eps
from lowmem.optim.methods.spec import MethodSpec
from lowmem.optim.projectors import BasisBits, QuantizedSVD, Side, Similarity
from lowmem.optim.refresh import Lazy
from lowmem.optim.rules import Adam

Factor = Annotated[float, Field(ge=1.0)]


def q_galore(
    *,
    rank: PositiveInt = 128,
    gap: PositiveInt = 200,
    scale: PositiveFloat = 0.25,
    side: Side = "std",
    solver: Solver = "iteration",
    basis_bits: BasisBits = 4,
    basis_group: PositiveInt = 256,
    similarity: Similarity = "captured",
    theta: float = 0.4,
    gamma: Factor = 2.0,
    queue: PositiveInt = 5,
    clear_queue: bool = True,
    gap_limit: Factor = 8.0,
    staggered: bool = True,
    on_refresh: OnRefresh = "keep",
    betas: Betas = (0.9, 0.95),
    eps: Eps = 1e-8,
    states: StateFormat = "8bit",
    min_8bit: NonNegativeInt = 4096,
    floor_codes: bool = True,
) -> ByRole:
    """Q-GaLore: GaLore with a 4-bit basis, 8-bit moments and a gap that grows.

    Every g updates, at first `gap`:  P <- 4-bit codes of the leading singular vectors of G, and
        mean of the last `queue` similarities of new and old P >= theta:  g <- int(g * gamma)
        R = P'G;  N = Adam(R);  W <- W - lr * scale * P N

    The method works with weights of any format; for 8-bit weights with stochastic rounding,
    `weights.py` reads, moves and rewrites the codes in float32. Our lazy gap asks how much of what
    the new P captures of G the old one still captured, starts a new queue when g has grown, and
    stops at gap_limit * gap. As published:
    similarity = "first", clear_queue = false, a huge gap_limit, solver = "svd", staggered = false;
    the released cosine is also signed, so that an arbitrary sign may keep g small, ours never is.
    Embedding, head and norms follow the same 8-bit Adam, decayed before the step, matrices after.

    Source: Zhang et al. 2024, arXiv:2407.08296, section 3. State per matrix: P (r s / 2 bytes and 8
    per group), two moments (r x b).
    """
    adam = Adam(betas, eps, "inside", format_named(states, min_8bit, floor_codes))
    matrix = Projected(
        QuantizedSVD(rank, side, solver, basis_bits, basis_group, similarity),
        adam,
        ProjectBack(scale),
        Lazy(gap, theta, gamma, queue, gap_limit, clear_queue, staggered),
        on_refresh,
    )
    return ByRole(matrix, Dense(adam))


SPEC = MethodSpec(
    q_galore,
    {
        "60m": {"lr": 0.015, "rank": 128, "gap": 200, "scale": 0.25},
        "130m": {"lr": 0.015, "rank": 256, "gap": 200, "scale": 0.25},
        "350m": {"lr": 0.01, "rank": 256, "gap": 200, "scale": 0.25},
        "1b": {"lr": 0.01, "rank": 512, "gap": 200, "scale": 0.25},
        "7b": {"lr": 0.004, "rank": 1024, "gap": 500, "scale": 0.25},
    },
    "arXiv:2407.08296, section 4 and released scripts",
)
