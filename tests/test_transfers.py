"""Tensors that live in host memory, counted anywhere."""

import torch

from lowmem.planner.rehearse import LiveBytes
from lowmem.transfers import Transfers

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
