"""Sentences about values, generated for every field of the configuration."""

import pytest

from lowmem.config.problems import Schema, allowed, known_keys, schema_of, unknown_key


@pytest.mark.parametrize("key", known_keys())
def test_every_key_can_say_what_it_takes(key: str) -> None:
    sentence = allowed(schema_of(key) or {})
    assert sentence
    assert not sentence.startswith(",")


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        ("train.updates", 'a whole number of at least 1 or "auto"'),
        ("schedule.decay", "a number above 0 and at most 1"),
        ("data.skip_bad", "true or false"),
        (
            "optimizer.rank",
            "a whole number of at least 1, a number above 0 and below 1, a table, "
            '"auto", "fit", "fit-fraction" or "fit-mlp"',
        ),
        ("optimizer.rank.mlp", "a whole number of at least 1 or a number above 0 and below 1"),
    ],
)
def test_sentences_name_bounds_and_choices(key: str, sentence: str) -> None:
    assert allowed(schema_of(key) or {}) == sentence


@pytest.mark.parametrize("key", ["optimizer.rank.head", "train.rank", "x", "optimizer.rest.x"])
def test_keys_that_do_not_exist_have_no_schema(key: str) -> None:
    assert schema_of(key) is None
    assert unknown_key(key).startswith("unknown key")


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("train.microbatch", "`micro_batch`"),
        ("train.rank", "`optimizer.rank`"),
        ("rank", "`optimizer.rank`"),
        ("optimiser.rnak", "`optimizer.rank`"),
        ("modell", "`model`"),
    ],
)
def test_the_key_that_was_meant_is_found(key: str, hint: str) -> None:
    assert hint in unknown_key(key)


def test_no_hint_is_better_than_a_wrong_one() -> None:
    assert unknown_key("qqqqqq") == "unknown key"
    assert unknown_key("model.zzzz") == "unknown key"


@pytest.mark.parametrize(
    ("schema", "sentence"),
    [
        (
            {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}]},
            "[a whole number, text]",
        ),
        ({"type": "array", "items": {"type": "number"}}, "a list"),
        ({"anyOf": [{"type": "number"}, {"type": "null"}]}, "a number"),
    ],
)
def test_arguments_of_methods_have_sentences_too(schema: Schema, sentence: str) -> None:
    assert allowed(schema) == sentence
