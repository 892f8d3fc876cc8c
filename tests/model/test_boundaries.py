"""What stands between the blocks, on the device and in host memory."""

from typing import Any

import pytest
import torch

from lowmem.model.boundaries import Boundaries, Place

PLACES = [Place(0, 4, 2, 2), Place(4, 8, 2, 1), Place(8, 10, 2, 0)]


@pytest.mark.parametrize("where", ["keep", "host"])
def test_rows_come_back_as_they_were_put(where: Any) -> None:
    boundaries = Boundaries(where)
    for _ in range(2):  # updates
        x = torch.randn(10, 3)
        boundaries.begin(12, x)
        for layer in (0, 1):
            for place in PLACES:
                boundaries.put(layer, place, x[place.rows] + layer)
        for place, (low, high) in boundaries.read([0, 1], PLACES):
            assert torch.equal(low, x[place.rows])
            assert torch.equal(high, x[place.rows] + 1)
            boundaries.put(0, place, -low)
        boundaries.close(1)
        back = [rows for _, (rows,) in boundaries.read([0], PLACES)]
        assert torch.equal(torch.cat(back), -x)


def test_host_memory_is_taken_once_and_every_byte_on_the_way_is_counted() -> None:
    boundaries, x = Boundaries("host"), torch.randn(10, 3)
    addresses = set()
    for _ in range(3):
        boundaries.begin(12, x)
        for place in PLACES:
            boundaries.put(0, place, x[place.rows])
        for _ in boundaries.read([0], PLACES):
            pass
        addresses.add(boundaries._layers[0].data_ptr())
    assert len(addresses) == 1
    transfers = boundaries.transfers
    assert transfers is not None
    assert (transfers.stored, transfers.fetched) == (3 * x.nbytes, 3 * x.nbytes)
