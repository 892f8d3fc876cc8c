"""Where a weight stands in the model: all that a method may know of it besides its shape."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """One weight.

    seed: a number of its own, from its name. role: "attention.q", "embedding", ... index, count:
    its position among the matrices of the main method, in the model's order, and how many there
    are. head_dim: rows of one attention head. run_seed: the run's, the same for all weights.
    """

    seed: int = 0
    role: str = "mlp.up"
    index: int = 0
    count: int = 1
    head_dim: int = 64
    run_seed: int = 0
