"""AdamW, the full-rank baseline."""

from lowmem.config.schema import StateFormat
from lowmem.optim.formats import format_named
from lowmem.optim.method import Dense
from lowmem.optim.methods.arguments import Betas, Eps
from lowmem.optim.rules import Adam


def adamw(*, betas: Betas = (0.9, 0.999), eps: Eps = 1e-8, states: StateFormat = "fp32") -> Dense:
    """AdamW: Adam with decoupled weight decay.

        M <- b1 M + (1 - b1) G;  V <- b2 V + (1 - b2) G^2
        W <- (1 - lr wd) W - lr * M/(1 - b1^k) / (sqrt(V/(1 - b2^k)) + eps)

    Source: Loshchilov & Hutter, arXiv:1711.05101, Algorithm 2. State: two moments of the weight's
    shape.
    """
    return Dense(Adam(betas, eps, "inside", format_named(states)))
