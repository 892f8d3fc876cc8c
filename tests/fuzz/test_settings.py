"""Settings that hypothesis draws: what fails is shrunk to the smallest that does."""

import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem.config.flags import ENVIRONMENT, FLAGS
from lowmem.config.load import flatten, load
from lowmem.config.problems import known_keys, schema_of
from lowmem.config.toml import toml_value
from lowmem.errors import ConfigError
from tests.fuzz.configurations import carried_through
from tests.fuzz.mutation import TEXTS
from tests.fuzz.verdict import Tally

# The same cases every time, without a database of failures; no deadline, for machines are busy.
SETTINGS = settings(max_examples=60, derandomize=True, database=None, deadline=None)

TEXT = st.sampled_from(TEXTS) | st.text(max_size=20)
NUMBER = st.integers() | st.floats()
VALUE = st.recursive(
    st.booleans() | NUMBER | TEXT,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=5,
)
KEY = st.sampled_from(known_keys())


@st.composite
def inputs(draw: st.DrawFn) -> dict[str, Any]:
    """The four ways by which settings come in."""
    return {
        "file": draw(st.dictionaries(KEY | TEXT, VALUE, max_size=4)),
        "flags": draw(st.dictionaries(st.sampled_from(list(FLAGS.values())), TEXT, max_size=2)),
        "environ": draw(st.dictionaries(st.sampled_from(list(ENVIRONMENT)), TEXT, max_size=2)),
        "assignments": draw(st.lists(st.builds("{}={}".format, KEY, VALUE | TEXT), max_size=2)),
    }


def taken_by(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values that the schema of one key takes; none for a section."""
    branches = schema.get("anyOf", [schema])
    return st.one_of([_branch(branch) for branch in branches])


def _branch(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    low, high = schema.get("minimum"), schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    match schema:
        case {"const": only}:
            return st.just(only)
        case {"enum": choices}:
            return st.sampled_from(choices)
        case {"type": "boolean"}:
            return st.booleans()
        case {"type": "integer"}:
            return st.integers(
                low if above is None else above + 1, high if below is None else below - 1
            )
        case {"type": "number"}:
            return st.floats(
                above if low is None else low,
                below if high is None else high,
                exclude_min=above is not None,
                exclude_max=below is not None,
                allow_nan=False,
                allow_infinity=False,
            )
    return st.nothing()


PLAIN_KEYS = [
    key
    for key in known_keys()
    if not (key.startswith("model.") or taken_by(schema_of(key) or {}).is_empty)
]  # a model's keys do not stand alone


@st.composite
def right_values(draw: st.DrawFn) -> tuple[str, Any]:
    """(a key, a value that its schema takes)."""
    key = draw(st.sampled_from(PLAIN_KEYS))
    return key, draw(taken_by(schema_of(key) or {}))


@given(inputs())
@SETTINGS
def test_any_settings_end_in_a_configuration_or_an_error_that_helps(asked: dict[str, Any]) -> None:
    tally = Tally()
    tally.run("settings", lambda: _carried(asked))
    assert not tally.failures, tally.failures[0]


def _carried(asked: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.toml"
        lines = [f"{toml_value(key)} = {toml_value(value)}" for key, value in asked["file"].items()]
        file.write_text("\n".join(lines), encoding="utf-8", errors="surrogateescape")
        found = load(asked["flags"], [file], asked["environ"], asked["assignments"])
    carried_through(found.config, cuda=False)


@given(right_values())
@SETTINGS
def test_what_a_key_takes_is_kept(pair: tuple[str, Any]) -> None:
    key, value = pair
    try:
        config = load({}, [], {}, [f"{key}={toml_value(value)}"]).config
    except ConfigError as error:
        if "must be" in error.why:
            raise
        return  # it does not suit the others
    assert dict(flatten(config.model_dump()))[key] == value
