"""A plan made up by hand, so that what is printed can be compared with known numbers."""

from dataclasses import replace

from lowmem.config.schema import Config
from lowmem.planner.plan import Candidate, Card, Choice, Fix, Memory, Plan
from lowmem.planner.quality import Penalty
from lowmem.units import GIB, MIB

CARD = Card("RTX 4090 (24GB class)", 24 * GIB, 500 * MIB, 300 * MIB, 700 * MIB, "preset")
CHOICE = Choice("galore", 512, "8bit", "bf16", "fused+subspace", "full", 8, 16, None)
PARTS = {"weights": 13 * GIB, "states": 3 * GIB, "activations": 2 * GIB, "workspace": 0}
PENALTY = Penalty(-0.0491, "arXiv:2403.03507, Table 3", "published")
DOUBTFUL = Penalty(0.0127, "arXiv:2403.03507, Table 3", "no evidence", ("so small a rank",))
MEMORY = Memory(18 * GIB, 19 * GIB, 20 * GIB, PARTS, "in backward of block 7")


def example_plan(*, reserved: int = 20 * GIB) -> Plan:
    dense = replace(CHOICE, method="adam8bit", rank=None, recompute="keep", micro_batch=1)
    by_role = replace(CHOICE, rank={"mlp": 64, "attention": 32})
    return Plan(
        Config(),
        CARD,
        CHOICE,
        replace(MEMORY, reserved=reserved),
        [
            Candidate(CHOICE, True, reserved, reason="", quality=PENALTY),
            Candidate(by_role, True, 19 * GIB, reason="a higher rank fits", quality=DOUBTFUL),
            Candidate(dense, False, 26 * GIB, bound=True, reason="4.46 GiB too much"),
        ],
        [Fix("--rank 256", 2 * GIB, True), Fix("--micro-batch 4", GIB // 2, False)],
        ["lr 0.01: galore's sheet (arXiv:2403.03507)", "clip off: update is fused"],
        quality=PENALTY,
    )
