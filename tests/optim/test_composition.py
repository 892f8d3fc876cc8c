"""Methods as text."""

from dataclasses import dataclass

import pytest

from lowmem.optim.composition import by_role, composition, expression
from lowmem.optim.method import ByRole, Dense
from lowmem.optim.methods import METHODS, build_method
from lowmem.optim.rules import Sgd


@dataclass(frozen=True)
class Odd:
    rule: Sgd
    step: float = 0.5


def test_one_line_names_form_and_parts() -> None:
    rule = "Sgd(momentum=0.0, dampening=0.0, nesterov=False, sign=True, format=Float32())"
    assert expression(Odd(Sgd(sign=True))) == f"Odd: {rule}, step=0.5"
    assert composition(Odd(Sgd(sign=True))) == {"rule": rule, "step": "0.5"}


def test_what_is_no_dataclass_is_shown_as_it_is() -> None:
    assert expression(3) == "3"
    assert composition(3) == {"method": "3"}


@pytest.mark.parametrize(
    ("own", "roles"),
    [
        ({}, ["attention, mlp", "all others"]),
        ({"head": Dense(Sgd(0.5))}, ["attention, mlp", "head", "all others"]),
        ({"embedding": Dense(Sgd(0.5))}, ["attention, mlp", "embedding", "all others"]),
    ],
)
def test_roles_with_a_method_of_their_own(own: dict[str, Dense], roles: list[str]) -> None:
    method = ByRole(Dense(Sgd(0.9)), Dense(Sgd()), **own)
    assert list(by_role(method)) == roles


def test_one_method_for_all_is_told_once() -> None:
    found = by_role(build_method("adamw", {}))
    assert list(found) == ["all weights"]
    assert found["all weights"]["form"] == "Dense"


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_words(name: str) -> None:
    """No part may fall back to the address of an object, which changes from run to run."""
    method = build_method(name, {})
    for part in (method.matrix, method.other, method.embedding, method.head):
        assert " at 0x" not in expression(part)
