"""`lowmem config`: show, check and describe configurations."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from textwrap import indent

from lowmem.cli.console import Console
from lowmem.cli.options import Given
from lowmem.cli.settings import loaded
from lowmem.config.load import examine, flatten
from lowmem.config.presets import resolve_model
from lowmem.config.schema import Config
from lowmem.config.toml import to_toml, toml_value
from lowmem.errors import ConfigError, LowMemError


def show(given: Given, *, origin: bool, as_json: bool) -> None:
    """The resolved configuration: TOML, a table with origins, or JSON."""
    console = Console(quiet=given.quiet)
    result = loaded(given, console)
    if as_json:
        values = result.config.model_dump(mode="json")
        record = {"schema_version": 1, "config": values}
        console.json({**record, "origins": result.origins} if origin else record)
    elif origin:
        rows = [
            [key, "" if value is None else toml_value(value), result.origins[key]]
            for key, value in flatten(result.config.model_dump())
        ]
        console.table(["key", "value", "origin"], rows)
    else:
        console.result(to_toml(result.config).rstrip())


def check(given: Given, files: list[Path]) -> None:
    """Say of each file whether it is right; ConfigError with all that is wrong in any of them."""
    console = Console(quiet=given.quiet)
    wrong: list[tuple[Path, LowMemError]] = []
    for path in files:
        error = _wrong_in(path)
        wrong += [] if error is None else [(path, error)]
        console.result(f"{path}: {'ok' if error is None else 'wrong'}")
    if len(files) == 1 and wrong:
        raise wrong[0][1]
    if wrong:
        raise _together(
            f"{len(wrong)} of {len(files)} files are wrong",
            [(f"{path}: {error.what}", error) for path, error in wrong],
        )


def _wrong_in(path: Path) -> LowMemError | None:
    """All that is wrong in a file, names that stand beside wrong values included."""
    config, error = examine(path)
    try:
        check_file(config)
    except LowMemError as unknown:
        if error is None:
            return unknown
        both = [(each.what, each) for each in (error, unknown)]
        return _together(f"{path} is wrong in values and in names", both)
    return error


def _together(what: str, wrong: Sequence[tuple[str, LowMemError]]) -> ConfigError:
    """One error that says all; each has its own name, and every fix stands once."""
    told = [f"{name}\n{indent(error.why, '  ')}".rstrip() for name, error in wrong]
    fixes = dict.fromkeys(error.fix for _, error in wrong if error.fix)
    return ConfigError(what, "\n".join(told), "\n".join(fixes))


def check_file(config: Config) -> None:
    """ConfigError for unknown models, cards and methods, and arguments that a method lacks: all."""
    from lowmem.optim.methods import build_method
    from lowmem.planner.hardware import check_card

    checks: list[Callable[[], object]] = [partial(check_card, config.gpu)]
    if config.model != "auto":
        checks.insert(0, partial(resolve_model, config.model, Path.cwd()))
    for name, section in (
        ("optimizer", config.optimizer),
        ("optimizer.rest", config.optimizer.rest),
    ):
        if section.method != "auto":
            checks.append(partial(build_method, section.method, section.options, name))
    wrong = []
    for each in checks:
        try:
            each()
        except LowMemError as error:
            wrong.append(error)
    if len(wrong) == 1:
        raise wrong[0]
    if wrong:
        raise _together(f"{len(wrong)} settings are wrong", [(e.what, e) for e in wrong])


def schema(given: Given) -> None:
    """JSON schema on stdout."""
    Console(quiet=given.quiet).json(Config.model_json_schema())
