"""Workers that die are reported, not waited for."""

import os
from pathlib import Path
from typing import Any

import pytest

from lowmem.data.jobs import Job, Options, PieceMaker
from lowmem.data.pool import make_pieces
from lowmem.data.sources import find_inputs
from lowmem.data.tokenizer import Tokenizer
from lowmem.errors import DataError
from tests.data.conftest import documents, write_lines


class Deadly(Tokenizer):
    """Ends the process that receives it, as the system does when memory runs out."""

    def __init__(self) -> None:
        pass

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (9,)


def test_a_dead_worker_is_an_error(tmp_path: Path) -> None:
    inputs = [
        find_inputs(str(write_lines(tmp_path / f"{name}.jsonl", documents(3, 0))))[0]
        for name in "abc"
    ]
    jobs = [Job("train", index, (one,), True) for index, one in enumerate(inputs)]
    maker = PieceMaker(tmp_path, Deadly(), Options())
    with pytest.raises(DataError, match=r"a worker died while it read .*\.jsonl") as caught:
        make_pieces(jobs, maker, workers=2, progress=None)
    assert "fewer workers" in caught.value.fix
