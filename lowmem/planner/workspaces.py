"""What no rehearsal sees, each number with its source: the one place for such constants.

Nothing here has been confirmed on a card yet. A number marked [assumed] is a bound that the first
measurement replaces (`lowmem plan --verify`, calibration.py); [source] was read in public source or
documentation. Needs torch only inside `scratch_of_operators`, so a plan can be made without it.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lowmem.units import MIB

if TYPE_CHECKING:
    from torch import Tensor

CONTEXT = 500 * MIB
"""CUDA context and kernels once all are loaded: 250 to 600 MiB are reported, by card and driver,
over 1,000 MiB before CUDA 11.7 loaded kernels lazily [source: pytorch issues]; [assumed] here."""

OTHERS = 300 * MIB
"""A desktop with little open, on cards that drive a screen [assumed]; with a browser up to 1.5 GiB.
Cards of data centres have none."""

MARGIN = 0.03
"""Of the total [assumed]. It also covers what the driver keeps for itself: nvidia-smi counts that
as total, CUDA cannot have it (some 350 MiB of 24 GB)."""

HOST_MARGIN = 0.10
"""Of the host's available memory: other programs come and go [assumed]."""

CUBLAS_WORKSPACE = 2 * 33_554_432
# ":4096:8" (cli/main.py) asks for 8 buffers of 4,096 KiB = 32 MiB per handle and stream, whatever
# the architecture [source: cuBLAS documentation, CUBLAS_WORKSPACE_CONFIG]. Two threads multiply,
# ours and autograd's, each with a handle of its own [assumed]. cuBLASLt takes 1 MiB or shares it.
# PyTorch's defaults, which we override: 8,519,680 B per handle, 33,554,432 B on Hopper.

_MULTIPROCESSORS = 132  # of the largest cards that are common
_QR_PANEL = 64  # columns that blocked Householder QR works on at once [assumed]


def scratch_of_operators() -> dict[Any, Callable[..., int]]:
    """Operator -> bytes that it takes and gives back out of sight, from its arguments.

    A rehearsal adds them at the moment of the call, so that a workspace beside a low moment costs
    nothing. Triton kernels take none: lowmem has no kernel that is tuned at run time (the tuner
    would allocate 256 MiB to flush the cache). Cholesky and triangular solves work in place
    [source: cuSOLVER, potrf; cuBLAS, trsm]: what potrf takes is below 1 MiB at our sizes [assumed].
    """
    import torch

    aten = torch.ops.aten
    return {
        aten._linalg_eigh.default: _eigh,
        aten._linalg_svd.default: _svd,
        aten.linalg_qr.default: _qr,
        aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
        aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
    }


def _eigh(matrix: "Tensor", *rest: Any) -> int:
    # [assumed] bound for cuSOLVER's syevd: a copy of the matrix and twice its size to work in.
    return 3 * matrix.numel() * matrix.element_size()


def _svd(matrix: "Tensor", *rest: Any) -> int:
    # gesvdj, and gesvd where that fails [source: ATen, BatchLinearAlgebraLib.cpp]: a copy of the
    # matrix, a second one where it is wide, and a workspace bounded by 4 small^2 [assumed].
    small = min(matrix.shape[-2:])
    return (2 * matrix.numel() + 4 * small * small) * matrix.element_size()


def _qr(matrix: "Tensor", *rest: Any) -> int:
    # A copy in column order, and geqrf's panel [assumed].
    return (matrix.numel() + _QR_PANEL * sum(matrix.shape[-2:])) * matrix.element_size()


def _flash_backward(grad: "Tensor", query: "Tensor", key: "Tensor", *rest: Any) -> int:
    # flash-attention 2 [source: flash_api.cpp, mha_bwd]: row sums, and a float32 query gradient
    # padded to 128 tokens and 32 columns, in deterministic mode (which exact resume needs) one for
    # each share of the processors.
    batch, heads, length, width = query.shape
    tokens, columns = -(-length // 128) * 128, -(-width // 32) * 32
    shares = -(-_MULTIPROCESSORS // (batch * heads))
    # With fewer key heads, their gradients are first made for every query head.
    expanded = 2 * query.numel() * query.element_size() if key.shape[1] != heads else 0
    return 4 * batch * heads * tokens * (columns * shares + 1) + expanded


def _efficient_backward(grad: "Tensor", query: "Tensor", *rest: Any) -> int:
    # Float32 accumulators of the gradients of q and k, and row sums [assumed].
    batch, heads, length, _ = query.shape
    return 4 * (2 * query.numel() + 2 * batch * heads * length)
