"""Fuzzed configurations: files, flags, variables, --set, inline models, config.json.

one(random.Random("0/17"), folder)     builds case 17 of seed 0 and takes it as far as possible
                                       without a rehearsal
"""

import json
import random
import tomllib
from pathlib import Path
from typing import Any

from lowmem.cli.config import check_file
from lowmem.config.defaults import settle
from lowmem.config.flags import ENVIRONMENT, FLAGS
from lowmem.config.load import load
from lowmem.config.presets import resolve_model
from lowmem.config.problems import known_keys
from lowmem.config.schema import Config
from lowmem.config.toml import to_toml
from lowmem.planner.candidates import families
from lowmem.planner.hardware import find_card
from tests.fuzz.mutation import HUGE_DIGITS, TEXTS, changed_json, changed_text, odd_value

SEEDS = (
    """model = "llama-60m"
gpu = "24GB"
[optimizer]
method = "galore"
lr = 1e-2
rank = {mlp = 64, attention = 0.25}
gap = 200
betas = [0.9, 0.95]
[optimizer.rest]
method = "adam8bit"
options = {eps = 1e-8}
[train]
tokens = "6.4B"
batch = "131k-tokens"
clip = "off"
""",
    """[model]
hidden_size = 64
intermediate_size = 172
num_hidden_layers = 2
num_attention_heads = 4
rope_scaling = {type = "llama3", factor = 8.0}
[data]
source = "sample"
seq_len = 32
[schedule]
kind = "wsd"
warmup = 0.1
[train]
updates = 10
micro_batch = 2
[checkpoint]
keep = 3
""",
    """[run]
name = "a"
out = "runs"
[evaluate]
every = 10
tokens = "1M"
[data]
skip_bad = true
""",
)
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 400,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0},
    "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"},
    "partial_rotary_factor": 1.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
}
_ODD_KEYS = (
    "optimizer.options.rank",
    "optimizer.gapp",
    "model.x.y",
    "",
    ".",
    "a..b",
    "train.",
    "é",
)
_DATES = ("1979-05-27", "07:32:00", "1979-05-27T07:32:00Z", "0xffffffffffffffffff", "1e400", "-nan")


def one(rng: random.Random, folder: Path) -> None:
    """Build one case and take it through load, the round trip, settle, cards and methods."""
    if rng.random() < 0.15:
        _model_of(rng, folder)
    else:
        _configuration(rng, folder)


def _configuration(rng: random.Random, folder: Path) -> None:
    files, flags, assignments = [], {}, []
    environ: dict[str, str] = {}
    if rng.random() < 0.6:
        files = [folder / "run.toml"]
        files[0].write_text(_text(rng), encoding="utf-8", errors="surrogateescape")
    if rng.random() < 0.3:
        flags = {key: rng.choice(TEXTS) for key in rng.sample(list(FLAGS.values()), 2)}
    if rng.random() < 0.3:
        assignments = [_assignment(rng) for _ in range(rng.randint(1, 3))]
    if rng.random() < 0.2:
        environ = {name: rng.choice(TEXTS) for name in rng.sample(list(ENVIRONMENT), 2)}
        environ |= {"LOWMEM_" + rng.choice(TEXTS): "x"}
    carried_through(load(flags, files, environ, assignments).config, cuda=rng.random() < 0.5)


def carried_through(config: Config, *, cuda: bool) -> None:
    """All that is done with a configuration before its memory is rehearsed."""
    again = Config.model_validate(tomllib.loads(to_toml(config)))
    assert to_toml(again) == to_toml(config)  # as text, because NaN differs from itself
    filled, _ = settle(config, cuda=cuda)
    find_card(config.gpu, "cpu")
    check_file(config)
    families(filled, resolve_model(filled.model, Path.cwd()))


def _text(rng: random.Random) -> str:
    if rng.random() < 0.5:
        return changed_text(rng, rng.choice(SEEDS))
    tables = changed_json(rng, tomllib.loads(rng.choice(SEEDS)))
    lines = []
    for key, value in tables.items() if isinstance(tables, dict) else []:
        lines.append(f"{json.dumps(key)} = {_written(rng, value)}")
    lines += [f"{_key(rng)} = {_written(rng, odd_value(rng))}" for _ in range(rng.randrange(3))]
    return "\n".join(lines)


def _key(rng: random.Random) -> str:
    key = rng.choice([*known_keys(), *_ODD_KEYS])
    return json.dumps(key) if rng.random() < 0.2 else key


def _assignment(rng: random.Random) -> str:
    value = _written(rng, odd_value(rng)) if rng.random() < 0.5 else rng.choice(TEXTS)
    return f"{_key(rng)}{rng.choice(['=', '=', '=', '=', '', ':5='])}{value}"


def _written(rng: random.Random, value: Any) -> str:
    """`value` in TOML, whether a configuration may hold it or not."""
    if rng.random() < 0.02:
        return rng.choice(_DATES)
    match value:
        case None:
            return '""'
        case bool():
            return str(value).lower()
        case int():
            return hex(value) if value > 2**64 else str(max(value, -(2**64)))
        case float():
            return repr(value)
        case str():
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case list():
            return "[" + ", ".join(_written(rng, item) for item in value) + "]"
        case dict():
            items = (f"{json.dumps(k)} = {_written(rng, v)}" for k, v in value.items())
            return "{" + ", ".join(items) + "}"
    raise TypeError(value)


def _model_of(rng: random.Random, folder: Path) -> None:
    """A config.json, changed as text or as values, named as a model."""
    path = folder / "config.json"
    if rng.random() < 0.3:
        text = changed_text(rng, json.dumps(LLAMA))
    else:
        content: Any = LLAMA
        for _ in range(rng.randint(1, 3)):
            content = changed_json(rng, content)
        text = _json(content)
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    config = load({"model": str(path)}, [], {}).config
    carried_through(config, cuda=rng.random() < 0.5)


def _json(value: Any) -> str:
    try:
        return json.dumps(value)
    except ValueError:  # a number with more digits than Python writes
        return json.dumps(LLAMA).replace("64", HUGE_DIGITS, 1)
