"""Tensors that live in host memory, counted anywhere."""

import pytest
import torch

from lowmem.planner.live_bytes import LiveBytes
from lowmem.transfers import Transfers, host_memory

PAGE = 4096


def test_what_was_stored_comes_back() -> None:
    transfers, x = Transfers(torch.device("cpu")), torch.randn(7, 5).bfloat16()
    kept = transfers.host_like(x)
    transfers.store(x, kept)
    back = transfers.fetch(kept).arrived()
    transfers.wait()
    assert torch.equal(back, x)
    assert back.data_ptr() != kept.data_ptr() != x.data_ptr()
    assert (transfers.stored, transfers.fetched) == (70, 70)


def test_host_memory_begins_with_a_page_of_its_own() -> None:
    """Two neighbours in one page could not be pinned apart."""
    transfers = Transfers(torch.device("cpu"))
    kept = [transfers.host((size,), torch.uint8) for size in (1, 4095, 4096, 4097)]
    assert all(each.data_ptr() % PAGE == 0 for each in kept)
    pages = [range(t.data_ptr() // PAGE, -(-(t.data_ptr() + t.nbytes) // PAGE)) for t in kept]
    assert len({page for each in pages for page in each}) == sum(map(len, pages)) == 5


def test_what_leaves_stays_until_the_next_leaves() -> None:
    """On a card the copy may still be reading it."""
    transfers = Transfers(torch.device("meta"))
    with LiveBytes("meta") as tracker:
        kept = transfers.host((1024,), torch.float32)
        for _ in range(3):
            x = torch.empty(1024, device="meta")
            transfers.store(x, kept)
            del x
        assert tracker.live == 4096
        transfers.settle()
        assert tracker.live == 0
    assert tracker.peak == 2 * 4096  # the one that leaves and the next


def test_the_tracker_counts_host_memory_apart() -> None:
    for device in ("cpu", "meta"):
        transfers = Transfers(torch.device(device))
        with LiveBytes(device) as tracker:
            kept = transfers.host((5000,), torch.uint8)
            assert (tracker.live, tracker.host) == (0, 3 * PAGE)  # two pages, and room to align
            here = transfers.fetch(kept).arrived()
            assert tracker.live == 5120
            del kept, here
        assert (tracker.live, tracker.host) == (0, 0)
        assert (tracker.peak, tracker.host_peak) == (5120, 3 * PAGE)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_copy_sees_what_was_computed_before_and_is_done_where_compute_waits() -> None:
    device = torch.device("cuda")
    transfers, tensor = Transfers(device), torch.zeros(2**24, device=device)
    kept = transfers.host_like(tensor)
    assert kept.is_pinned()
    for value in range(20):
        tensor.fill_(value)
        with transfers.beside() as mark:
            kept.copy_(tensor, non_blocking=True)
            done = mark()
        transfers.compute_waits(done)
        tensor.fill_(-1)  # the copy is not to see this
        assert transfers.fetch(kept).arrived().eq(value).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_leaves_may_be_forgotten_at_once() -> None:
    """Its memory is used for the next while the copy still waits."""
    device = torch.device("cuda")
    transfers = Transfers(device)
    kept = [transfers.host((2**24,), torch.float32) for _ in range(8)]
    for value, each in enumerate(kept):
        transfers.store(torch.full((2**24,), float(value), device=device), each)
    transfers.settle()
    transfers.wait()
    assert [each[::4096].unique().tolist() for each in kept] == [[float(v)] for v in range(8)]


def test_memory_for_a_copy_behind_the_training_leaves_its_phases_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A phase that another thread opened would name what the training makes meanwhile."""
    monkeypatch.setattr("lowmem.transfers.phase", lambda name: pytest.fail(f"opened {name}"))
    assert host_memory((3, 5), torch.bfloat16, torch.device("cpu")).shape == (3, 5)
