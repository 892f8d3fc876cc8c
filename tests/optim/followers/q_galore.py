"""Follow `q_galore__*`: 4-bit basis, lazy gap, 8-bit moments and weights, in any combination."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lowmem.optim.formats import State, number, tensor
from lowmem.optim.method import Method, Projected
from lowmem.optim.methods import build_method
from lowmem.optim.optimizer import Optimizer
from lowmem.optim.projectors import QuantizedSVD
from tests.optim.followers.galore import state_differences
from tests.optim.followers.grouped import Grouped
from tests.optim.followers.oracle import (
    TRAJECTORY_TOLERANCE,
    Oracle,
    Outcome,
    codes_agree,
    judge,
    run,
    take_recorded,
)


def follow(oracle: Oracle) -> Outcome:
    about = oracle.about
    eight_bit = about["state_bits"] == 8
    options: dict[str, Any] = {
        "rank": about["rank"],
        "gap": about["gap"],
        "scale": about["scale"],
        "side": about["proj_type"],
        "solver": "eigh",
        "basis_bits": about["proj_bits"] if about["proj_quant"] else 32,
        "basis_group": about["proj_group"] or 256,
        "theta": about["cos_threshold"],
        "gamma": about["gamma"],
        "queue": about["queue"],
        # As published: signed cosine of the first vector, gaps that run away.
        "similarity": "first",
        "clear_queue": False,
        "gap_limit": 1e9,
        "staggered": False,
        "betas": tuple(about["betas"]),
        "eps": about["eps"],
        "states": "8bit" if eight_bit else "fp32",
        "min_8bit": about.get("min_8bit_size", 0),
        "floor_codes": False,
    }
    method = build_method("q_galore", options)
    assert isinstance(method.matrix, Projected)
    published = {"oracle": oracle, "span_zero": False}
    projectors = {
        name: Recorded(**vars(method.matrix.projector) | published | {"name": name})
        for name in about["projected"]
    }
    methods: dict[str, Method] = dict.fromkeys(about["regular"], method.other)
    for name, projector in projectors.items():
        methods[name] = replace(method.matrix, projector=projector)
    grouped = Grouped(oracle)
    gaps: list[str] = []

    def after(done: int, optimizer: Optimizer) -> None:
        grouped.after(done, optimizer)
        for name in about["projected"]:
            gap = number(optimizer.slots[name].state, "gap")
            if gap != about["gap_after_step"][name][done - 1]:
                gaps.append(f"gap.{done}.{name}")

    optimizer, error = run(oracle, methods, after=after, weights=grouped.weights)
    return judge(
        oracle,
        error,
        [
            *gaps,
            *grouped.differences,
            *(found for each in projectors.values() for found in each.differences()),
            *state_differences(oracle, optimizer),
        ],
    )


@dataclass(frozen=True)
class Recorded(QuantizedSVD):
    """Our basis, compared with the recorded one up to sign; then the recorded one is quantised.

    Codes are compared too: they are ours, of the recorded floats.
    """

    oracle: Oracle | None = None
    name: str = ""
    found: list[str] = field(default_factory=list)
    refreshed: list[int] = field(default_factory=list)
    cosines: list[float] = field(default_factory=list)

    def _of(self, what: str, update: int) -> Tensor:
        assert self.oracle is not None
        return self.oracle.tensors[f"{what}.{update}.{self.name}"]

    def store(self, state: State, new: Tensor, usable: Tensor) -> None:
        assert self.oracle is not None
        update = number(state, "step")
        self.refreshed.append(update)
        if update not in self.oracle.about["svd_steps"][self.name]:
            return
        wanted = self._of("projfloat" if self.bits != 32 else "proj", update)
        wanted = wanted.T if state["right"] else wanted
        take_recorded(new.clone(), wanted, f"the basis of {self.name} at update {update}")
        super().store(state, wanted.contiguous(), usable)
        self.cosines.append(tensor(state, "log.similarity").item())
        if self.bits == 32:
            return
        codes = self.codes(state)
        agree = codes_agree(codes, self._of("projq", update))
        for key, what in (("scales", "projs"), ("zeros", "projz")):
            recorded = self._of(what, update).view(-1)
            ours = tensor(state, f"basis.{key}")
            agree &= ours.shape == recorded.shape and torch.allclose(ours, recorded, rtol=1e-6)
        basis, recorded = self.basis(state), self._of("proj", update)
        recorded = recorded.T if state["right"] else recorded
        if not agree or not torch.allclose(basis, recorded, atol=1e-6, rtol=0):
            self.found.append(f"codes of the basis.{update}.{self.name}")

    def differences(self) -> list[str]:
        """What was not as recorded."""
        assert self.oracle is not None
        about = self.oracle.about
        if self.refreshed != about["svd_steps"][self.name]:
            self.found.append(f"refreshes.{self.name}")
        for ours, recorded in zip(self.cosines, about["cosines"][self.name], strict=False):
            if recorded is not None and abs(ours - recorded) > TRAJECTORY_TOLERANCE:
                self.found.append(f"cosine.{self.name}")
        return self.found
