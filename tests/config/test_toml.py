"""Values as TOML against the standard library's parser, and the lines of keys."""

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowmem.config.toml import key_lines, toml_value

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
VALUES = st.recursive(
    st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
)


@given(VALUES)
def test_the_standard_library_reads_the_value_back(value: object) -> None:
    read = tomllib.loads(f"x = {toml_value(value)}")["x"]
    assert repr(read) == repr(value)


def test_a_value_without_a_form_in_toml_is_a_programming_error() -> None:
    with pytest.raises(TypeError, match="no form in TOML"):
        toml_value({1, 2})


def test_keys_are_found_at_their_lines() -> None:
    text = '\na = 1\n"b c" = 2\n[t]\n# d = 0\nd.e = 3\n  [t."u v"]\n  f=4\nt2 = {g = 5}\n'
    lines = {"a": 2, "b c": 3, "t": 4, "t.d.e": 6, "t.u v": 7, "t.u v.f": 8, "t.u v.t2": 9}
    assert key_lines(text) == lines
    tomllib.loads(text)  # the example is valid
