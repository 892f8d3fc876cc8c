"""The package as it is installed: links in the source, ordinary folders in the wheel."""

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINKED = ("cli", "kernels", "configs")
SOURCES = ("lowmem", *LINKED, "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """A wheel of a copy of the sources, so that nothing is written into the checkout."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, copy / name)
    # torch brings setuptools, so the build needs neither the network nor an environment of its own.
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation"]
    options = ["--no-index", "--quiet", "--disable-pip-version-check", "--wheel-dir", str(out)]
    subprocess.run([*command, *options], cwd=copy, check=True, capture_output=True)
    with zipfile.ZipFile(next(out.glob("*.whl"))) as archive:
        yield archive


def test_the_linked_folders_are_links_without_init() -> None:
    for name in LINKED:
        assert (ROOT / "lowmem" / name).is_symlink(), f"ln -s ../{name} lowmem/{name}"
        assert (ROOT / "lowmem" / name).readlink() == Path("..") / name
        # An __init__.py would shadow the published package `kernels`, which transformers imports.
        assert not list((ROOT / name).rglob("__init__.py"))


def test_the_wheel_holds_commands_kernels_and_presets(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    for folder, pattern in (
        ("cli", "*.py"),
        ("kernels", "*.py"),
        ("kernels", "*.cpp"),
        ("kernels", "*.h"),
        ("configs", "**/*.toml"),
    ):
        expected = {f"lowmem/{path.relative_to(ROOT)}" for path in (ROOT / folder).glob(pattern)}
        assert expected
        assert expected <= names
    assert "lowmem/py.typed" in names


def test_the_wheel_adds_nothing_else_at_the_top(wheel: zipfile.ZipFile) -> None:
    top = {name.partition("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"lowmem"}


def test_the_wheel_installs_the_command(wheel: zipfile.ZipFile) -> None:
    (name,) = (n for n in wheel.namelist() if n.endswith("entry_points.txt"))
    assert "lowmem = lowmem.cli.main:main" in wheel.read(name).decode()


def test_the_unpacked_wheel_runs_without_the_checkout(
    wheel: zipfile.ZipFile, tmp_path: Path
) -> None:
    wheel.extractall(tmp_path)
    code = (
        "from lowmem.cli.main import run; from lowmem.config.presets import preset_names\n"
        "assert run(['--version']) == 0 and 'llama-7b' in preset_names()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)


def test_a_published_package_kernels_wins_over_our_folder(tmp_path: Path) -> None:
    published = tmp_path / "kernels"
    published.mkdir()
    (published / "__init__.py").write_text("published = True\n")
    # The checkout comes first on the path, as with `python -m pytest`.
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path)!r}]\n"
        "import kernels; assert kernels.published\n"
        "import lowmem.kernels.blockwise"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
