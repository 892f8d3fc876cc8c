"""Precedence, origins, and every mistake told at once with its place."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem.config.flags import ENVIRONMENT, FLAGS
from lowmem.config.load import load
from lowmem.config.problems import known_keys, schema_of
from lowmem.config.schema import Config, ModelConfig
from lowmem.config.toml import to_toml
from lowmem.errors import ConfigError


def written(folder: Path, text: str, name: str = "run.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def complaint(*arguments: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(*arguments)
    return caught.value


def test_nothing_given_is_the_default_configuration() -> None:
    loaded = load({}, [], {})
    assert loaded.config == Config()
    assert set(loaded.origins.values()) == {"default"}


def test_stronger_sources_win_and_origins_tell(tmp_path: Path) -> None:
    first = written(tmp_path, "[optimizer]\nrank = 1\nlr = 0.1\ngap = 10\n[train]\nseed = 1\n")
    second = written(tmp_path, "[optimizer]\nrank = 2\nlr = 0.2\ngap = 20\n", "second.toml")
    environ = {"LOWMEM_RANK": "3", "LOWMEM_LR": "0.3"}
    loaded = load({"optimizer.rank": "4"}, [first, second], environ)
    assert loaded.config.optimizer.rank == 4
    assert loaded.config.optimizer.lr == 0.3
    assert loaded.config.optimizer.options == {"gap": 20}
    assert loaded.config.train.seed == 1
    assert loaded.origins["optimizer.rank"] == "flag --rank"
    assert loaded.origins["optimizer.lr"] == "environment LOWMEM_LR"
    assert loaded.origins["optimizer.options.gap"] == f"{second}:4"
    assert loaded.origins["train.seed"] == f"{first}:6"
    assert loaded.origins["train.clip"] == "default"


def test_assignments_are_toml_or_plain_text_and_win_over_flags() -> None:
    assignments = ["optimizer.rank={mlp = 64}", "data.source=c4", "optimizer.betas=[0.9, 0.95]"]
    loaded = load({"optimizer.rank": "4", "data.source": "sample"}, [], {}, assignments)
    assert loaded.config.optimizer.rank == {"mlp": 64}
    assert loaded.config.data.source == "c4"
    assert loaded.config.optimizer.options == {"betas": [0.9, 0.95]}
    assert loaded.origins["optimizer.rank.mlp"] == "flag --set optimizer.rank"


def test_an_option_of_the_method_becomes_a_number_not_text() -> None:
    loaded = load({FLAGS["--scale"]: "0.5"}, [], {"LOWMEM_GAP": "50"})
    assert loaded.config.optimizer.options == {"scale": 0.5, "gap": 50}


def test_a_model_name_replaces_the_table_of_a_file(tmp_path: Path) -> None:
    path = written(tmp_path, "[model]\nhidden_size = 8\n")
    assert load({"model": "llama-60m"}, [path], {}).config.model == "llama-60m"


@pytest.mark.parametrize(
    ("strong", "weak"), list(itertools.permutations(["updates", "tokens", "hours"], 2))
)
def test_a_stronger_budget_replaces_the_other_form(tmp_path: Path, strong: str, weak: str) -> None:
    path = written(tmp_path, f"[train]\n{weak} = 77\n")
    train = load({f"train.{strong}": "5"}, [path], {}).config.train
    unset = {"updates": "auto", "tokens": None, "hours": None}
    assert {name: getattr(train, name) for name in unset} == unset | {strong: 5}


def test_two_budgets_in_one_file_are_a_contradiction(tmp_path: Path) -> None:
    path = written(tmp_path, "[train]\nupdates = 5\ntokens = 77\n")
    assert "one of updates, tokens and hours" in complaint({}, [path], {}).why


@pytest.mark.parametrize("other", ["train.updates", "train.tokens"])
def test_hours_beside_another_budget_are_a_contradiction(other: str) -> None:
    error = complaint({"train.hours": "48", other: "100"}, [], {})
    assert "one of updates, tokens and hours" in error.why


@pytest.mark.parametrize("hours", ["0", "-1", "inf", "nan", "two days"])
def test_hours_that_are_none_are_refused(hours: str) -> None:
    assert (
        f"train.hours  {hours} must be a number above 0"
        in complaint({"train.hours": hours}, [], {}).why
    )


def test_the_file_named_by_the_environment_is_the_weakest(tmp_path: Path) -> None:
    weak = written(tmp_path, "[train]\nseed = 1\n[run]\nname = 'a'\n", "weak.toml")
    strong = written(tmp_path, "[train]\nseed = 2\n")
    config = load({}, [strong], {"LOWMEM_CONFIG": str(weak)}).config
    assert (config.train.seed, config.run.name) == (2, "a")


def test_unknown_variables_are_warned_about_with_the_nearest() -> None:
    environ = {"LOWMEM_RNAK": "3", "LOWMEM_HOME": "/x", "LOWMEM_CLIP": "", "HOME": "/y"}
    loaded = load({}, [], environ)
    assert loaded.config == Config()
    assert loaded.warnings == ["LOWMEM_RNAK means nothing to lowmem; did you mean `LOWMEM_RANK`?"]


def test_all_problems_come_at_once_each_with_line_and_remedy(tmp_path: Path) -> None:
    text = '[optimiser]\nrnak = 3\n[optimizer]\nstates = "8bits"\n\n[train]\nclip = 0\n'
    path = written(tmp_path, text)
    error = complaint({"train.updates": "many"}, [path], {"LOWMEM_SEQ_LEN": "0"}, ["evalu=1"])
    assert error.exit_code == 2
    assert error.what == "6 problems in the configuration"
    lines = {line.split()[1 if "--set" not in line else 2]: line for line in error.why.split("\n")}
    assert lines.keys() == {
        "optimiser.rnak",
        "optimizer.states",
        "train.clip",
        "train.updates",
        "data.seq_len",
        "evalu",
    }
    assert lines["optimiser.rnak"].startswith(f"{path}:2 ")
    assert "did you mean `optimizer.rank`?" in lines["optimiser.rnak"]
    assert lines["optimizer.states"].startswith(f"{path}:4 ")
    assert "did you mean `8bit`?" in lines["optimizer.states"]
    assert lines["train.clip"].startswith(f"{path}:7 ")
    assert '0 must be a number above 0, "off" or "auto"' in lines["train.clip"]
    assert lines["train.updates"].startswith("--updates ")
    assert 'many must be a whole number of at least 1 or "auto"' in lines["train.updates"]
    assert lines["data.seq_len"].startswith("LOWMEM_SEQ_LEN ")
    assert "did you mean `evaluate`?" in lines["evalu"]


def test_problems_of_one_file_name_it(tmp_path: Path) -> None:
    path = written(tmp_path, "modell = 'x'\n")
    error = complaint({}, [path], {})
    assert error.what == f"1 problem in {path}"
    assert error.why == f"{path}:1  modell  unknown key; did you mean `model`?"


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("optimizer.rank", "0", "0 must be a whole number of at least 1, a number above 0 and"),
        ("optimizer.rank", "1.5", "1.5 must be a whole number of at least 1, a number above 0"),
        ("optimizer.lr", "-1", "-1 must be a number of at least 0"),
        ("optimizer.lr", "inf", "inf must be a number of at least 0"),
        ("train.tokens", "12Q", "'12Q' is no count; write it like 1.1B"),
        ("train.batch", "0seq", "a batch of '0seq' is empty"),
        ("train.update", "fussed", "did you mean `fused`?"),
        ("schedule.min_ratio", "2", "2 must be a number of at least 0 and at most 1"),
        ("run.name", "a/b", "'a/b' is no folder name"),
        ("checkpoint.keep", "0", "0 must be a whole number of at least 1"),
    ],
)
def test_impossible_values_are_refused_in_a_sentence(key: str, value: str, sentence: str) -> None:
    assert sentence in complaint({key: value}, [], {}).why


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("updates = true", "true must be a whole number"),
        ("clip = inf", "inf must be a number above 0"),
        ("seed = 1.5", "1.5 must be a whole number of at least 0"),
        ("batch = 32", "32 must be text"),
        ("weights = ['bf16']", '["bf16"] must be "fp32", "bf16", "int8" or "auto"'),
    ],
)
def test_values_of_another_type_are_not_bent(tmp_path: Path, line: str, sentence: str) -> None:
    assert sentence in complaint({}, [written(tmp_path, f"[train]\n{line}\n")], {}).why


def test_a_model_table_tells_what_is_missing_and_what_is_wrong(tmp_path: Path) -> None:
    path = written(tmp_path, "[model]\nhidden_size = -8\nnum_attention_heads = 2\nlayers = 3\n")
    why = complaint({}, [path], {}).why
    assert "model.hidden_size" in why
    assert "model.intermediate_size" in why
    assert "is missing" in why
    assert "model.layers" in why
    assert "must be text" not in why  # the other branch of the union is of no interest


def test_broken_files_are_problems_with_their_name(tmp_path: Path) -> None:
    missing, broken = tmp_path / "no.toml", written(tmp_path, "[train\nseed 3\n")
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    why = complaint({}, [missing, broken, binary, tmp_path], {}).why
    assert f"{missing}" in why
    assert "does not exist" in why
    assert "is not TOML" in why
    assert "line 1" in why
    assert why.count("cannot be read as text") == 2


def test_every_flag_and_variable_sets_a_key_that_exists() -> None:
    free_options = {"optimizer.options.scale", "optimizer.options.gap"}
    assert set(FLAGS.values()) - free_options <= set(known_keys())
    assert all(schema_of(key) is not None for key in FLAGS.values())
    assert set(ENVIRONMENT.values()) == set(FLAGS.values())


_TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"))  # a NUL is refused

SHAPES = st.builds(
    ModelConfig,
    hidden_size=st.sampled_from([16, 64]),
    intermediate_size=st.integers(1, 99),
    num_hidden_layers=st.integers(1, 9),
    num_attention_heads=st.just(4),
    num_key_value_heads=st.sampled_from([1, 2, 4]),
    head_dim=st.just(8),
    eos_token_id=st.none() | st.integers(0, 9),
    rope_scaling=st.none() | st.just({"type": "linear", "factor": 2.0}),
)
NAMES = st.from_regex(
    r"[A-Za-z_-][A-Za-z0-9_ \\-]{0,5}", fullmatch=True
)  # no dots: keys are dotted
OPTIONS = st.recursive(
    st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | _TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=5,
)
RANKS = st.integers(1, 999) | st.floats(0.01, 0.99) | st.just("auto")


@settings(max_examples=60)
@given(
    model=SHAPES | st.sampled_from(["llama-60m", 'a "b"\n\\', "\x7f\u00e9"]),
    rank=RANKS | st.dictionaries(st.sampled_from(["mlp", "attention"]), st.integers(1, 9)),
    lr=st.floats(0, 1e9) | st.just("auto"),
    options=st.dictionaries(NAMES, OPTIONS, max_size=3),
    clip=st.floats(1e-9, 1e9) | st.sampled_from(["off", "auto"]),
    warmup=st.integers(0, 999) | st.floats(0, 0.99),
    tokens=st.none() | st.integers(1, 10**15),
    name=st.none() | st.just("a b"),
)
def test_a_written_configuration_reads_back_equal(
    tmp_path_factory: pytest.TempPathFactory,
    model: Any,
    rank: Any,
    lr: Any,
    options: Any,
    clip: Any,
    warmup: Any,
    tokens: Any,
    name: Any,
) -> None:
    config = Config.model_validate(
        {
            "model": model,
            "optimizer": {"rank": rank, "lr": lr, "options": options},
            "train": {"clip": clip, "tokens": tokens},
            "schedule": {"warmup": warmup},
            "run": {"name": name},
        }
    )
    path = written(tmp_path_factory.mktemp("config"), "")
    path.write_text(to_toml(config), encoding="utf-8")
    read = load({}, [path], {}).config
    assert read == config
    # Equality alone would let 1 become 1.0.
    one, other = (json.dumps(c.model_dump(), sort_keys=True) for c in (read, config))
    assert one == other
