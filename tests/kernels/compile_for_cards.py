"""Compile every Triton kernel for cards that are not there, as the examples launch them, those that
multiply for other formats too, and those of a block for float32 and for the widest rows.

    python tests/kernels/compile_for_cards.py 80 90        # compute 8.0 and 9.0

Prints a line of JSON for every kernel: its registers and shared memory, what it spills, and the
bytes of its code.
Triton must not be interpreted.
"""

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from lowmem.kernels import rms_norm, rope, scaled_matmul, swiglu
from lowmem.kernels.descent import Descent
from lowmem.kernels.dispatch import Kernel, forced
from lowmem.kernels.examples import EXAMPLES
from lowmem.kernels.grouped_weight import GroupedWeight
from lowmem.kernels.scaled_write import Scaled
from lowmem.kernels.unproject_write import Product

ELEMENTS = 4099
# Weight, factors, lines that scale a rest: GaLore's, Q-GaLore's and Fira's other writes.
PRODUCTS: list[tuple[str, torch.dtype, str]] = [
    ("bf16", torch.bfloat16, ""),
    ("bf16", torch.float32, "rows"),
    ("fp32", torch.float32, "rows"),
    ("int8", torch.bfloat16, "columns"),
    ("int8", torch.float32, "rows"),
]
# Of products, with rows of an odd width, and of whole groups.
SIZES = {
    "int8_linear": (5041, 2**14),
    "int8_input_gradient": (5041, 2**14),
    "scaled_product": (20, 5041, 2**18),
    "symmetric_product": (5000, 2**15),
}
TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Driver:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


def usage(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and the bytes it spills to local memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOL), "--dump-resource-usage", file.name]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {
        word: int(re.findall(rf"{mark}:(\d+)", shown)[-1])
        for word, mark in (("registers", "REG"), ("stack", "STACK"), ("local", "LOCAL"))
    }


def compiled(capability: int) -> list[dict[str, Any]]:
    """A row for every kernel that the examples launch."""
    rows: list[dict[str, Any]] = []
    running: list[str] = []

    def launch(kernel: JITFunction, grid: Any) -> Any:
        def compile_only(*arguments: Any, **options: Any) -> None:
            made = kernel.warmup(*arguments, grid=grid, **options)
            cubin = made.asm["cubin"]
            facts = {"operator": running[-1], "capability": capability, "bytes": len(cubin)}
            facts |= {"warps": made.metadata.num_warps, "shared": made.metadata.shared}
            rows.append(facts | usage(cubin))

        return compile_only

    def call(kernel: Kernel, *arguments: Any) -> None:
        running.append(kernel.name)
        kernel._launcher()(*arguments)

    triton.runtime.driver.set_active(Driver(capability))
    with (
        mock.patch.object(JITFunction, "__getitem__", launch),
        mock.patch.object(Kernel, "__call__", call),
    ):
        for example in EXAMPLES:
            for elements in SIZES.get(example.kernel.name, (ELEMENTS,)):
                with forced("reference"):
                    arguments = example.make(elements, torch.device("cpu"))
                with forced("triton"):
                    example.run(*arguments)
        for form, factors, lines in PRODUCTS:
            write_product(form, factors, lines)
        if capability >= 89:
            multiply_in_fp8()
        for width in (96, 768, 4096, rms_norm.WIDEST):
            for dtype in (torch.float32, torch.bfloat16):
                with forced("triton"):
                    run_block_kernels(torch.zeros(40, width, dtype=dtype))
    assert {row["operator"] for row in rows} >= {each.kernel.name for each in EXAMPLES}
    return rows


def write_product(form: str, factors: torch.dtype, lines: str) -> None:
    """A step of that kind, whose second factor lies the other way than in the examples."""
    values = torch.ones(256, 256, dtype=torch.float32 if form == "fp32" else torch.bfloat16)
    scales = torch.ones((256, 1) if lines == "rows" else (1, 256))
    with forced("reference"):
        weight = GroupedWeight.of(values, 128) if form == "int8" else values
    factor = torch.ones(256, 64, dtype=factors)
    step = Product(factor, factor.T, Scaled(values, scales, 0.5) if lines else None)
    with forced("triton"):
        done = step.write(weight, Descent(0.1, decay=0.1, seed=1))
    assert done


def multiply_in_fp8() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.ones(200, 256, dtype=dtype), torch.ones(256, 256, dtype=dtype)
        with forced("triton"):
            scaled_matmul.linear(x, weight, "fp8", x)
            scaled_matmul.input_gradient(x[:5], weight, "fp8")


def run_block_kernels(x: torch.Tensor) -> None:
    """Those of norms, rotation and gated unit on (n, h); a head has h / 8 features, at most 256."""
    weight = torch.ones(x.shape[1], dtype=x.dtype)
    y, rstd = rms_norm.rms_norm(x, weight, 1e-6)
    rms_norm.rms_norm_again(x, weight, rstd)
    rms_norm.rms_norm_backward(y, x, weight, rstd)
    swiglu.swiglu_backward(swiglu.swiglu(x, y), x, y)
    heads = x.view(1, len(x), -1, min(256, x.shape[1] // 8))
    angles = torch.zeros(len(x), heads.shape[-1] // 2)
    rope.rotate_(heads, angles, angles)
    rope.rotate_(heads, angles, angles, back=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("capability", type=int, nargs="+")
    for capability in parser.parse_args().capability:
        for row in compiled(capability):
            print(json.dumps(row))


if __name__ == "__main__":
    main()
