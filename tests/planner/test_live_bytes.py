"""What is live, when it is the most, and what it is for."""

import pytest
import torch

from lowmem.planner.live_bytes import LiveBytes, kind_of_phase, part_of


def test_a_rehearsal_costs_no_host_memory() -> None:
    """A factory that does not name its device would fill real gigabytes."""
    with pytest.raises(RuntimeError, match="real memory during a rehearsal"), LiveBytes("meta"):
        torch.zeros(2**20)


def test_the_peak_names_its_moment_and_its_parts() -> None:
    tracker = LiveBytes("cpu")
    weight = torch.empty(1000, dtype=torch.uint8)
    tracker.track([weight], "weights")
    with tracker:
        first = torch.zeros(256)
        second = torch.zeros(512)
        del first
        third = torch.zeros(10)
    assert tracker.peak == 1024 + 1024 + 2048
    assert tracker.peak_parts == {"weights": 1024, "activations": 3072}
    assert tracker.live == 1024 + 2048 + 512
    del second, third
    assert [size for _, size in tracker.events] == [1024, 1024, 2048, -1024, 512, -2048, -512]


@pytest.mark.parametrize(
    ("phases", "kind"),
    [
        (("embedding",), "forward"),
        (("forward of block 3",), "forward"),
        (("loss",), "loss"),
        (("loss", "gradient of head"), "loss"),
        (("gradient of norm",), "backward"),
        (("backward of block 3", "gradient of mlp.up"), "backward"),
        (("backward of block 3", "gradient of mlp.up", "hold"), "backward"),
        (("backward of block 3", "gradient of mlp.up", "update"), "update"),
        (("update", "refresh"), "refresh"),
        (("evaluation", "forward of block 1"), "evaluation"),
        (("evaluation", "loss"), "evaluation"),
        (("curvature", "backward of block 1"), "curvature"),
        ((), "other"),
    ],
)
def test_phases_are_of_one_kind_each(phases: tuple[str, ...], kind: str) -> None:
    assert kind_of_phase(phases) == kind


def test_parts_follow_the_innermost_phase() -> None:
    assert part_of(("backward of block 3", "gradient of mlp.down")) == "gradients"
    assert part_of(("gradient of mlp.down", "hold")) == "gradients"
    assert part_of(("gradient of mlp.down", "update")) == "update"
    assert part_of(("forward of block 3",)) == "activations"
    assert part_of(("loss",)) == "loss"
