"""Values and gradients of a block's operators and of the head are Liger's."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from lowmem.cli.bench_liger import PAIRS, Pair, Sizes
from lowmem.kernels.dispatch import forced
from lowmem.kernels.example import Tensors
from lowmem.kernels.slices import smaller_slices

pytest.importorskip("liger_kernel", reason="compares with Liger: pip install liger-kernel")
pytest.importorskip("triton", reason="Liger is written in Triton")

# Sequences, length, hidden, heads, key and value heads, MLP, vocabulary.
SIZES = [
    Sizes(1, 1, 2, 1, 1, 1, 2),
    Sizes(2, 5, 96, 4, 2, 257, 300),
    Sizes(1, 33, 64, 2, 1, 40, 99),
]


@contextmanager
def interpretable() -> Iterator[None]:
    """Inside, what Liger asks of the compiler is there: scalars that are tensors, and libdevice's
    rsqrt. Triton's interpreter leaves Python's floats, and calls a function without a body."""
    import liger_kernel.ops.rms_norm
    import triton.language as tl
    from triton.runtime import interpreter

    plain = interpreter._implicit_cvt

    def converted(argument: Any) -> Any:
        if not isinstance(argument, float):
            return plain(argument)
        handle = interpreter.TensorHandle(np.array([argument], np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)

    with (
        mock.patch.object(interpreter, "_implicit_cvt", converted),
        mock.patch.object(liger_kernel.ops.rms_norm, "rsqrt", lambda x: tl.rsqrt(x)),
    ):
        yield


def by_liger(pair: Pair, sizes: Sizes, device: torch.device) -> Tensors:
    arguments = pair.make(sizes, torch.float32, device)
    if device.type == "cuda":
        return pair.liger(*arguments)
    with interpretable():
        return pair.liger(*arguments)


@pytest.mark.parametrize("choice", ["triton", "reference"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("pair", PAIRS, ids=[pair.operator for pair in PAIRS])
def test_values_and_gradients_are_ligers(
    pair: Pair, sizes: Sizes, choice: str, triton_kernels: torch.device
) -> None:
    """In float32: the interpreter rounds to bfloat16 unlike a card, and cannot multiply it."""
    wanted = by_liger(pair, sizes, triton_kernels)
    with forced(choice), smaller_slices(128):  # 32 rows of the head at a time
        found = pair.ours(*pair.make(sizes, torch.float32, triton_kernels))
    for ours, theirs in zip(found, wanted, strict=True):
        # Sums of up to 300 numbers in another order, and products in other pairs.
        largest = theirs.abs().amax().item()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6 * largest)
