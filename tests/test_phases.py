"""Phases: a stack that is right again however a block is left."""

import pytest

from lowmem.phases import current_phase, phase, phases_of, sentence


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


def test_an_error_remembers_where_it_was_raised() -> None:
    inner = phase("gradient of mlp.gate")
    with pytest.raises(KeyError) as caught, phase("backward of block 3"), inner:
        raise KeyError
    assert phases_of(caught.value) == ("backward of block 3", "gradient of mlp.gate")
    assert phases_of(ValueError()) == ()


def test_a_moment_is_said_as_people_say_it() -> None:
    assert sentence(("loss", "loss")) == "loss"
    assert sentence(("backward of block 3", "update")) == "backward of block 3, update"
    assert sentence(()) == "between phases"
