"""`lowmem export`: a folder that transformers loads."""

import os
from pathlib import Path

from lowmem.cli.console import Console
from lowmem.cli.options import Given
from lowmem.errors import ConfigError
from lowmem.train.checkpoint import export as export_folder
from lowmem.train.checkpoint import model_folder


def export(given: Given, path: Path, out: Path) -> None:
    """Write the weights of `path` to `out`, which must not hold anything yet."""
    console = Console(quiet=given.quiet)
    model_folder(path)
    if os.path.exists(out) and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            f"{out} exists", "an export overwrites nothing", "give the name of a new folder"
        )
    export_folder(path, out)
    console.result(f"{out}")
    console.say(f"  transformers.AutoModelForCausalLM.from_pretrained({str(out)!r})")
