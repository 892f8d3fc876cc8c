"""Phases: a stack that is right again however a block is left."""

import pytest

from lowmem.phases import current_phase, phase


def test_phases_nest_outermost_first() -> None:
    assert current_phase() == ()
    with phase("backward of block 7"):
        with phase("gradient of mlp.down"):
            assert current_phase() == ("backward of block 7", "gradient of mlp.down")
        with phase("gradient of mlp.up"):
            assert current_phase() == ("backward of block 7", "gradient of mlp.up")
    assert current_phase() == ()


def test_an_error_closes_its_phases() -> None:
    with phase("update"):
        with pytest.raises(KeyError), phase("refresh"):
            raise KeyError
        assert current_phase() == ("update",)
    assert current_phase() == ()


def test_what_was_read_does_not_change_later() -> None:
    with phase("loss"):
        seen = current_phase()
    assert seen == ("loss",)
