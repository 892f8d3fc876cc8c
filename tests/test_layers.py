"""Who may import whom, read from the source: a violation names its line."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lowmem"

FOUNDATION = {
    "errors",
    "units",
    "naming",
    "phases",
    "private",
    "tensorfile",
    "host_memory",
    "transfers",
}
_PARTS = {*FOUNDATION, "kernels", "config.schema", "config.recompute"}
_ALL = {*FOUNDATION, "kernels", "config", "model", "optim", "data", "planner", "train"}
MAY_IMPORT = {
    **dict.fromkeys(FOUNDATION, FOUNDATION),
    "kernels": FOUNDATION,
    "config": {"errors", "units"},
    "model": {*_PARTS, "config.huggingface"},
    "optim": _PARTS,
    "data": _PARTS,
    # The rehearsal counts what ops allocate inside, which the kernels declare.
    # Calibrations lie in the cache.
    "planner": {*FOUNDATION, "kernels", "model", "optim", "config", "data.cache"},
    "train": {*FOUNDATION, "kernels", "config", "model", "optim", "data", "planner"},
    # What a run has left in its folder, without torch.
    "analysis": {
        *FOUNDATION,
        "config",
        "data.cache",
        "planner.plan",
        "planner.quality",
        "train.events",
        "train.lock",
        "train.run",
    },
    "cli": {*_ALL, "analysis"},
    "__main__": {"cli"},
}
CONSOLE_ONLY = {"rich", "typer"}
ONLY_IN_FUNCTIONS = {
    "transformers",
    "datasets",
    "bitsandbytes",
    "pyarrow",
    "huggingface_hub",
    "flash_attn",
    "triton",
    "matplotlib",
    "tensorboard",
    "wandb",
    "trackio",
}
REFERENCES = {
    "galore_torch",
    "apollo_torch",
    "fira",
    "pytorch_optimizer",
    "q_galore_torch",
    "liger_kernel",
}
NOT_AT_RUN_TIME = {*REFERENCES, "pytest", "hypothesis"}


@dataclass(frozen=True)
class Import:
    """One imported module. importer: dotted, without "lowmem."; deferred: inside a function."""

    importer: str
    module: str
    place: str
    deferred: bool

    @property
    def inner(self) -> str | None:
        """The module without "lowmem.", None for a library."""
        head, _, rest = self.module.partition(".")
        return rest if head == "lowmem" else None

    def belongs_to(self, part: str) -> bool:
        inner = self.inner or ""
        return inner == part or inner.startswith(part + ".")


def imports_of(path: Path) -> Iterator[Import]:
    """Every import statement of a file, `from lowmem.a import b` as lowmem.a.b if that is one."""
    importer = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        place = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        for module in _modules(node):
            yield Import(importer, module, place, node in inside)


def _modules(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    assert node.level == 0, "relative imports hide which part is meant"
    names = [f"{node.module}.{alias.name}" for alias in node.names]
    return [n if _is_module(n) else str(node.module) for n in names]


def _is_module(name: str) -> bool:
    head, _, rest = name.partition(".")
    path = PACKAGE / rest.replace(".", "/")
    return head == "lowmem" and (path.is_dir() or path.with_suffix(".py").is_file())


SOURCES = sorted(
    Path(folder, name)
    for folder, _, names in os.walk(PACKAGE, followlinks=True)
    for name in names
    if name.endswith(".py")
)
IMPORTS = [found for path in SOURCES for found in imports_of(path)]


def test_the_linked_folders_are_read_too() -> None:
    parts = {found.importer.partition(".")[0] for found in IMPORTS}
    assert {"cli", "kernels", "config", "optim", "errors"} <= parts


def test_every_part_has_a_rule() -> None:
    parts = {found.importer.partition(".")[0] for found in IMPORTS} - {"__init__", ""}
    assert parts <= set(MAY_IMPORT)


def test_parts_import_only_what_stands_below_them() -> None:
    wrong = []
    for found in IMPORTS:
        part = found.importer.partition(".")[0]
        inside = found.belongs_to(part)
        allowed = any(found.belongs_to(name) for name in MAY_IMPORT[part])
        root = found.module == "lowmem"  # the version
        if found.inner is not None and not (inside or allowed or root):
            wrong.append(f"{found.place}: {part} must not import {found.module}")
    assert wrong == []


def test_only_the_command_line_knows_rich_and_typer() -> None:
    wrong = [
        f"{found.place}: {found.module}"
        for found in IMPORTS
        if found.module.partition(".")[0] in CONSOLE_ONLY and not found.importer.startswith("cli.")
    ]
    assert wrong == []


def test_only_the_console_knows_rich() -> None:
    users = {found.importer for found in IMPORTS if found.module.partition(".")[0] == "rich"}
    assert users == {"cli.console"}


def test_heavy_and_optional_libraries_are_imported_inside_functions() -> None:
    wrong = [
        f"{found.place}: {found.module} at the top of the module"
        for found in IMPORTS
        if found.module.partition(".")[0] in ONLY_IN_FUNCTIONS
        and not found.deferred
        # A kernel's Triton file is itself imported inside a function, on a GPU.
        and not found.importer.endswith("_triton")
    ]
    assert wrong == []


def test_what_only_tests_need_is_imported_by_tests_only() -> None:
    wrong = [
        f"{found.place}: {found.module}"
        for found in IMPORTS
        if found.module.partition(".")[0] in NOT_AT_RUN_TIME
        # `lowmem bench` times those that are installed beside ours.
        and not (found.importer in ("cli.bench_peers", "cli.bench_liger") and found.deferred)
    ]
    assert wrong == []


def test_only_the_command_line_prints() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in SOURCES
        if path.relative_to(PACKAGE).parts[0] != "cli"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert wrong == []


@pytest.mark.parametrize(
    "module",
    [
        "lowmem",
        *(
            f"lowmem.{name}"
            for name in sorted(FOUNDATION - {"tensorfile", "host_memory", "transfers"})
        ),
        "lowmem.config.load",
        "lowmem.config.presets",
        "lowmem.planner.plan",
        "lowmem.train.events",
        "lowmem.train.run",
        *(f"lowmem.analysis.{path.stem}" for path in sorted((PACKAGE / "analysis").glob("[a-z]*"))),
        "lowmem.cli.main",
    ],
)
def test_what_help_and_configuration_need_comes_without_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
