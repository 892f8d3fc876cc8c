"""The embedding's gradient by slices against the whole, bit for bit."""

import pytest
import torch
from torch import Tensor

from lowmem.model.ends import embedding_rows


def whole(grad: Tensor, inputs: Tensor, rows: int, padding: int | None) -> Tensor:
    """One row after the other, in the order of the tokens."""
    made = torch.zeros(rows, grad.shape[1])
    for token, row in zip(inputs.tolist(), grad, strict=True):
        if token != padding:
            made[token] += row
    return made


@pytest.mark.parametrize("padding", [None, 0, 7, 22])
@pytest.mark.parametrize("step", [1, 7, 8, 23])
@pytest.mark.parametrize("tokens", ["drawn", "one"])
def test_slices_of_the_embedding_have_the_bits_of_the_whole(
    tokens: str, step: int, padding: int | None
) -> None:
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randint(0, 23, (400,), generator=generator)
    if tokens == "one":
        inputs.fill_(11)
    grad = torch.randn(400, 5, generator=generator)
    slices = [
        embedding_rows(grad, inputs, start, min(start + step, 23), padding)
        for start in range(0, 23, step)
    ]
    assert [len(rows) for rows in slices[:-1]] == [step] * (len(slices) - 1)
    assert torch.equal(torch.cat(slices), whole(grad, inputs, 23, padding))
