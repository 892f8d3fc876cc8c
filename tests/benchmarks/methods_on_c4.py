"""Train one small LLaMA with every method on the same C4 tokens, and print the table.

    lowmem data prepare c4/en --out corpus
    python tests/benchmarks/methods_on_c4.py corpus --out runs/methods-on-c4
    python tests/benchmarks/methods_on_c4.py corpus --out runs/methods-on-c4 --only-table

llama-tiny (float32 weights), 100 updates of 2,048 tokens, warm-up of a tenth and cosine to a tenth,
no clipping, no decay; rank a quarter of the hidden size (Mini: 1), gap 10, a tenth of the run. All
else is the method's recipe for the smallest size that its authors name. AdamW's rate is tuned
first, over a grid, with seed 0: one rate for all weights as in the papers, and a quarter of it for
the matrices, which is what the recipes of low-rank methods amount to. Seeds change the weights and
the order of the data. A run that is already in the folder is not repeated.
"""

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

UPDATES, ROWS, SEQ_LEN, RANK, GAP = 100, 16, 128, 32, 10
EVALUATION_TOKENS = 50_000
GRID = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)  # of AdamW's learning rate
QUARTER = {"matrix_lr_ratio": 0.25}  # what a scale of 0.25 does to the matrices of GaLore


@dataclass(frozen=True)
class Case:
    """A row of the table. settings: what differs from the recipe; lr: instead of the recipe's."""

    name: str
    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    lr: float | None = None
    seeds: tuple[int, ...] = (0, 1, 2)


def grid() -> list[Case]:
    """AdamW with one rate for all, and with a quarter of it for the matrices."""
    one = [Case(f"adamw, lr {lr:g}", "adamw", lr=lr, seeds=(0,)) for lr in GRID]
    two = [Case(f"adamw quarter, lr {lr:g}", "adamw", QUARTER, lr, (0,)) for lr in GRID]
    return one + two


def cases(best: float, quarter: float) -> list[Case]:
    """The methods of the mission with three seeds, their neighbours with one.

    best, quarter: the tuned rates of AdamW.
    """
    from lowmem.optim.methods import METHODS

    three = [
        *("galore", "fira", "apollo", "apollo_mini", "frugal", "natural_galore", "cosmos"),
        *("q_galore", "q_apollo", "q_apollo_mini"),
    ]
    one = [name for name in METHODS if name not in {*three, "adamw", "adam8bit"}]
    tuned = [
        Case("adamw, tuned", "adamw", lr=best),
        Case("adam8bit, same lr", "adam8bit", lr=best),
        Case("adamw, tuned, matrices at a quarter", "adamw", QUARTER, lr=quarter),
    ]
    variants = [
        Case("galore, as published", "galore", {"solver": "svd", "staggered": False}),
        Case("galore, 8-bit", "galore", {"states": "8bit"}),
        Case("fira, paper form", "fira", {"form": "paper"}),
        Case("lion, lr 0.001", "lion", lr=1e-3, seeds=(0,)),
        Case("sgd_sai, lr 0.03", "sgd_sai", lr=0.03, seeds=(0,)),
        Case("sgd_sai, lr 0.1", "sgd_sai", lr=0.1, seeds=(0,)),
        Case("magma over adamw", "magma", {"base": "adamw", "base_options": QUARTER}, lr=quarter),
        Case("magma over galore", "magma", {"base": "galore"}),
        Case("magma over apollo", "magma", {"base": "apollo"}),
    ]
    return [
        *tuned,
        *(Case(name, name) for name in three if name in METHODS),
        *(case for case in variants if case.method in METHODS),
        *(Case(name, name, seeds=(0,)) for name in one if name != "magma"),
    ]


def settings_of(case: Case) -> dict[str, Any]:
    """The [optimizer] section of a case."""
    from lowmem.optim.methods import method_spec

    spec = method_spec(case.method)
    arguments = spec.arguments
    settings: dict[str, Any] = spec.recipe(parameters=1_000_000)
    if case.method == "magma":
        base = method_spec(case.settings["base"])
        inner = base.recipe(parameters=1_000_000)
        settings["lr"] = inner.pop("lr")
        own = {"rank": RANK, "gap": GAP}
        inner = {k: v for k, v in (inner | own).items() if k in base.arguments}
        settings["base_options"] = inner | case.settings.get("base_options", {})
    settings |= {k: v for k, v in {"gap": GAP}.items() if k in arguments}
    if "rank" in arguments:
        settings["rank"] = 1 if "mini" in case.method else RANK
    settings |= {k: v for k, v in case.settings.items() if k != "base_options"}
    return settings | {"method": case.method, "lr": case.lr or settings["lr"]}


def run(case: Case, seed: int, folder: Path) -> dict[str, Any]:
    """One training; the record that is kept."""
    import torch

    from lowmem.config.presets import read_preset
    from lowmem.config.schema import OptimizerConfig, ScheduleConfig
    from lowmem.data.batches import Batches
    from lowmem.data.shards import open_corpus
    from lowmem.model.llama import Llama
    from lowmem.optim.assign import build_optimizer
    from lowmem.optim.step import gather
    from lowmem.train.diagnose import figures_of
    from lowmem.train.evaluate import evaluate
    from lowmem.train.schedule import learning_rate

    torch.set_num_threads(1)
    corpus, settings = open_corpus(folder), settings_of(case)
    assert corpus.train is not None
    assert corpus.validation is not None
    model = Llama(read_preset("llama-tiny"), dtype=torch.float32, device="cpu")
    model.initialise(seed)
    config = OptimizerConfig.model_validate(settings)
    weights = dict(model.named_parameters())
    optimizer = build_optimizer(
        config,
        weights,
        model.roles(),
        mode="unfused",
        seed=seed,
        head_dim=model.config.head_dim,
    )
    optimizer.attach(model)
    batches = Batches(corpus.train, seq_len=SEQ_LEN, rows_per_update=ROWS, seed=seed)
    schedule, began, losses = ScheduleConfig(), time.perf_counter(), []
    for update in range(UPDATES):
        batch = batches.of(update)
        lr = learning_rate(schedule, settings["lr"], update, UPDATES)
        micro = list(batch.micro_batches(ROWS))
        loss, _ = gather(model, optimizer, micro, count=1, tokens=batch.tokens, lr=lr, clip=None)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        optimizer.step()
    result = evaluate(model, corpus.validation, seq_len=SEQ_LEN, tokens=EVALUATION_TOKENS)
    matrices = [slot for slot in optimizer.slots.values() if slot.weight.ndim == 2]
    return {
        "case": case.name,
        "seed": seed,
        "settings": settings,
        "eval_loss": result.loss,
        "first_loss": losses[0],
        "last_loss": statistics.fmean(losses[-20:]),
        "state_bytes": sum(value.nbytes for _, value in optimizer.state_tensors()),
        "parameters": sum(weight.numel() for weight in weights.values()),
        "matrices": len(matrices),
        "diagnostics": figures_of(optimizer),
        "seconds": time.perf_counter() - began,
    }


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]


def path_of(out: Path, case: Case, seed: int) -> Path:
    name = case.name.replace(", ", "-").replace(" ", "_")
    return out / f"{name}-{seed}.json"


def work(case: Case, seed: int, folder: Path, out: Path) -> str:
    """Run and store; failures are stored nowhere and told."""
    try:
        record = run(case, seed, folder)
    except Exception as error:
        return f"{case.name:<26} seed {seed}  failed: {type(error).__name__}: {error}"
    path_of(out, case, seed).write_text(json.dumps(record, indent=1) + "\n")
    return f"{case.name:<26} seed {seed}  {record['eval_loss']:.4f}  {record['seconds']:5.0f} s"


def missing(chosen: list[Case], out: Path) -> Iterator[tuple[Case, int]]:
    """What is not there yet: all of seed 0 first, so that an early end leaves whole columns."""
    for seed in (0, 1, 2):
        for case in chosen:
            if seed in case.seeds and not path_of(out, case, seed).exists():
                yield case, seed


def table(out: Path) -> str:
    """Markdown, best first; the gap to tuned AdamW in per cent of its loss."""
    found: dict[str, list[dict[str, Any]]] = {}
    for record in records(out):
        found.setdefault(record["case"], []).append(record)
    means = {name: statistics.fmean(r["eval_loss"] for r in rs) for name, rs in found.items()}
    base = means.get("adamw, tuned", math.nan)
    lines = [
        "| method | lr | validation loss | seeds | against AdamW | state bytes/parameter |",
        "|---|---|---|---|---|---|",
    ]
    for name in sorted(found, key=lambda name: (math.isnan(means[name]), means[name])):
        rs, loss = found[name], f"{means[name]:.3f}"
        if len(rs) > 1:
            loss += f" +- {statistics.stdev([r['eval_loss'] for r in rs]):.3f}"
        gap = f"{100 * (means[name] / base - 1):+.1f} %"
        if math.isnan(means[name]):
            loss, gap = "diverged", ""
        state = rs[0]["state_bytes"] / rs[0]["parameters"]
        lr = rs[0]["settings"]["lr"]
        lines.append(f"| {name} | {lr:g} | {loss} | {len(rs)} | {gap} | {state:.2f} |")
    return "\n".join(lines)


def tuned_rate(out: Path, name: str) -> float:
    """The rate of the grid with the lowest loss."""
    tried = {
        r["settings"]["lr"]: r["eval_loss"] for r in records(out) if f"{name}, lr" in r["case"]
    }
    return min(tried, key=lambda lr: tried[lr])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("corpus", type=Path, help="a folder of `lowmem data prepare`")
    parser.add_argument("--out", type=Path, default=Path("runs/methods-on-c4"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="trainings at a time")
    parser.add_argument("--case", action="append", help="only this row; may be repeated")
    parser.add_argument("--only-table", action="store_true")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if not arguments.only_table:
        for stage in ("grid", "methods"):
            if stage == "grid":
                chosen = grid()
            else:
                chosen = cases(*(tuned_rate(arguments.out, n) for n in ("adamw", "adamw quarter")))
            if arguments.case and stage == "methods":
                chosen = [case for case in chosen if case.name in arguments.case]
            todo = list(missing(chosen, arguments.out))
            with ProcessPoolExecutor(arguments.jobs) as pool:
                waiting = [
                    pool.submit(work, case, seed, arguments.corpus, arguments.out)
                    for case, seed in todo
                ]
                for future in waiting:
                    print(future.result(), flush=True)
    print(table(arguments.out))


if __name__ == "__main__":
    main()
