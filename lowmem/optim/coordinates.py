"""Projectors that choose entries of the gradient at random: G -> G[:, i], G[i], G[i, j] or G[q].

Lines(0.25, "right")     a quarter of the columns ("left": of the rows)
RandK(0.25)              a quarter of all entries

Nothing is rounded, so the rest of the gradient is exactly zero where an entry was chosen.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowmem.kernels.rounding import hashed_bits
from lowmem.kernels.slices import pieces, slice_elements
from lowmem.naming import seed_of
from lowmem.optim.formats import State, number, tensor
from lowmem.optim.orthonormal import Sides, sides_of
from lowmem.optim.place import Place
from lowmem.optim.weights import Step

_STRATUM = 2**16


@dataclass(frozen=True)
class Lines:
    """Whole columns (right), whole rows (left), or what both have in common (full).

    density: the share of the lines of that side, of the shorter one where both are cut; rounded
    half to even, or downwards. State: columns and rows, int32, whichever are chosen; numbers:
    height, draw, and whole, 1 if nothing is left out.

    Source: FRUGAL, arXiv:2411.07837, and its released code (columns, rows: downwards; randperm:
    rounded).
    """

    density: float
    side: Sides = "std"
    rounded: bool = True

    def init(self, state: State, weight: Tensor, place: Place) -> None:
        sides = sides_of(self.side, weight.shape)
        state["height"], state["draw"], state["whole"] = weight.shape[0], 0, 1
        for right in sides:
            length = weight.shape[int(right)]
            share = self.density * (min(weight.shape) if len(sides) == 2 else length)
            count = round(share) if self.rounded else int(share)
            state[_line(right)] = torch.arange(count, dtype=torch.int32, device=weight.device)
            state["whole"] = int(state["whole"] == 1 and count == length)

    def refresh(self, grad: Tensor, state: State) -> None:
        state["draw"] = draw = number(state, "draw") + 1
        for right in (False, True):
            if _line(right) in state:
                seed = seed_of(number(state, "seed"), _line(right), draw)
                bits = hashed_bits(grad.shape[int(right)], seed, 0, grad.device)
                chosen = tensor(state, _line(right))
                chosen.copy_(bits.argsort(stable=True)[: chosen.numel()])

    def basis(self, state: State) -> Tensor:
        raise TypeError("chosen lines have no basis")

    def down(self, full: Tensor, state: State) -> Tensor:
        for right in (False, True):
            if _line(right) in state:
                full = full.index_select(int(right), tensor(state, _line(right)))
        return full

    def up(self, low: Tensor, state: State) -> Step:
        low = low.float()
        columns = tensor(state, "columns") if "columns" in state else None
        origin = _origin(state)

        def step(rows: Tensor, start: int, stop: int, alpha: float) -> None:
            if not low.numel():
                return
            taken = low[start:stop] if origin is None else _gathered(low, origin[start:stop])
            if columns is None:
                rows.add_(taken, alpha=alpha)
            else:
                rows.index_add_(1, columns, taken, alpha=alpha)

        return step


def _line(right: bool) -> str:
    return "columns" if right else "rows"


def _origin(state: State) -> Tensor | None:
    """For each row of the matrix, which row of the projection it is, -1 for none: (m,) int32."""
    if "rows" not in state:
        return None
    rows = tensor(state, "rows")
    origin = torch.full((number(state, "height"),), -1, dtype=torch.int32, device=rows.device)
    numbers = torch.arange(rows.numel(), dtype=torch.int32, device=rows.device)
    return origin.index_copy_(0, rows.long(), numbers)


def _gathered(low: Tensor, origin: Tensor) -> Tensor:
    """Those rows of `low`; zeros for -1, so that the shape does not depend on the choice."""
    taken = low.index_select(0, origin.clamp(min=0))
    return taken.masked_fill_((origin < 0).unsqueeze(1), 0.0)


@dataclass(frozen=True)
class RandK:
    """Single entries, int(density m n) of them, as a vector.

    Drawn without repetition in strata of 65536 consecutive entries, each with its share: which
    strata a group of rows needs is then known without asking the device, and only a smaller matrix
    than that is drawn as one. State: positions (k,), int32, in the order of the strata: drawing
    them anew in every update would mean sorting the whole matrix; numbers: width, entries, draw,
    and whole, 1 if nothing is left out.

    Source: FRUGAL, arXiv:2411.07837.
    """

    density: float

    def init(self, state: State, weight: Tensor, place: Place) -> None:
        height, width = weight.shape
        count = int(self.density * height * width)
        state["width"], state["entries"], state["draw"] = width, weight.numel(), 0
        state["whole"] = int(count == weight.numel())
        state["positions"] = torch.arange(count, dtype=torch.int32, device=weight.device)

    def refresh(self, grad: Tensor, state: State) -> None:
        state["draw"] = draw = number(state, "draw") + 1
        seed = seed_of(number(state, "seed"), "positions", draw)
        positions, entries = tensor(state, "positions"), number(state, "entries")
        whole_strata = max(1, slice_elements(grad) // _STRATUM) * _STRATUM
        for start, stop in pieces(entries, whole_strata, grad.is_meta):
            bits = hashed_bits(stop - start, seed, start, grad.device)
            whole = bits.numel() // _STRATUM * _STRATUM
            groups = [bits[:whole].view(-1, _STRATUM), bits[whole:].view(1, -1)]
            sorted_groups = [group.argsort(dim=1, stable=True) for group in groups if group.numel()]
            orders = [row for group in sorted_groups for row in group]
            for index, order in enumerate(orders):
                first = start + index * _STRATUM
                share = slice(_before(first, state), _before(min(first + _STRATUM, entries), state))
                positions[share] = order[: share.stop - share.start] + first

    def basis(self, state: State) -> Tensor:
        raise TypeError("chosen entries have no basis")

    def down(self, full: Tensor, state: State) -> Tensor:
        return full.reshape(-1).index_select(0, tensor(state, "positions"))

    def up(self, low: Tensor, state: State) -> Step:
        low, positions, width = low.float(), tensor(state, "positions"), number(state, "width")
        entries = number(state, "entries")

        def step(rows: Tensor, start: int, stop: int, alpha: float) -> None:
            first, last = start * width, stop * width
            strata = first // _STRATUM * _STRATUM, -(-last // _STRATUM) * _STRATUM
            share = slice(*(_before(min(entry, entries), state) for entry in strata))
            at = positions[share] - first
            elsewhere = (at < 0).logical_or_(at >= last - first)
            values = low[share].masked_fill(elsewhere, 0.0)
            # Entries of other rows of the same stratum add zero somewhere.
            rows.view(-1).index_add_(0, at.clamp_(0, last - first - 1), values, alpha=alpha)

        return step


def _before(entry: int, state: State) -> int:
    """How many positions lie in the strata before that entry."""
    return entry * tensor(state, "positions").numel() // number(state, "entries")
