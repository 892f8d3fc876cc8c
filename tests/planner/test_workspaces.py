"""What operators take out of sight, by hand and inside a rehearsal."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lowmem.planner.live_bytes import LiveBytes
from lowmem.planner.workspaces import CUBLAS_WORKSPACE, scratch_of_operators
from lowmem.units import MIB

aten = torch.ops.aten


def scratch(operator: Any, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> int:
    tensors = [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]
    return scratch_of_operators()[operator](*tensors)


def test_cublas_has_eight_buffers_of_four_mebibytes_for_each_of_two_threads() -> None:
    assert CUBLAS_WORKSPACE == 2 * 8 * 4 * MIB


def test_svd_is_bounded_as_documented() -> None:
    """8 m n + 16 small^2 bytes in float32: 0.59 GiB for the largest matrix of 7B."""
    assert scratch(aten._linalg_svd.default, (11008, 4096)) == 8 * 11008 * 4096 + 16 * 4096**2


def test_eigenvalues_and_qr_by_hand() -> None:
    assert scratch(aten._linalg_eigh.default, (100, 100), dtype=torch.float64) == 3 * 8 * 100**2
    assert scratch(aten.linalg_qr.default, (1000, 40)) == 4 * (1000 * 40 + 64 * 1040)


@pytest.mark.parametrize(("key_heads", "expanded"), [(32, 0), (8, 2 * 2 * 32 * 2048 * 128)])
def test_flash_backward_at_7b(key_heads: int, expanded: int) -> None:
    """Row sums and float32 query gradients, five of them: 132 processors share 32 heads."""
    q, k = (1, 32, 2048, 128), (1, key_heads, 2048, 128)
    operator = aten._scaled_dot_product_flash_attention_backward.default
    rows = 4 * 32 * 2048
    found = scratch(operator, q, q, k, dtype=torch.bfloat16)
    assert found == rows * 128 * 5 + rows + expanded


def test_efficient_backward_by_hand() -> None:
    q = (2, 4, 128, 16)
    operator = aten._scaled_dot_product_efficient_attention_backward.default
    assert scratch(operator, q, q) == 4 * (2 * 2 * 4 * 128 * 16 + 2 * 2 * 4 * 128)


@pytest.mark.parametrize(
    ("solve", "operator"),
    [
        (torch.linalg.svd, aten._linalg_svd.default),
        (torch.linalg.qr, aten.linalg_qr.default),
        (torch.linalg.eigh, aten._linalg_eigh.default),
    ],
)
def test_a_rehearsal_for_a_card_counts_it_at_the_moment_of_the_call(
    solve: Callable[[torch.Tensor], Any], operator: Any
) -> None:
    matrix = torch.empty(512, 512, device="meta")
    peaks = []
    for on_card in (False, True):
        tracker = LiveBytes("meta", scratch=on_card)
        tracker.track([matrix], "weights")
        with tracker:
            solve(matrix)
        peaks.append(tracker.peak)
    assert peaks[1] - peaks[0] == scratch(operator, (512, 512))
