"""Examples of `drawn_projection.py`."""

from torch import Tensor

from lowmem.kernels.drawn_projection import NORMS, PROJECT, channel_norms, project_on_line
from lowmem.kernels.example import Example, Tensors, matrix


def _projections(full: Tensor) -> Tensors:
    return (*project_on_line(full, 5, right=True), *project_on_line(full, 5, right=False))


EXAMPLES = [
    Example(
        PROJECT,
        lambda elements, device: (matrix(elements, 1, device),),
        _projections,
        bytes=2 * 4,
        tolerance=2e-6,  # sums in another order
    ),
    Example(
        NORMS,
        lambda elements, device: (matrix(elements, 1, device),),
        lambda full: tuple(channel_norms(full, right) for right in (True, False)),
        bytes=2 * 4,
        tolerance=2e-6,
    ),
]
