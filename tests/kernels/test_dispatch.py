"""Every kernel gives what its reference gives, wherever it runs, and allocates nothing."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowmem.errors import ConfigError, HardwareError
from lowmem.kernels import dispatch
from lowmem.kernels.dispatch import forced, rehearsing
from lowmem.kernels.example import Example, difference
from lowmem.kernels.examples import EXAMPLES
from tests.kernels.calls import Calls

NAMES = [example.kernel.name for example in EXAMPLES]
NATIVE = [example for example in EXAMPLES if example.kernel.native]
ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def test_every_kernel_has_an_example() -> None:
    """Whatever module of kernels/ declares it; Triton's modules declare none."""
    files = (path.stem for path in (ROOT / "kernels").glob("*.py"))
    modules = [
        importlib.import_module(f"lowmem.kernels.{file}")
        for file in files
        if not file.endswith("_triton")
    ]
    declared = {
        value.name
        for module in modules
        for value in vars(module).values()
        if isinstance(value, dispatch.Kernel)
    }
    assert declared == set(NAMES)
    assert len(NAMES) == len(declared)


def check(example: Example, elements: int, device: torch.device) -> None:
    """The kernel that is chosen outside against the reference."""
    assert example.kernel.runs_on(torch.empty(0, device=device))
    found = example.run(*example.make(elements, device))
    with forced("reference"):
        wanted = example.run(*example.make(elements, device))
    assert difference(example, found, wanted) == ""


@pytest.mark.parametrize("elements", [1, 255, 256, 257, 1024, 5003])
@pytest.mark.parametrize("example", EXAMPLES, ids=NAMES)
def test_triton_gives_the_numbers_of_the_reference(
    example: Example, elements: int, triton_kernels: torch.device
) -> None:
    check(example, elements, triton_kernels)


@pytest.mark.parametrize("example", NATIVE, ids=[e.kernel.name for e in NATIVE])
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(elements=st.integers(1, 3000))
def test_cpp_gives_the_numbers_of_the_reference(
    example: Example, elements: int, native_kernels: torch.device
) -> None:
    check(example, elements, CPU)


@pytest.mark.parametrize("example", EXAMPLES, ids=NAMES)
def test_torch_accepts_the_declaration(example: Example, triton_kernels: torch.device) -> None:
    """Schema against what is written, the version without data, and tracing by the compiler."""
    with Calls() as calls:
        example.run(*example.make(600, triton_kernels))
    assert calls.kernels
    for operator, arguments in calls.kernels:
        torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("example", EXAMPLES, ids=NAMES)
def test_meta_shows_the_results_of_the_kernel(example: Example) -> None:
    real = example.run(*example.make(600, CPU))
    with forced("triton"), Calls() as calls:
        on_meta = example.run(*(each.to("meta") for each in example.make(600, CPU)))
    assert [(t.shape, t.dtype) for t in on_meta] == [(t.shape, t.dtype) for t in real]
    assert calls.kernels


@pytest.mark.parametrize("example", EXAMPLES, ids=NAMES)
def test_a_strided_tensor_is_refused(example: Example, triton_kernels: torch.device) -> None:
    with Calls() as calls:
        example.run(*example.make(600, triton_kernels))
    _, arguments = calls.kernels[-1]
    for place, value in enumerate(arguments):
        if isinstance(value, torch.Tensor) and value.numel() > 1:
            strided = torch.stack((value, value), dim=-1)[..., 0]
            with pytest.raises(AssertionError, match=example.kernel.name):
                example.kernel(*arguments[:place], strided, *arguments[place + 1 :])


MULTIPLIES = {
    "int8_input_gradient",
    "int8_linear",
    "scaled_product",
    "symmetric_product",
    "unproject_write",
    "unproject_write_codes",
}
CARDS = [
    "80",
    pytest.param("86", marks=pytest.mark.slow),
    pytest.param("90", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("capability", CARDS)
def test_every_kernel_compiles_for_a_card_and_spills_nothing(
    capability: str, tmp_path: Path
) -> None:
    pytest.importorskip("triton")
    program = Path(__file__).parent / "compile_for_cards.py"
    own = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(program), capability],
        env=own | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["operator"] for row in rows} == set(NAMES)
    for row in rows:
        assert row["stack"] == row["local"] == 0, row
        # Four programs of four warps on every card; one that multiplies keeps a tile of sums.
        assert 0 < row["registers"] * row["warps"] * 32 <= 2**16, row
        assert row["registers"] <= 128 or row["operator"] in MULTIPLIES, row
        most_shared = {80: 163, 86: 99, 90: 227}[row["capability"]]  # KiB that a program may have
        assert row["shared"] <= most_shared * 1024, row


def test_a_device_has_the_kernels_that_are_made_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    kernel, meta = EXAMPLES[0].kernel, torch.empty(4, device="meta")
    monkeypatch.setattr(dispatch, "triton_installed", lambda: True)
    monkeypatch.setattr(dispatch.native, "library", lambda: None)
    with rehearsing("cpu"):
        assert not kernel.runs_on(meta)
    assert not kernel.runs_on(torch.empty(4))
    assert kernel.runs_on(meta)  # of a plan for a card
    assert kernel.implementation("cuda") == "triton"
    monkeypatch.setattr(dispatch, "triton_installed", lambda: False)
    assert kernel.implementation("cuda") == "reference"
    monkeypatch.setattr(dispatch.native, "library", lambda: object())
    assert kernel.implementation("cpu") == "C++"
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    assert kernel.implementation("cpu") == "reference"


def test_a_choice_that_does_not_exist_names_those_that_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "tritom")
    with pytest.raises(ConfigError, match="tritom") as caught:
        EXAMPLES[0].kernel.runs_on(torch.empty(4))
    assert "reference" in caught.value.why


def test_triton_on_a_cpu_has_to_be_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with forced("triton"), pytest.raises(ConfigError, match="on the CPU"):
        EXAMPLES[0].run(*EXAMPLES[0].make(256, CPU))


def test_a_kernel_that_does_not_compile_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    kernel = EXAMPLES[0].kernel

    def fail(*_: object) -> None:
        raise triton.runtime.errors.OutOfResources(300_000, 101_376, "shared memory")

    monkeypatch.setattr(dispatch.Kernel, "_launcher", lambda _: fail)
    with pytest.raises(HardwareError, match=kernel.name) as caught:
        kernel._on_cuda()
    assert "LOWMEM_KERNELS=reference" in caught.value.fix
