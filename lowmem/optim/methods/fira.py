"""Fira: full-rank training with low-rank moments."""

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from lowmem.config.schema import StateFormat
from lowmem.optim.bases import Solver
from lowmem.optim.channels import Form, ScaledResidual
from lowmem.optim.formats import format_named
from lowmem.optim.limiters import NormGrowth
from lowmem.optim.method import ByRole, Dense, OnRefresh, Projected
from lowmem.optim.methods.arguments import Betas, Bias, Eps, Gamma
from lowmem.optim.methods.spec import MethodSpec
from lowmem.optim.projectors import SVD, Side
from lowmem.optim.refresh import Every
from lowmem.optim.rules import Adam


def fira(
    *,
    rank: PositiveInt = 128,
    gap: PositiveInt = 200,
    alpha: PositiveFloat = 0.25,
    form: Form = "released",
    gamma: Gamma = 1.01,
    side: Side = "std",
    solver: Solver = "iteration",
    staggered: bool = True,
    on_refresh: OnRefresh = "keep",
    betas: Betas = (0.9, 0.999),
    eps: Eps = 1e-6,
    bias: Bias = "step",
    states: StateFormat = "fp32",
    min_8bit: NonNegativeInt = 4096,
    floor_codes: bool = True,
) -> ByRole:
    """Fira: GaLore, and the rest of the gradient scaled like its projection.

    Every `gap` updates  P <- leading `rank` singular vectors on the shorter side of G
        R = P'G;  N = Adam(R);  phi_j = |N_j| / (|R_j| + 1e-8) per column; rows if P is right
        Z = phi (G - alpha P R), its norm growing by at most the factor gamma per update
        W <- W - lr * (alpha P N + Z)

    That is the released form, with which all published numbers were made: alpha < 1 shrinks only
    the Adam part. form = "paper":  Z = phi (G - P R);  W <- W - lr * alpha * (P N + Z), where alpha
    is a learning rate. A zero or non-finite norm is not remembered by the limiter, as released it
    would stop Z for a thousand updates. Moments survive a refresh as in galore. As published:
    solver = "svd", staggered = false. Embedding, head and norms follow the same Adam.

    Source: Chen et al. 2024, arXiv:2410.01623, Algorithm 1. State per matrix: P (s x r), two
    moments (r x b), one number.
    """
    adam = Adam(betas, eps, bias, format_named(states, min_8bit, floor_codes))
    matrix = Projected(
        SVD(rank, side, solver),
        adam,
        ScaledResidual(alpha, form, NormGrowth(gamma)),
        Every(gap, staggered),
        on_refresh,
    )
    return ByRole(matrix, Dense(adam, decay_first=False))


SPEC = MethodSpec(
    fira,
    {
        "60m": {"lr": 0.01, "rank": 128, "gap": 200, "alpha": 0.25},
        "130m": {"lr": 0.01, "rank": 256, "gap": 200, "alpha": 0.25},
        "350m": {"lr": 0.01, "rank": 256, "gap": 200, "alpha": 0.25},
        "1b": {"lr": 0.01, "rank": 512, "gap": 200, "alpha": 0.0625},
        "7b": {"lr": 0.005, "rank": 64, "gap": 500, "alpha": 0.0625},
    },
    "arXiv:2410.01623, released scripts",
)
