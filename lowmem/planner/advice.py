"""Where memory could be saved when the optimizer is not what takes it.

    advice(plan)    ["activations and loss are 67 % of the peak, states 8 %: ..."]

Every sentence follows from figures of the plan. No method can save more than the states and
projections that are there.
"""

from typing import TYPE_CHECKING

from lowmem.units import format_bytes

if TYPE_CHECKING:
    from lowmem.planner.plan import Choice, Plan

TIGHT = 0.9  # of what is usable
SMALL_STATES = 0.2  # of the tensors at the peak, where a plan is tight
SMALL_MODEL = 0.25  # the same of weights and states: a low-rank method has little to save
_STATES = ("states", "projections")
_TOKENS = ("activations", "loss", "batch")  # grow with the micro-batch and the sequence


def advice(plan: "Plan") -> list[str]:
    """Nothing, or a sentence that says what takes the memory and which setting changes that.

    It is said where a plan is tight or does not fit, or has a low-rank method for a small model,
    if what grows with the tokens takes at least twice what the optimizer keeps.
    """
    parts, whole = plan.memory.parts, max(1, plan.memory.tensors)
    states = sum(parts.get(name, 0) for name in _STATES)
    tokens = sum(parts.get(name, 0) for name in _TOKENS)
    small = states + parts.get("weights", 0) <= SMALL_MODEL * whole
    tight = plan.memory.reserved >= TIGHT * plan.card.usable_bytes
    asked = (tight and states <= SMALL_STATES * whole) or (plan.choice.rank is not None and small)
    if not asked or tokens < 2 * states:
        return []
    largest = sorted((name for name in _TOKENS if parts.get(name)), key=lambda n: -parts[n])
    shares = ", ".join(f"{name} {parts[name] / whole:.0%}" for name in largest[:2])
    return [
        f"of the peak {shares}, states and projections {states / whole:.0%}: another method saves "
        f"{format_bytes(states)} at most, {_lever(plan.choice)} has {format_bytes(tokens)} to cut"
    ]


def _lever(choice: "Choice") -> str:
    """The setting that makes a forward pass smaller, the gentlest first."""
    if choice.micro_batch > 1:
        return "a smaller --batch" if choice.update == "fused" else "a smaller --micro-batch"
    return "a shorter --seq-len" if choice.recompute == "full" else "--recompute full"
