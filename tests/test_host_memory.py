"""Host memory and the order of copies, as far as a machine without a card can tell."""

import pytest
import torch

from lowmem.host_memory import SideStream, pinned_like
from lowmem.planner.rehearse import LiveBytes


def test_host_memory_has_the_shape_and_format_and_is_not_on_the_device() -> None:
    tensor = torch.ones(3, 5, dtype=torch.bfloat16)
    room = pinned_like(tensor)
    assert room.shape == tensor.shape
    assert room.dtype == tensor.dtype
    assert room.device.type == "cpu"
    assert room.data_ptr() != tensor.data_ptr()


def test_without_a_card_copies_are_done_at_once() -> None:
    stream, tensor = SideStream(torch.device("cpu")), torch.ones(4)
    room = pinned_like(tensor)
    with stream.after_compute():
        room.copy_(tensor, non_blocking=True)
    stream.compute_waits(stream.mark())
    tensor.zero_()
    assert torch.equal(room, torch.ones(4))


def test_a_rehearsal_counts_host_memory_apart_unless_the_device_is_the_host() -> None:
    tensor = torch.empty(1000, device="meta")
    with LiveBytes("meta") as tracker:
        room = pinned_like(tensor, "cuda")
        assert (tracker.live, tracker.host) == (0, 4096)
        same = pinned_like(tensor, "cpu")
        assert (tracker.live, tracker.host) == (4096, 4096)
        del room, same
    assert (tracker.live, tracker.host, tracker.host_peak) == (0, 0, 4096)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_copy_sees_what_was_computed_before_and_is_done_where_compute_waits() -> None:
    device = torch.device("cuda")
    stream, tensor = SideStream(device), torch.zeros(2**24, device=device)
    room, back = pinned_like(tensor), torch.empty_like(tensor)
    for value in range(20):
        tensor.fill_(value)
        with stream.after_compute():
            room.copy_(tensor, non_blocking=True)
        stream.compute_waits(stream.mark())
        tensor.fill_(-1)  # the copy is not to see this
        back.copy_(room, non_blocking=True)
        assert back.eq(value).all()
