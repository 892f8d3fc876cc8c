"""The recorded trajectories are followed; so does the command that users run."""

import shutil
from pathlib import Path

import follow_oracle  # type: ignore[import-not-found]  # a script, on pytest's path
import pytest

ORACLES = sorted((Path(__file__).parent / "oracles").glob("*.safetensors"))


@pytest.mark.parametrize("path", ORACLES, ids=lambda path: path.stem)
def test_recorded_trajectory_is_followed(path: Path) -> None:
    outcome = follow_oracle.follow(path)
    expected = "info" if path.stem == "eight_bit_adamw__cpu_lut_nowd" else "ok"
    assert outcome.verdict == expected, outcome.line(0)


def test_a_wrong_learning_rate_is_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    oracle = follow_oracle.read_oracle(next(p for p in ORACLES if p.stem == "galore__sched_wd"))
    oracle.about["lr"][3] *= 1.01
    assert follow_oracle.FOLLOWERS["galore"](oracle).verdict.startswith("FAIL")


def test_unknown_methods_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import save_file
    from torch import zeros

    path = tmp_path / "unheard__of.safetensors"
    save_file({"x": zeros(1)}, path, metadata={"hyperparameters": '{"method": "unheard"}'})
    assert follow_oracle.main([str(path)]) == 1
    assert "method 'unheard' is unknown; known: galore" in capsys.readouterr().err


def test_a_file_without_metadata_fails(tmp_path: Path) -> None:
    damaged = tmp_path / "x.safetensors"
    shutil.copy(ORACLES[0], damaged)
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(Exception, match=r"(?i)header|metadata|incomplete"):
        follow_oracle.follow(damaged)
