"""The profiler's record of tensors: its rules, and every method's rehearsal against it."""

import pytest
import torch

from lowmem.config.presets import read_preset
from lowmem.optim.methods import METHODS
from lowmem.planner.live_bytes import LiveBytes
from lowmem.planner.profiled import Profiled
from tests.benchmarks.rehearsed_against_measured import WAYS, case_of, measured, rehearsed
from tests.planner.test_rehearse import MODEL


def rounded(count: int) -> int:
    return -(-count // 512) * 512


def test_a_segment_has_its_own_peak_and_what_it_leaves() -> None:
    with Profiled() as record:
        with record.segment("first"):
            kept = torch.zeros(1000)
            more = torch.zeros(3000)
            del more
        with record.segment("second"):
            last = torch.zeros(10)
    first, second = record.segments["first"], record.segments["second"]
    assert (first.peak, first.end) == (rounded(4000) + rounded(12000), rounded(4000))
    assert (second.peak, second.end) == (rounded(4000) + 512, rounded(4000) + 512)
    del kept, last


def test_of_a_segment_that_comes_again_the_higher_peak_counts() -> None:
    with Profiled() as record:
        for count in (5000, 100):
            with record.segment("again"):
                torch.zeros(count)
    assert record.segments["again"].peak == rounded(20000)
    assert record.segments["again"].end == 0


def test_scratch_of_an_operator_is_no_tensor() -> None:
    """LAPACK's eigenvalue solver works in memory that is gone when it returns."""
    matrix = torch.eye(64)
    with Profiled() as record, record.segment("eigh"):
        made = torch.linalg.eigh(matrix)
    assert record.segments["eigh"].peak == sum(rounded(tensor.nbytes) for tensor in made)


def test_what_a_composed_operator_passes_on_inside_is_a_tensor() -> None:
    matrix = torch.randn(64, 48)
    with Profiled() as record, record.segment("sum"):
        matrix.square().sum()
    assert record.segments["sum"].peak == rounded(matrix.nbytes) + 512


def test_a_python_number_is_no_tensor() -> None:
    """The binding wraps it as 8 bytes on the CPU, whatever the device."""
    matrix = torch.ones(4)
    with Profiled() as record, record.segment("scaled"):
        made = 2.5 * matrix
    assert (record.segments["scaled"].peak, record.segments["scaled"].end) == (512, 512)
    del made


def test_tensors_made_before_do_not_count() -> None:
    before = torch.zeros(1000)
    with Profiled() as record, record.segment("none"):
        before.mul_(2)
        del before
    assert record.segments["none"].peak == 0


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_what_was_rehearsed(method: str) -> None:
    """Equal to the byte, by a record that shares no code with the rehearsal's tracker."""
    alone = method in ("sophia", "adahessian")  # curvature needs whole gradients, in float32
    case = case_of(MODEL, method, 0 if alone else list(METHODS).index(method), length=32)
    assert measured(case, "cpu")[0] == rehearsed(case, "cpu")[0]


@pytest.mark.parametrize("turn", range(len(WAYS)))
@pytest.mark.parametrize("method", ["galore", "apollo", "fira"])
def test_every_way_to_update_takes_what_was_rehearsed(method: str, turn: int) -> None:
    case = case_of(MODEL, method, turn, length=32)
    assert measured(case, "cpu")[0] == rehearsed(case, "cpu")[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "method"), [("llama-60m", "galore"), ("llama-130m", "adam8bit")]
)
def test_real_sizes_take_what_was_rehearsed(preset: str, method: str) -> None:
    case = case_of(read_preset(preset), method, 3)
    assert measured(case, "cpu")[0] == rehearsed(case, "cpu")[0]


def test_a_tensor_that_a_rehearsal_does_not_see_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: a real update that takes 1 MiB more is noticed."""
    case = case_of(MODEL, "adamw", 0, length=32)
    planned = rehearsed(case, "cpu")[0]
    from lowmem.optim.optimizer import Optimizer

    plain = Optimizer.step

    def wasteful(self: Optimizer) -> None:
        unplanned = torch.zeros(2**20)
        plain(self)
        del unplanned

    monkeypatch.setattr(Optimizer, "step", wasteful)
    found = measured(case, "cpu")[0]
    assert found is not None
    assert found > planned + 2**20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", ["adamw", "galore", "apollo", "fira", "cosmos"])
def test_on_a_card_a_method_takes_what_was_rehearsed(method: str) -> None:
    """The promise of docs/memory.md: within 2 %, never under by more than 1 %."""
    case = case_of(read_preset("llama-60m"), method, 3)
    _, allocated, reserved = rehearsed(case, "cuda")
    _, really_allocated, really_reserved = measured(case, "cuda")
    assert really_allocated is not None
    assert really_reserved is not None
    assert 0.98 * allocated <= really_allocated <= 1.01 * allocated
    assert 0.98 * reserved <= really_reserved <= 1.01 * reserved


def test_both_trackers_see_the_same_step() -> None:
    """The tracker of the rehearsal, on real tensors, beside the profiler on the same work."""

    def work() -> None:
        a = torch.ones(300, 200)
        b = a @ a.t()
        c = (b.softmax(-1) + 1).log_()
        del b
        (c @ a).sum()

    tracker = LiveBytes("cpu")
    with tracker:
        work()
    with Profiled() as record, record.segment("work"):
        work()
    assert record.segments["work"].peak == tracker.peak
