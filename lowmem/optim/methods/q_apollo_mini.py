"""Q-APOLLO-Mini: rank 1 and one scaling factor per 8-bit matrix."""

from typing import Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from lowmem.config.schema import StateFormat
from lowmem.optim.bases import Solver
from lowmem.optim.channels import Per
from lowmem.optim.method import ByRole
from lowmem.optim.methods.apollo import KeepOrReset, Projection, alpha_of
from lowmem.optim.methods.arguments import Betas, Eps, Gamma
from lowmem.optim.methods.q_apollo import q_apollo
from lowmem.optim.methods.spec import MethodSpec


def q_apollo_mini(
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
    eps: Eps = 1e-8,
    states: Literal["fp32"] = "fp32",
    rest_states: StateFormat = "fp32",
    min_8bit: NonNegativeInt = 4096,
    floor_codes: bool = True,
) -> ByRole:
    """Q-APOLLO-Mini: APOLLO-Mini for 8-bit weights, its norm limiter after the bias correction.

        R = p'G;  N = Adam(R), bias corrected inside;  phi = |N| / (|R| + 1e-8)
        W <- Q(W - lr * alpha * G phi), the step's norm growing by at most gamma per update

    It is q_apollo with rank = 1, per = "tensor" and, where neither alpha nor scale is given,
    scale = 128, that is alpha = 11.3; see there for the other options.

    Source: Zhu et al. 2024, arXiv:2412.05270, Table 8, and released code. State per matrix: two
    moments (b) and one number; embedding, head and norms have the two moments of Adam.
    """
    return q_apollo(
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
        states=states,
        rest_states=rest_states,
        min_8bit=min_8bit,
        floor_codes=floor_codes,
    )


_RECIPE = {"lr": 0.01, "rank": 1, "gap": 200, "scale": 128.0}
SPEC = MethodSpec(
    q_apollo_mini,
    {
        "60m": _RECIPE,
        "130m": _RECIPE | {"scale": 192.0},  # as apollo_mini
        "350m": _RECIPE,
        "7b": _RECIPE | {"rest_states": "8bit"},
    },
    "arXiv:2412.05270, Table 8 and released script for 7B: groups of 128 weights",
    why_states="only fp32: moments are few, decide the rate of whole channels, and published runs "
    "keep them so; rest_states is for embedding, head and norms",
)
