"""GaLore: gradient low-rank projection."""

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from lowmem.config.schema import StateFormat
from lowmem.optim.bases import Solver
from lowmem.optim.formats import format_named
from lowmem.optim.lifts import ProjectBack
from lowmem.optim.method import ByRole, Dense, OnRefresh, Projected
from lowmem.optim.methods.arguments import Betas, Eps
from lowmem.optim.methods.spec import MethodSpec
from lowmem.optim.projectors import SVD, Side
from lowmem.optim.refresh import Every
from lowmem.optim.rules import Adam


def galore(
    *,
    rank: PositiveInt = 128,
    gap: PositiveInt = 200,
    scale: PositiveFloat = 0.25,
    side: Side = "std",
    solver: Solver = "iteration",
    staggered: bool = True,
    on_refresh: OnRefresh = "keep",
    betas: Betas = (0.9, 0.999),
    eps: Eps | None = None,
    states: StateFormat = "fp32",
    min_8bit: NonNegativeInt = 4096,
    floor_codes: bool = True,
) -> ByRole:
    """GaLore: Adam in the leading singular subspace of the gradient.

    Every `gap` updates  P <- leading `rank` singular vectors on the shorter side of G
        R = P'G;  N = Adam(R);  W <- W - lr * scale * P N

    Moments survive a refresh as they are, rotated into the new basis, or not at all (on_refresh);
    new vectors are aligned in sign with the old ones. As published: solver = "svd", staggered =
    false. Float states correct the bias of the whole step with eps 1e-6, 8-bit states inside with
    eps 1e-8, both as released. Embedding, head and norms follow the same Adam without projection.

    Source: Zhao et al. 2024, arXiv:2403.03507, Algorithm 2. State per matrix: P (s x r), two
    moments (r x b).
    """
    eight_bit = states == "8bit"
    adam = Adam(
        betas,
        eps if eps is not None else (1e-8 if eight_bit else 1e-6),
        "inside" if eight_bit else "step",
        format_named(states, min_8bit, floor_codes),
    )
    matrix = Projected(
        SVD(rank, side, solver), adam, ProjectBack(scale), Every(gap, staggered), on_refresh
    )
    return ByRole(matrix, Dense(adam, decay_first=eight_bit))


SPEC = MethodSpec(
    galore,
    {
        "60m": {"lr": 0.01, "rank": 128, "gap": 200, "scale": 0.25},
        "130m": {"lr": 0.01, "rank": 256, "gap": 200, "scale": 0.25},
        "350m": {"lr": 0.01, "rank": 256, "gap": 200, "scale": 0.25},
        "1b": {"lr": 0.01, "rank": 512, "gap": 200, "scale": 0.25},
        "7b": {"lr": 0.005, "rank": 1024, "gap": 500, "scale": 0.25},
    },
    "arXiv:2403.03507, section 5 and released scripts",
)
