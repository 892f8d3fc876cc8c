"""APOLLO-Mini: rank 1 and one scaling factor per matrix."""

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from lowmem.config.schema import StateFormat
from lowmem.optim.bases import Solver
from lowmem.optim.channels import Per
from lowmem.optim.method import ByRole
from lowmem.optim.methods.apollo import KeepOrReset, Projection, alpha_of, apollo
from lowmem.optim.methods.arguments import Betas, Bias, Eps, Gamma
from lowmem.optim.methods.spec import MethodSpec


def apollo_mini(
    *,
    rank: PositiveInt = 1,
    gap: PositiveInt = 200,
    alpha: PositiveFloat | None = None,
    scale: PositiveFloat | None = None,
    per: Per = "tensor",
    projection: Projection = "random",
    solver: Solver = "iteration",
    gamma: Gamma = 1.01,
    scale_front: bool = False,
    staggered: bool = True,
    on_refresh: KeepOrReset = "keep",
    betas: Betas = (0.9, 0.999),
    eps: Eps | None = None,
    bias: Bias = "step",
    states: StateFormat = "fp32",
    min_8bit: NonNegativeInt = 4096,
    floor_codes: bool = True,
) -> ByRole:
    """APOLLO-Mini: SGD with one adaptive rate per matrix, from Adam on a single random line.

        R = p'G;  N = Adam(R);  phi = |N| / (|R| + 1e-8)
        W <- W - lr * alpha * G phi, its norm growing by at most the factor gamma per update

    It is apollo with rank = 1, per = "tensor" and, where neither alpha nor scale is given,
    scale = 128, that is alpha = 11.3; see there for the other options.

    Source: Zhu et al. 2024, arXiv:2412.05270, Algorithm 1. State per matrix: two moments (b) and
    one number; embedding, head and norms have the two moments of Adam.
    """
    return apollo(
        rank=rank,
        gap=gap,
        alpha=alpha_of(alpha, scale, 128.0),
        per=per,
        projection=projection,
        solver=solver,
        gamma=gamma,
        scale_front=scale_front,
        staggered=staggered,
        on_refresh=on_refresh,
        betas=betas,
        eps=eps,
        bias=bias,
        states=states,
        min_8bit=min_8bit,
        floor_codes=floor_codes,
    )


_RECIPE = {"lr": 0.01, "rank": 1, "gap": 200, "scale": 128.0}
SPEC = MethodSpec(
    apollo_mini,
    {
        "60m": _RECIPE,
        "130m": _RECIPE | {"scale": 192.0},  # a quarter of the hidden size
        **dict.fromkeys(("350m", "1b", "7b", "13b"), _RECIPE),
    },
    "arXiv:2412.05270, released scripts; the paper's better row up to 1B has lr 0.02",
)
