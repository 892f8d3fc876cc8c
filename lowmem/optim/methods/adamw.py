"""AdamW, the full-rank baseline."""

from pydantic import PositiveFloat

from lowmem.config.schema import StateFormat
from lowmem.optim.formats import format_named
from lowmem.optim.method import ByRole, Dense
from lowmem.optim.methods.arguments import Betas, Eps
from lowmem.optim.methods.spec import MethodSpec
from lowmem.optim.rules import Adam


def adamw(
    *,
    betas: Betas = (0.9, 0.999),
    eps: Eps = 1e-8,
    matrix_lr_ratio: PositiveFloat = 1.0,
    states: StateFormat = "fp32",
) -> ByRole:
    """AdamW: Adam with decoupled weight decay.

        M <- b1 M + (1 - b1) G;  V <- b2 V + (1 - b2) G^2
        W <- (1 - lr wd) W - lr * M/(1 - b1^k) / (sqrt(V/(1 - b2^k)) + eps)

    `matrix_lr_ratio` makes the steps of attention and MLP smaller than those of embedding, head
    and norms, as the scale of low-rank methods does.

    Source: Loshchilov & Hutter, arXiv:1711.05101, Algorithm 2. State: two moments of the weight's
    shape.
    """
    adam = Adam(betas, eps, "inside", format_named(states))
    return ByRole(Dense(adam, multiplier=matrix_lr_ratio), Dense(adam))


SPEC = MethodSpec(
    adamw, {"1b": {"lr": 1e-3}, "7b": {"lr": 3e-4}}, "arXiv:2403.03507 (tuned grid); 7B as LLaMA"
)
