"""Every kernel beside its reference: `lowmem doctor --kernels` and `lowmem bench kernels`."""

import importlib.util
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from lowmem.cli.console import Console
from lowmem.cli.options import Given
from lowmem.errors import HardwareError
from lowmem.units import format_bytes

if TYPE_CHECKING:
    import torch

    from lowmem.kernels.example import Example

_ELEMENTS = 2**22 + 77  # the last block is short
_INTERPRETED = 5003  # elements; seconds for more
_BENCH_ELEMENTS = {"cpu": 2**23, "cuda": 2**27}  # arguments larger than caches


@dataclass(frozen=True)
class Row:
    """One kernel in one place. state: "ok", "note" (the reference runs) or "broken".

    text: what is wrong, or why the reference runs. seconds: None where it is interpreted, which
    says nothing. bytes: that have to be read and written.
    """

    operator: str
    implementation: str
    state: str
    text: str
    elements: int
    bytes: int
    seconds: float | None = None
    reference_seconds: float | None = None


def doctor_kernels(given: Given, *, as_json: bool) -> None:
    """Run every kernel and its reference here. HardwareError (exit 8) where they disagree."""
    console = Console(quiet=given.quiet)
    rows = list(examined())
    if as_json:
        console.json({"schema_version": 1, "kernels": [asdict(row) for row in rows]})
    else:
        marks = {"ok": "ok", "note": "-", "broken": "!!"}
        shown = [
            [marks[r.state], r.operator, r.implementation, _times(r), r.text or "as the reference"]
            for r in rows
        ]
        console.table(["", "kernel", "runs in", ">time (reference)", ""], shown)
    broken = [row for row in rows if row.state == "broken"]
    if broken:
        raise HardwareError(
            f"wrong numbers: {', '.join(row.operator for row in broken)}",
            "\n".join(f"{row.operator} in {row.implementation}: {row.text}" for row in broken),
            "LOWMEM_KERNELS=reference runs plain PyTorch instead",
        )


def bench_kernels(given: Given, *, as_json: bool) -> None:
    """Times, and the share of a copy's bandwidth that each kernel reaches."""
    import torch

    from lowmem.cli.bench_liger import beside_liger, show_liger
    from lowmem.cli.bench_products import product_times, show_products
    from lowmem.kernels.examples import EXAMPLES
    from lowmem.kernels.measure import copy_bandwidth

    console, device = Console(quiet=given.quiet), _device()
    bandwidth = copy_bandwidth(device)
    elements = _BENCH_ELEMENTS[device.type]
    rows = [_compared(example, device, elements, check=False) for example in EXAMPLES]
    products, liger = list(product_times(device)), list(beside_liger(device))
    if as_json:
        facts = {"device": str(device), "threads": torch.get_num_threads(), "copy": bandwidth}
        tables = {
            "kernels": [asdict(row) for row in rows],
            "int8_products": [asdict(row) for row in products],
            "liger": [asdict(row) for row in liger],
        }
        console.json({"schema_version": 1, **facts, **tables})
        return
    console.say(f"{device}, {torch.get_num_threads()} threads, {elements:,} elements")
    console.say(f"a copy or an addition moves {format_bytes(bandwidth)}/s")
    columns = ["kernel", "runs in", ">time", ">reference", ">ratio", ">bytes", ">of a copy"]
    console.table(columns, [_bench_cells(row, bandwidth) for row in rows])
    show_products(console, products, device)
    show_liger(console, liger, device)


def _bench_cells(row: Row, bandwidth: float) -> list[str]:
    assert row.seconds is not None
    assert row.reference_seconds is not None
    return [
        row.operator,
        row.implementation,
        f"{1e3 * row.seconds:.2f} ms",
        f"{1e3 * row.reference_seconds:.2f} ms",
        f"{row.seconds / row.reference_seconds:.2f}",
        format_bytes(row.bytes),
        f"{row.bytes / row.seconds / bandwidth:.0%}",
    ]


def _times(row: Row) -> str:
    if row.seconds is None or row.reference_seconds is None:
        return ""
    return f"{1e3 * row.seconds:.2f} ms ({1e3 * row.reference_seconds:.2f} ms)"


def _device() -> "torch.device":
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def examined() -> Iterator[Row]:
    """Every kernel on the device at hand; without a card also its Triton, interpreted."""
    import torch

    interpreted = not torch.cuda.is_available()
    if interpreted:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    from lowmem.kernels.examples import EXAMPLES

    for example in EXAMPLES:
        yield _compared(example, _device(), _ELEMENTS)
        if interpreted:
            yield _interpreted(example)


def _compared(
    example: "Example", device: "torch.device", elements: int, *, check: bool = True
) -> Row:
    """The kernel that runs on the device, against its reference, with the times of both."""
    from lowmem.kernels.dispatch import forced
    from lowmem.kernels.example import difference
    from lowmem.kernels.measure import cache_bytes, median_seconds, rotating

    runs_in = example.kernel.implementation(device.type)
    wrong = ""
    if check and runs_in != "reference":
        found = example.run(*example.make(elements, device))
        with forced("reference"):
            wrong = difference(example, found, example.run(*example.make(elements, device)))
    work = rotating(lambda: example.make(elements, device), example.run, cache_bytes(device))
    seconds = median_seconds(work, device)
    with forced("reference"):
        reference = median_seconds(work, device)
    state, text = ("broken", wrong) if wrong else ("ok", "")
    if runs_in == "reference":
        state, text = "note", _why_reference(example, device)
    moved = round(elements * example.bytes)
    return Row(example.kernel.name, runs_in, state, text, elements, moved, seconds, reference)


def _interpreted(example: "Example") -> Row:
    import torch

    from lowmem.kernels.dispatch import forced
    from lowmem.kernels.example import difference

    cpu, name = torch.device("cpu"), example.kernel.name
    moved = round(_INTERPRETED * example.bytes)
    if importlib.util.find_spec("triton") is None:
        text = "triton is not installed, optional: pip install triton"
        return Row(name, "triton, interpreted", "note", text, _INTERPRETED, moved)
    with forced("triton"):
        found = example.run(*example.make(_INTERPRETED, cpu))
    with forced("reference"):
        wrong = difference(example, found, example.run(*example.make(_INTERPRETED, cpu)))
    state = "broken" if wrong else "ok"
    return Row(name, "triton, interpreted", state, wrong, _INTERPRETED, moved)


def _why_reference(example: "Example", device: "torch.device") -> str:
    from lowmem.kernels import native
    from lowmem.kernels.dispatch import choice

    if choice() == "reference":
        return "LOWMEM_KERNELS=reference"
    if device.type == "cuda":
        return "triton is not installed: pip install triton"
    if not example.kernel.native:
        return "plain PyTorch is what a CPU has of it"
    return "no C++ compiler" if native.compiler() is None else "the C++ compiler fails"
