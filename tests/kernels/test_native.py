"""Compiling the C++: when there is a compiler, when there is none, and when it fails."""

import stat
from pathlib import Path

import pytest
import torch

from lowmem.kernels import native
from lowmem.kernels.blockwise import quantize
from lowmem.kernels.dispatch import forced


@pytest.fixture(autouse=True)
def _anew() -> None:
    native.library.cache_clear()


def test_no_compiler_means_the_reference(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert native.compiler() is None
    x = torch.linspace(-1, 1, 700)
    with forced("auto"):
        found = quantize(x, True)
    with forced("reference"):
        assert all(map(torch.equal, found, quantize(x, True)))


def test_a_compiler_that_fails_is_told_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "broken-cc"
    broken.write_text("#!/bin/sh\necho no license >&2\nexit 3\n")
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.warns(UserWarning, match="no license"):
        assert native.library() is None
    assert native.library() is None  # remembered: warnings are errors here no more


def test_nothing_stays_on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if native.compiler() is None:
        pytest.skip("needs a C++ compiler")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert native.library() is not None
    assert list(tmp_path.iterdir()) == []
