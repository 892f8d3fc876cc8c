"""Rehearsed peaks beside measured ones, per method: the table of docs/measured.md.

    python tests/benchmarks/rehearsed_against_measured.py                   # minutes on 2 cores
    python tests/benchmarks/rehearsed_against_measured.py --models llama-9m --methods galore,fira

Two real updates of random text, from the building of the model on. On the CPU the bytes of tensors
by PyTorch's profiler (planner/profiled.py), which shares no code with the rehearsal's tracker; with
a CUDA device also `max_memory_allocated` and `max_memory_reserved` of the same on the card.
"""

import argparse
import gc
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:  # `python tests/benchmarks/...` from a clone
    sys.path.insert(0, str(ROOT))

from lowmem import __version__  # noqa: E402
from lowmem.config.presets import read_preset  # noqa: E402
from lowmem.config.schema import ModelConfig, OptimizerConfig  # noqa: E402
from lowmem.kernels.attention import choose_backend  # noqa: E402
from lowmem.kernels.blockwise import lookup_tables  # noqa: E402
from lowmem.kernels.random_normal import lookup_table  # noqa: E402
from lowmem.model.llama import Llama, compute_dtype  # noqa: E402
from lowmem.optim.assign import build_optimizer  # noqa: E402
from lowmem.optim.blocks import hold_worst_window  # noqa: E402
from lowmem.optim.methods import method_spec  # noqa: E402
from lowmem.optim.step import MadeAnew, gather  # noqa: E402
from lowmem.planner.allocator import expandable_segments, replay  # noqa: E402
from lowmem.planner.persistent import bytes_by_part, tables  # noqa: E402
from lowmem.planner.plan import Choice  # noqa: E402
from lowmem.planner.rehearse import rehearse  # noqa: E402
from lowmem.planner.workspaces import CUBLAS_WORKSPACE  # noqa: E402
from lowmem.train.meters import meter_of  # noqa: E402

MODELS = ("llama-9m", "llama-60m", "llama-130m")
METHODS = (
    *("adamw", "adam8bit", "galore", "natural_galore", "q_galore", "apollo", "apollo_mini"),
    *("q_apollo", "q_apollo_mini", "frugal", "fira", "cosmos", "muon", "scale"),
)
WAYS = (
    ("unfused", "keep", "fp32", 1),
    ("unfused", "attn", "bf16", 2),
    ("fused+subspace", "full", "bf16", 2),
    ("fused", "full", "bf16", 1),
    ("fused", "keep", "fp32", 1),
)
"""(update, recompute, weights, micro-batches): method number i takes the i-th in turn, so that all
meet all."""
ROWS, LENGTH = 2, 128  # of a micro-batch
TARGET = ROOT / "docs" / "measured.md"
BEGIN = "<!-- made by tests/benchmarks/rehearsed_against_measured.py -->"


@dataclass(frozen=True)
class Case:
    """One configuration; optimizer as in a configuration file."""

    model: ModelConfig
    optimizer: OptimizerConfig
    choice: Choice
    length: int = LENGTH


def case_of(model: ModelConfig, method: str, turn: int, length: int = LENGTH) -> Case:
    """A method in one of WAYS, with a quarter of the width as its rank."""
    update, level, weights, accumulate = WAYS[turn % len(WAYS)]
    takes = method_spec(method).arguments
    settings: dict[str, Any] = {"method": method}
    if "rank" in takes and "mini" not in method:
        settings["rank"] = max(4, model.hidden_size // 4)
    if "8bit" in method_spec(method).states and turn % 2:
        settings["states"] = "8bit"
    clip = None if update == "fused" else 1.0
    choice = Choice(
        method,
        settings.get("rank"),
        settings.get("states", "fp32"),
        weights,  # type: ignore[arg-type]
        update,  # type: ignore[arg-type]
        level,
        ROWS,
        accumulate,
        clip,
    )
    return Case(model, OptimizerConfig.model_validate(settings), choice, length)


def rehearsed(case: Case, device: str) -> tuple[int, int, int]:
    """(tensors, allocated, reserved), the last two as PyTorch's allocator on CUDA would report."""
    dtype = compute_dtype(case.choice.weights, device)
    attention = choose_backend("auto", torch.device(device), dtype, case.model.head_dim)
    found = rehearse(
        case.model,
        case.optimizer,
        case.choice,
        case.length,
        attention=attention,
        workspace=0 if device == "cpu" else CUBLAS_WORKSPACE,
        updates=2,
    )
    peaks = replay(found.events, expandable=expandable_segments())
    return found.tensors, peaks.allocated, peaks.reserved


def measured(case: Case, device: str) -> tuple[int | None, int | None, int | None]:
    """The same of two real updates; None for what the device does not have."""
    if device == "cpu":  # these live for the whole process; counted below where they are used
        lookup_tables(device)
        lookup_table(device)
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    with meter_of(device) as meter, meter.segment("all"):
        optimizer = _run(case, device)
        used = sum(bytes_by_part(tables(optimizer)).values())
        del optimizer
    reading = meter.readings["all"]
    tensors = None if reading.tensors is None else reading.tensors + used
    return tensors, reading.allocated, reading.reserved


def _run(case: Case, device: str) -> Any:
    choice = case.choice
    model = Llama(
        case.model,
        dtype=compute_dtype(choice.weights, device),
        device=device,
        int8=choice.weights == "int8",
        recompute=choice.recompute,
        keep_logits=choice.logits == "keep",
    )
    optimizer = build_optimizer(
        case.optimizer,
        model.weights(),
        model.roles(),
        mode=choice.update,
        seed=0,
        head_dim=case.model.head_dim,
    )
    hold_worst_window(optimizer)  # as a rehearsal does
    optimizer.attach(model)
    model.initialise(0)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        shape = (choice.micro_batch, case.length)
        for _ in range(choice.accumulate):
            yield (
                torch.ones(shape, dtype=torch.int64, device=device),
                torch.ones(shape, dtype=torch.int64, device=device),
            )

    for _ in range(2):
        made = gather(
            model,
            optimizer,
            MadeAnew(batches),
            count=choice.accumulate,
            tokens=choice.accumulate * choice.micro_batch * case.length,
            lr=1e-3,
            clip=choice.clip,
        )
        optimizer.step()
        del made
    return optimizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--print", action="store_true", help="leave docs/measured.md alone")
    asked = parser.parse_args()
    lines = []
    for model in asked.models.split(","):
        for turn, method in enumerate(asked.methods.split(",")):
            lines.append(_row(model, case_of(read_preset(model), method, turn)))
            print(lines[-1], flush=True)
    if not asked.print:
        head = TARGET.read_text(encoding="utf-8").partition(BEGIN)[0]
        TARGET.write_text("\n".join([head + BEGIN, "", *_heading(), *lines, ""]), encoding="utf-8")


def _heading() -> Iterable[str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    yield f"{cores} CPU cores, {card}; torch {torch.__version__}, lowmem {__version__}."
    yield f"Two updates, micro-batches of {ROWS} x {LENGTH} tokens; bytes."
    yield ""
    yield (
        "| model | method | states | weights | update | recompute | micro-batches"
        " | rehearsed, CPU | measured, CPU | difference | CUDA allocated | CUDA reserved |"
    )
    yield "|---|---|---|---|---|---|---|---:|---:|---:|---:|---:|"


def _row(model: str, case: Case) -> str:
    how = case.choice
    planned = rehearsed(case, "cpu")[0]
    real = measured(case, "cpu")[0]
    assert real is not None
    cells = [model, how.method, how.states, how.weights, how.update, how.recompute]
    cells += [str(how.accumulate), f"{planned:,}", f"{real:,}", f"{real - planned:+,}"]
    return f"| {' | '.join([*cells, *_on_card(case)])} |"


def _on_card(case: Case) -> list[str]:
    if not torch.cuda.is_available():
        return ["not measured", "not measured"]
    pairs = zip(rehearsed(case, "cuda")[1:], measured(case, "cuda")[1:], strict=True)
    return [f"{real:,} ({real / planned - 1:+.2%})" for planned, real in pairs if real is not None]


if __name__ == "__main__":
    main()
