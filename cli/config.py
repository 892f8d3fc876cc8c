"""`lowmem config`: show, check and describe configurations."""

from pathlib import Path

from lowmem.cli.console import Console
from lowmem.cli.options import Given
from lowmem.cli.settings import loaded
from lowmem.config.load import flatten, load
from lowmem.config.schema import Config, OptimizerConfig
from lowmem.config.toml import to_toml, toml_value


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
    """ConfigError for the first file that is wrong, with everything that is wrong in it."""
    console = Console(quiet=given.quiet)
    for path in files:
        _check_methods(load({}, [path], {}).config.optimizer)
        console.result(f"{path}: ok")


def _check_methods(optimizer: OptimizerConfig) -> None:
    """ConfigError for an unknown method or argument; only the methods know their arguments."""
    from lowmem.optim.methods import build_method

    for section in (optimizer, optimizer.rest):
        if section.method != "auto":
            build_method(section.method, section.options)


def schema(given: Given) -> None:
    """JSON schema on stdout."""
    Console(quiet=given.quiet).json(Config.model_json_schema())
