"""Products of a linear layer, made in every way there is: a part of `bench kernels`.

What it prints settles `kernels/few_tokens.py`, and whether `--matmul` pays.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import get_args

import torch
from torch import Tensor
from torch.nn.functional import linear

from lowmem.cli.console import Console
from lowmem.kernels import scaled_matmul
from lowmem.kernels.few_tokens import MOST_TOKENS
from lowmem.kernels.grouped_weight import GroupedWeight, Weight
from lowmem.kernels.int8_linear import (
    LINEAR,
    input_gradient_by_slices,
    input_gradient_from_codes,
    linear_by_slices,
    linear_from_codes,
)
from lowmem.kernels.measure import median_seconds
from lowmem.kernels.scaled_matmul import EightBit, multiplies_fp8

_SHAPE = {"cuda": (11008, 4096), "cpu": (688, 256)}  # outputs, inputs: of 7B's MLP, or a sixteenth
_TOKENS = {"cuda": (1, 16, 64, 128, 256, 384, 512, 768, 1024, 4096), "cpu": (16, 256)}
_WEIGHTS = 8  # that take turns, so that none is still in the cache


@dataclass(frozen=True)
class ProductTimes:
    """Seconds of one product. codes: by the kernel, None where there is none; slices: made floats
    a slice at a time; floats: of a weight in the dtype of the activations; int8, fp8: of that
    weight, quantised with the activations, None where the card has no such product."""

    product: str
    tokens: int
    codes: float | None
    slices: float
    floats: float
    int8: float | None = None
    fp8: float | None = None


def product_times(device: torch.device) -> Iterator[ProductTimes]:
    """Rows for both products, few tokens first; bfloat16 on a card, float32 on a CPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    outputs, inputs = _SHAPE[device.type]
    coded = [_codes(outputs, inputs, dtype, device) for _ in range(_WEIGHTS)]
    plain = [weight.values(dtype) for weight in coded]

    def seconds(multiply: Callable[..., Tensor], weights: Sequence[Weight], x: Tensor) -> float:
        def work() -> None:
            for weight in weights:
                multiply(x, weight)

        return median_seconds(work, device) / _WEIGHTS

    forward = partial(linear_from_codes, added=None), partial(linear_by_slices, added=None)
    back = (
        partial(input_gradient_from_codes, total=None),
        partial(input_gradient_by_slices, total=None),
    )
    for tokens in _TOKENS[device.type]:
        for product, side, (from_codes, by_slices), of_floats in (
            ("x W'", inputs, forward, linear),
            ("grad W", outputs, back, torch.mm),
        ):
            x = torch.randn(tokens, side, device=device).to(dtype)
            reads = device.type == "cuda" and LINEAR.runs_on(x)
            codes = seconds(from_codes, coded, x) if reads else None
            slices, floats = seconds(by_slices, coded, x), seconds(of_floats, plain, x)
            scaled = scaled_matmul.linear if side == inputs else scaled_matmul.input_gradient
            eights = [
                seconds(partial(scaled, kind=kind), plain, x) if _taken(kind, device) else None
                for kind in get_args(EightBit)
            ]
            yield ProductTimes(product, tokens, codes, slices, floats, *eights)


def show_products(console: Console, rows: list[ProductTimes], device: torch.device) -> None:
    """The table, and up to how many tokens codes were faster."""
    outputs, inputs = _SHAPE[device.type]
    console.say(f"products with a weight of {outputs} x {inputs}: in codes, in floats, by --matmul")
    columns = ["product", ">tokens", ">from codes", ">by slices", ">float weight", ">int8", ">fp8"]
    cells = []
    for row in rows:
        times = row.codes, row.slices, row.floats, row.int8, row.fp8
        cells.append([row.product, str(row.tokens), *map(_milliseconds, times)])
    console.table(columns, cells)
    if any(row.codes is not None for row in rows):
        console.say(
            f"codes are faster up to {faster_up_to(rows)} of these tokens; "
            f"kernels/few_tokens.py takes them up to {MOST_TOKENS}"
        )


def faster_up_to(rows: list[ProductTimes]) -> int:
    """The largest number of tokens up to which both products are faster from codes; 0: none."""
    slower = [row.tokens for row in rows if row.codes is None or row.codes > row.slices]
    return max((row.tokens for row in rows if row.tokens < min(slower, default=2**63)), default=0)


def _taken(kind: EightBit, device: torch.device) -> bool:
    return kind == "int8" or device.type == "cpu" or multiplies_fp8()


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.3f} ms"


def _codes(outputs: int, inputs: int, dtype: torch.dtype, device: torch.device) -> GroupedWeight:
    weight = GroupedWeight.empty((outputs, inputs), 128, dtype, device)
    weight.codes.random_(256)
    weight.scales.fill_(1e-3)
    weight.zeros.fill_(128)
    return weight
