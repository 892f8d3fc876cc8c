"""What is told when a device runs out of memory: where, planned beside measured, and what helps."""

from itertools import islice

import torch

from lowmem.model.llama import Llama
from lowmem.optim.optimizer import Optimizer
from lowmem.planner.fixes import fixes
from lowmem.planner.job import Job
from lowmem.planner.plan import Plan
from lowmem.train.events import Part
from lowmem.train.measure import categories
from lowmem.units import format_bytes

FIXES = 3


def out_of_memory_table(plan: Plan | None, model: Llama, optimizer: Optimizer) -> tuple[str, str]:
    """(why, fix): planned beside measured by category and what others use; what saves most."""
    if plan is None:
        return "no plan of this run is known", ""
    device = model.head_weight.device
    rows = [("", "planned", "measured"), *_rows(plan, model, optimizer, device)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        f"{name:<{widths[0]}}  {planned:>{widths[1]}}  {measured:>{widths[2]}}"
        for name, planned, measured in rows
    ]
    if device.type == "cuda":
        lines.append(_of_others(plan))
    return "\n".join(lines), "\n".join(_fixes(plan))


def _rows(
    plan: Plan, model: Llama, optimizer: Optimizer, device: torch.device
) -> list[tuple[str, str, str]]:
    on_cuda = device.type == "cuda"  # elsewhere nobody keeps a peak
    peak = torch.cuda.max_memory_allocated(device) if on_cuda else None
    found = categories(plan, model, optimizer, peak)
    if on_cuda:
        reserved = torch.cuda.max_memory_reserved(device)
        found.append(Part("allocated", plan.memory.allocated, peak))
        found.append(Part("reserved", plan.memory.reserved, reserved))
    return [
        (
            part.name,
            format_bytes(part.planned),
            "not measured" if part.measured is None else format_bytes(part.measured),
        )
        for part in found
    ]


def _of_others(plan: Plan) -> str:
    free, total = torch.cuda.mem_get_info()
    others = max(0, total - free - torch.cuda.memory_reserved() - plan.card.context)
    planned = format_bytes(plan.card.others)
    return f"others use {format_bytes(others)} of the card (planned {planned})"


def _fixes(plan: Plan) -> list[str]:
    job = Job.of(plan.config, plan.card)
    found = list(islice(fixes(job, plan.choice, plan.memory), FIXES))
    width = max((len(fix.flags) for fix in found), default=0)
    return [f"{fix.flags:{width}}  -{format_bytes(fix.saves)}" for fix in found]
