"""`lowmem plan`: what fits, and why the rest does not."""

from lowmem.cli.console import Console
from lowmem.cli.options import Given
from lowmem.cli.settings import loaded, planned, require_fit


def plan(given: Given, *, as_json: bool) -> None:
    """Print the plan; PlanError (exit 3) after it when nothing fits."""
    console = Console(quiet=given.quiet)
    config = loaded(given, console).config
    result = planned(config, for_this_machine=False)
    if as_json:
        console.json(result.to_json())
    else:
        console.plan(result, as_result=True)
    require_fit(result)
