"""Whole runs through the command line, and what happens when something is wrong with them."""

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

from lowmem.cli.main import run
from lowmem.config.load import load

SHAPE = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 64,
}
SETTINGS = [
    *("--method", "galore", "--rank", "4", "--seq-len", "16", "--batch", "4seq"),
    *("--updates", "4", "--save-every", "2"),
]


TOO_LARGE = ["--model", "llama-9m", "--gpu", "850MiB", *SETTINGS]
NO_DATA = ["--data", "nothing", "--tokenizer", "tokenizer"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory with text, a tokenizer, two model shapes and one finished run."""
    folder = tmp_path_factory.mktemp("place")
    text = " ".join(f"word{i % 7} number {i * i % 101}" for i in range(2000))
    (folder / "text.txt").write_text(text)
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([text], vocab_size=300, special_tokens=["</s>"])
    (folder / "tokenizer").mkdir()
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    (folder / "small.json").write_text(json.dumps(SHAPE))
    (folder / "large.json").write_text(json.dumps({**SHAPE, "hidden_size": 24}))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("LOWMEM_HOME", str(folder / "cache"))
        for name in [name for name in os.environ if name.startswith("LOWMEM_")]:
            if name != "LOWMEM_HOME":
                patch.delenv(name)
        assert train("one") == 0
        yield folder


def train(name: str, *more: str) -> int:
    """Train a run of a few updates."""
    where = ["--model", "small.json", "--data", "text.txt", "--tokenizer", "tokenizer"]
    return run(["train", *where, *SETTINGS, "--device", "cpu", "--name", name, *more])


def fingerprint(folder: Path) -> dict[str, str]:
    """The content of every file in a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def refused(capsys: pytest.CaptureFixture[str], code: int, arguments: list[str]) -> str:
    """Run a command that must fail with `code` in three parts, and change nothing."""
    before = fingerprint(Path("runs"))
    assert run(arguments) == code
    err = capsys.readouterr().err
    block = err[err.rindex("error: ") :]
    assert f"(exit {code})" in block.splitlines()[0]
    assert "\n  fix: " in block
    assert "Traceback" not in err
    assert fingerprint(Path("runs")) == before
    return block


def result(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """The JSON on stdout of a command that works."""
    capsys.readouterr()
    assert run([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_run_leaves_a_folder_and_a_summary(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("two", "--json") == 0
    out, err = capsys.readouterr()
    summary = json.loads(out)
    assert summary["folder"] == str(Path("runs", "two"))
    assert summary["update"] == 4
    assert summary["tokens"] == 4 * 4 * 16
    metrics = Path("runs/two/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["update"] for line in metrics if "lr" in line] == [0, 1, 2, 3]
    assert "Choice  galore rank 4" in err
    assert "4 updates done" in err


def test_a_name_that_is_taken_is_told_before_planning(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert train("one") == 2
    err = capsys.readouterr().err
    assert "the run folder runs/one exists" in err
    assert "Choice" not in err
    assert train("one", "--dry-run") == 0  # makes no folder


def test_the_printed_command_repeats_the_run(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert train("again", "--dry-run") == 0
    err = capsys.readouterr().err
    command = err.partition("explicitly:\n  lowmem ")[2].splitlines()[0].split()
    assert run(command) == 0
    capsys.readouterr()
    first, again = (
        load({}, [Path("runs", name, "config.toml")], {}).config for name in ("one", "again")
    )
    assert again.model_copy(update={"run": first.run}) == first
    metrics = [
        [json.loads(line) for line in Path("runs", name, "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "again")
    ]
    losses = [[m["loss"] for m in lines if "loss" in m] for lines in metrics]
    assert losses[0] == losses[1]


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = fingerprint(place)
    assert train("dry", "--dry-run") == 0
    assert "Choice  galore rank 4" in capsys.readouterr().out
    assert result(
        capsys, "train", "--model", "small.json", "--tokenizer", "tokenizer", "--dry-run"
    )["fits"]
    assert fingerprint(place) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a card")
def test_a_dry_run_for_a_named_card_plans_for_it_where_there_is_none(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What trains here all the same is told, and `--device cpu` plans that."""
    where = ["train", "--model", "small.json", "--tokenizer", "tokenizer", "--gpu", "12GB", "-n"]
    capsys.readouterr()
    assert run(where) == 0
    out, err = capsys.readouterr()
    assert "bf16 weights" in out
    assert "there is no CUDA device here" in err
    assert "--device cuda" in err
    assert run([*where, "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert "fp32 weights" in out
    assert "no CUDA device" not in err


def test_run_checkpoint_and_export_evaluate_alike(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["export", "runs/one", "hf"]) == 0
    paths = ("runs/one", "runs/one/checkpoints/step-000004", "hf")
    results = [result(capsys, "eval", path) for path in paths]
    assert len({r["loss"] for r in results}) == 1
    assert len({r["tokens"] for r in results}) == 1
    assert results[0]["perplexity"] == pytest.approx(2.718281828459045 ** results[0]["loss"])
    fewer = result(capsys, "eval", "runs/one", "--eval-tokens", "40")
    assert fewer["tokens"] == 40
    Path("other.txt").write_text("nothing like the rest; " * 500)
    assert result(capsys, "eval", "hf", "--data", "other.txt")["loss"] > results[0]["loss"]
    refused(capsys, 2, ["export", "runs/one", "hf"])


def test_a_sample_begins_with_the_prompt_and_repeats_with_its_seed(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sample", "runs/one", "--prompt", "word1", "--tokens", "5", "--device", "cpu"]
    texts = [result(capsys, *command, "--seed", seed)["text"] for seed in ("1", "1", "2")]
    assert texts[0].startswith("word1")
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_a_run_in_codes_goes_from_the_plan_to_the_export(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    assert train("codes", "--weights", "int8", "--json") == 0
    captured = capsys.readouterr()
    assert "int8 weights" in captured.err
    assert json.loads(captured.out)["update"] == 4
    saved = Path("runs/codes/checkpoints/step-000004/model")
    assert {path.suffix for path in saved.iterdir()} == {".json", ".safetensors"}
    assert not (saved / "model.safetensors").exists()
    assert run(["export", "runs/codes", "floats"]) == 0
    assert not list(Path("floats").glob("*int8*"))
    results = [result(capsys, "eval", path) for path in ("runs/codes", "floats")]
    assert results[0]["loss"] == results[1]["loss"]
    how = ["--prompt", "word1", "--tokens", "8", "--device", "cpu"]
    texts = [result(capsys, "sample", path, *how)["text"] for path in ("runs/codes", "floats")]
    assert texts[0] == texts[1]
    _, report = AutoModelForCausalLM.from_pretrained("floats", output_loading_info=True)
    assert not any(report.values())


def test_methods_that_need_float_weights_refuse_codes(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--model", "small.json", "--data", "text.txt", "--tokenizer", "tokenizer"]
    how = ["--method", "adahessian", "--weights", "int8", "--device", "cpu"]
    assert 'train.weights = "int8"' in refused(capsys, 2, ["train", *where, *how])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--seed", str(2**63)], "is too large"),
        (["--tokens", "9" * 30], "allowed: 1 to 1000000"),
        (["--tokens", "64"], "the model has 64 positions"),
        (["--temperature", "1e-30"], "draws no token"),
        (["--temperature", "1e9"], "draws no token"),
        (["--prompt", "a\udce4"], "no UTF-8"),
    ],
)
@pytest.mark.usefixtures("place")
def test_what_no_text_can_be_drawn_with_is_refused(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told in refused(capsys, 2, ["sample", "runs/one", "--prompt", "a", *arguments])


@pytest.mark.parametrize(
    ("file", "content"), [("model.safetensors", b"\xff" * 99), ("tokenizer.json", b"[1, 2]")]
)
def test_a_folder_that_transformers_cannot_read_is_told(
    file: str, content: bytes, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "hf"
    shutil.copytree("runs/one/checkpoints/step-000004/model", folder)
    (folder / file).write_bytes(content)
    how = ["--prompt", "word1", "--tokens", "2", "--device", "cpu"]
    assert "cannot be read by transformers" in refused(capsys, 5, ["sample", str(folder), *how])


@pytest.mark.usefixtures("place")
def test_an_export_to_where_nothing_can_be_written_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    block = refused(capsys, 2, ["export", "runs/one", "text.txt/below/a/file"])
    assert "text.txt/below/a/file cannot be written" in block


def test_a_run_whose_text_was_moved_says_how_it_goes_on(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`resume` has no --data, so "check --data" would help nobody."""
    folder = tmp_path / "moved"
    shutil.copytree("runs/one", folder)
    config = folder / "config.toml"
    right = config.read_text()
    config.write_text(right.replace(str(place / "text.txt"), str(tmp_path / "new.txt")))
    block = " ".join(refused(capsys, 4, ["resume", str(folder)]).split())
    assert "new.txt does not exist" in block
    assert "config.toml: data.source" in block
    assert "--data" not in block
    shutil.copy(place / "text.txt", tmp_path / "new.txt")
    assert run(["resume", str(folder / "checkpoints" / "step-000002")]) == 0


def test_an_export_is_evaluated_in_the_batches_of_its_run(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On them depends what the papers' evaluation prints."""
    folder = place / "documents"
    folder.mkdir()
    for name, count in (("train", 40), ("validation", 17)):
        lines = [json.dumps({"text": "word1 number " * (2 + i % 5)}) for i in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    how = ["--data", "documents", "--protocol", "galore"]
    batches = ["--set", "evaluate.batch=3", "--set", "evaluate.gpus=2"]
    assert train("papers", *how, *batches) == 0
    assert run(["export", "runs/papers", "papers-hf"]) == 0
    capsys.readouterr()
    told = []
    for path in ("runs/papers", "papers-hf"):
        assert run(["eval", path, "--json"]) == 0
        told.append(json.loads(capsys.readouterr().out))
    assert told[0]["steps"] == told[1]["steps"] == 3  # 6, 6 and 5 documents
    assert told[0]["published_loss"] == told[1]["published_loss"]


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"data": 3}',
        '{"data": {"seq_len": "x"}}',
        '{"data": {}, "evaluate": {"batch": 0}}',
    ],
)
def test_an_evaluation_tells_what_is_wrong_with_lowmem_json(
    content: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "hf"
    shutil.copytree("runs/one/checkpoints/step-000004/model", folder)
    (folder / "lowmem.json").write_text(content)
    assert "lowmem.json cannot be read" in refused(capsys, 5, ["eval", str(folder)])


def test_an_unforeseen_error_leaves_its_traceback_with_the_run(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lowmem.train.loop.gather", None)
    assert train("broken") == 1
    assert "bug: TypeError" in capsys.readouterr().err
    (log,) = Path("runs/broken/log").iterdir()
    assert "Traceback" in log.read_text()


def test_an_existing_run_is_never_overwritten(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--model", "small.json", "--data", "text.txt", "--tokenizer", "tokenizer"]
    block = refused(capsys, 2, ["train", *where, *SETTINGS, "--name", "one"])
    assert "lowmem resume runs/one" in block


def test_a_flipped_byte_stops_resume_and_names_the_file(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree("runs/one", "runs/flipped")
    weights = Path("runs/flipped/checkpoints/step-000004/model/model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    block = refused(capsys, 5, ["resume", "runs/flipped"])
    assert "model.safetensors" in block
    assert "lowmem resume runs/flipped/checkpoints/step-000002" in block


def test_a_checkpoint_of_another_model_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("wide", "--model", "large.json") == 0
    shutil.copytree("runs/one", "runs/mixed")
    shutil.rmtree("runs/mixed/checkpoints")
    shutil.copytree("runs/wide/checkpoints", "runs/mixed/checkpoints")
    capsys.readouterr()
    refused(capsys, 5, ["resume", "runs/mixed"])


def test_a_finished_run_can_be_resumed_and_stays_as_it_is(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree("runs/one", "runs/done")
    weights = fingerprint(Path("runs/done/checkpoints"))
    assert run(["resume", "runs/done"]) == 0
    assert "all 4 updates are done" in capsys.readouterr().err
    assert fingerprint(Path("runs/done/checkpoints")) == weights


@pytest.mark.parametrize(
    ("code", "arguments", "told"),
    [
        (2, ["train", "--set", "optimiser.rank=3"], "did you mean `optimizer.rank`?"),
        (2, ["train", "--set", "optimizer.gapp=3", "--method", "galore"], "`gap`"),
        (2, ["train", "--method", "galor"], "did you mean `galore`?"),
        (2, ["train", "--rank", "0"], "0 must be a whole number of at least 1"),
        (2, ["train", "--batch", "many"], "write it like 32seq"),
        (2, ["train", "--updates", "3", "--tokens", "5"], "give one of updates, tokens and hours"),
        (2, ["train", "--config", "nothing.toml"], "this file does not exist"),
        (2, ["train", "--model", "nothing/config.json"], "neither a preset nor a file"),
        (2, ["train", "--model", "llama-60mm"], "did you mean `llama-60m`?"),
        (2, ["plan", "--gpu", "24GX"], "24GX"),
        (3, ["plan", *TOO_LARGE], "largest parts: "),
        (3, ["train", *TOO_LARGE], "largest parts: "),
        (4, ["train", "--model", "small.json", *SETTINGS, *NO_DATA], "nothing"),
        (4, ["data", "info", "nothing"], "nothing"),
        (4, ["data", "prepare", *NO_DATA[1:]], "nothing"),
        (2, ["data", "prepare", "text.txt", "--max-tokens", "some"], "--max-tokens some"),
        (2, ["data", "prepare", "text.txt", "--workers", "2"], "--workers 2 without --out"),
        (5, ["resume", "nothing"], "nothing"),
        (5, ["eval", "nothing"], "nothing"),
        (5, ["sample", "nothing"], "nothing"),
        (5, ["export", "nothing", "x"], "nothing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_told_in_three_parts_and_changes_nothing(
    place: Path,
    capsys: pytest.CaptureFixture[str],
    code: int,
    arguments: list[str],
    told: str,
) -> None:
    if arguments[0] == "train" and "--data" not in arguments:
        arguments = [*arguments, "--data", "text.txt", "--tokenizer", "tokenizer"]
    assert told in refused(capsys, code, arguments)


def test_c4_without_network_says_what_helps(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOWMEM_OFFLINE", "1")
    block = refused(capsys, 4, ["train", "--model", "small.json", *SETTINGS, "--data", "c4"])
    assert "lowmem data prepare" in block
    assert "--data sample" in block


def test_a_damaged_corpus_is_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["data", "prepare", "text.txt", "--tokenizer", "tokenizer", "--out", "corpus"]
    assert run(command) == 0
    assert run(["data", "verify", "corpus"]) == 0
    assert result(capsys, "data", "info", "corpus")["splits"]["train"]["tokens"] > 0
    shard = Path("corpus/train-00000.bin")
    shard.write_bytes(bytes([shard.read_bytes()[0] ^ 1]) + shard.read_bytes()[1:])
    assert "train-00000.bin" in refused(capsys, 4, ["data", "verify", "corpus"])
    shard.write_bytes(shard.read_bytes()[:-2])
    assert "train-00000.bin" in refused(capsys, 4, ["data", "info", "corpus"])


def test_lines_that_were_skipped_are_told(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.dumps({"text": f"word3 number {i} word5"}) for i in range(300)]
    Path("lines.jsonl").write_text("\n".join(["{", *lines]))
    told = "1 line was skipped, the first: .*lines.jsonl:1: is not JSON"
    capsys.readouterr()
    assert train("skipping", "--data", "lines.jsonl", "--skip-bad") == 0
    assert re.search(f"\nwarning: {told}", capsys.readouterr().err)
    out = ["--tokenizer", "tokenizer", "--out", "skipped", "--skip-bad"]
    assert run(["data", "prepare", "lines.jsonl", *out]) == 0
    assert re.search(told, capsys.readouterr().out)


def test_a_folder_called_sample_is_not_taken_for_the_corpus(place: Path) -> None:
    """`sample`, `c4` and `auto` are words; ./sample is a folder."""
    from lowmem.config.schema import Config
    from lowmem.train.run import Run

    (place / "sample").mkdir()
    (place / "auto").write_text("")
    config = Config.model_validate({"model": "llama-9m", "run": {"name": "words"}})
    opened = Run.open(Run.create(config, None).folder).config.data
    assert (opened.source, opened.tokenizer) == ("sample", "auto")


def test_an_export_knows_its_data_from_anywhere(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (place / "content.jsonl").write_text(
        "".join(json.dumps({"content": f"line {i} of the text"}) + "\n" for i in range(400))
    )
    where = ["--model", "small.json", "--data", "content.jsonl", "--tokenizer", "tokenizer"]
    key = ["--set", "data.text_key=content", "--device", "cpu", "--name", "keyed"]
    assert run(["train", *where, *SETTINGS, *key]) == 0
    assert run(["export", "runs/keyed", str(tmp_path / "out")]) == 0
    expected = result(capsys, "eval", "runs/keyed")
    monkeypatch.chdir(tmp_path)
    assert result(capsys, "eval", "out")["loss"] == expected["loss"]


@pytest.mark.parametrize("command", ["eval", "sample"])
def test_damaged_weights_are_not_used(
    command: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree("runs/one", tmp_path / "one")
    weights = next((tmp_path / "one").glob("checkpoints/*4/model/model.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert "is damaged" in refused(capsys, 5, [command, str(tmp_path / "one")])


def test_too_little_text_leaves_no_run_folder(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "short.txt").write_text("word1")
    where = ["--model", "small.json", "--data", "short.txt", "--tokenizer", "tokenizer"]
    refused(capsys, 4, ["train", *where, *SETTINGS, "--device", "cpu", "--name", "short"])
    assert not Path("runs/short").exists()


def test_a_signal_while_a_resumed_run_loads_ends_it_resumable(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import signal

    def interrupted(*arguments: object, **options: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("lowmem.cli.resume.corpus_of", interrupted)
    assert run(["resume", "runs/one"]) == 75
    assert "stopped by SIGTERM; no update was under way" in capsys.readouterr().err


VERIFY = ["plan", "--verify", "--model", "small.json", "--device", "cpu", *SETTINGS]


@pytest.mark.usefixtures("place")
def test_a_plan_is_verified_and_kept(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*VERIFY, "--json"]) == 0
    verification = json.loads(capsys.readouterr().out)["verification"]
    assert verification["right"] is True
    whole = [row for row in verification["rows"] if row["segment"] == "whole run"]
    assert [(row["what"], row["planned"] == row["measured"]) for row in whole] == [
        ("tensors", True)
    ]
    kept = json.loads(Path(verification["file"]).read_text())
    assert kept["rows"][-1]["measured"] == whole[0]["measured"]
    assert run(VERIFY) == 0
    told = capsys.readouterr().out
    assert "reserved and device were not checked" in told
    assert "Verdict: the plan is right" in told


@pytest.mark.usefixtures("place")
def test_a_plan_that_is_wrong_here_exits_with_8(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowmem.train import verify

    measured = verify._measured

    def more(*arguments: Any) -> Any:
        found = measured(*arguments)
        return dataclasses.replace(found, tables=found.tables + 2**20)

    monkeypatch.setattr(verify, "_measured", more)
    assert run(VERIFY) == 8
    told = capsys.readouterr()
    assert "wrong" in told.out
    assert "whole run, tensors" in told.err


@pytest.mark.usefixtures("place")
@pytest.mark.skipif(torch.cuda.is_available(), reason="tells what happens without a card")
def test_verifying_on_a_card_that_is_not_there_exits_with_8(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["plan", "--verify", "--model", "small.json", "--device", "cuda", *SETTINGS]) == 8
    assert "PyTorch sees no CUDA device" in capsys.readouterr().err
