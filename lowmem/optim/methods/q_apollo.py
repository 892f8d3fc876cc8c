"""Q-APOLLO: APOLLO for 8-bit weights."""

from typing import Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from lowmem.config.schema import StateFormat
from lowmem.optim.bases import Solver
from lowmem.optim.channels import Per
from lowmem.optim.formats import format_named
from lowmem.optim.method import ByRole, Dense
from lowmem.optim.methods.apollo import KeepOrReset, Projection, apollo
from lowmem.optim.methods.arguments import Betas, Eps, Gamma
from lowmem.optim.methods.spec import MethodSpec
from lowmem.optim.rules import Adam


def q_apollo(
    *,
    rank: PositiveInt = 128,
    gap: PositiveInt = 200,
    alpha: PositiveFloat | None = None,
    scale: PositiveFloat | None = None,
    per: Per = "channel",
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
    """Q-APOLLO: APOLLO for 8-bit weights, its norm limiter after the bias correction.

        R = P'G;  N = Adam(R), bias corrected inside;  phi_j = |N_j| / (|R_j| + 1e-8)
        X = G phi, its norm growing by at most the factor gamma per update
        W <- Q(W - lr * alpha * X),  Q rounding stochastically to codes of 8 bits

    Apart from the place of the bias correction it is apollo; see there for the options. It works
    with weights of any format; those in codes are rewritten by `weights.py`, in float32. states:
    float32 only, because a ratio of norms is all that is asked of these moments, and they are few:
    codes would save little and disturb the rate of whole channels. rest_states: of embedding, head
    and norms, which follow Adam and at rank 1 hold nearly all state; "8bit" is released for 7B.

    Source: Zhu et al. 2024, arXiv:2412.05270, Table 8, and released code. State per matrix: two
    moments (r x b) and one number; P is drawn anew in every update.
    """
    matrix = apollo(
        rank=rank,
        gap=gap,
        alpha=alpha,
        scale=scale,
        per=per,
        projection=projection,
        solver=solver,
        gamma=gamma,
        scale_front=scale_front,
        staggered=staggered,
        on_refresh=on_refresh,
        betas=betas,
        eps=eps,
        bias="inside",
        states=states,
    ).matrix
    rest = Adam(betas, eps, "inside", format_named(rest_states, min_8bit, floor_codes))
    return ByRole(matrix, Dense(rest, decay_first=False))


SPEC = MethodSpec(
    q_apollo,
    {
        "60m": {"lr": 0.01, "rank": 128, "gap": 200, "scale": 1.0},
        "130m": {"lr": 0.01, "rank": 192, "gap": 200, "scale": 1.0},
        "350m": {"lr": 0.01, "rank": 256, "gap": 200, "scale": 1.0},
    },
    "arXiv:2412.05270, Table 8 and released script for 350M (groups of 128); others as apollo",
    why_states="only fp32: moments are few, decide the rate of whole channels, and published runs "
    "keep them so; rest_states is for embedding, head and norms",
)
