"""The optimizers of other packages that `lowmem bench optimizer` sets beside ours."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

RANK = 128
Parameters = list["Tensor"]


@dataclass(frozen=True)
class Peer:
    """build(matrices of the blocks, all other weights, updates between refreshes): an optimizer.

    method: the one of ours that does the same. package: its name on PyPI; module: in Python.
    """

    method: str
    name: str
    package: str
    module: str
    build: Callable[[Parameters, Parameters, int], Any]

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.module) is not None


def _group(matrices: Parameters, gap: int, **other: Any) -> dict[str, Any]:
    own = {"params": matrices, "rank": RANK, "update_proj_gap": gap, "proj_type": "std"}
    return own | other


def _bitsandbytes(matrices: Parameters, others: Parameters, gap: int) -> Any:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit([*others, *matrices], lr=1e-3)


def _galore(matrices: Parameters, others: Parameters, gap: int) -> Any:
    from galore_torch import GaLoreAdamW

    groups = [{"params": others}, _group(matrices, gap, scale=0.25)]
    return GaLoreAdamW(groups, lr=1e-3, no_deprecation_warning=True)


def _fira(matrices: Parameters, others: Parameters, gap: int) -> Any:
    from fira import FiraAdamW

    groups = [{"params": others}, _group(matrices, gap, alpha=0.25)]
    return FiraAdamW(groups, lr=1e-3, no_deprecation_warning=True)


def _apollo(matrices: Parameters, others: Parameters, gap: int) -> Any:
    from apollo_torch import APOLLOAdamW

    own = _group(matrices, gap, scale=1.0, proj="random", scale_type="channel")
    return APOLLOAdamW([{"params": others}, own], lr=1e-3)


def _apollo_mini(matrices: Parameters, others: Parameters, gap: int) -> Any:
    from apollo_torch import APOLLOAdamW

    own = _group(matrices, gap, scale=128.0, proj="random", scale_type="tensor", rank=1)
    return APOLLOAdamW([{"params": others}, own], lr=1e-3)


PEERS = (
    Peer("adam8bit", "bitsandbytes AdamW8bit", "bitsandbytes", "bitsandbytes", _bitsandbytes),
    Peer("galore", "galore-torch GaLoreAdamW", "galore-torch", "galore_torch", _galore),
    Peer("apollo", "apollo-torch APOLLOAdamW", "apollo-torch", "apollo_torch", _apollo),
    Peer("apollo_mini", "apollo-torch, Mini", "apollo-torch", "apollo_torch", _apollo_mini),
    Peer("fira", "fira FiraAdamW", "fira", "fira", _fira),
)


def is_matrix(role: str) -> bool:
    """Is a parameter of that role a matrix of a block, which projections are for?"""
    return role.startswith(("attention", "mlp"))
