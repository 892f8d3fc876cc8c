"""Methods of other packages, through the entry point group "lowmem.methods".

    [project.entry-points."lowmem.methods"]
    sign-momentum = "my_package:SPEC"                   # a MethodSpec

Listing what is installed imports nothing; a package is imported when its method is used or shown.
"""

from collections.abc import Iterable
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from lowmem.errors import ConfigError
from lowmem.optim.methods.spec import MethodSpec, sheet_problem

GROUP = "lowmem.methods"


@cache
def installed() -> tuple[EntryPoint, ...]:
    """What the installed packages offer, by name."""
    return tuple(sorted(entry_points(group=GROUP), key=lambda entry: (entry.name, entry.value)))


def offered(built_in: Iterable[str]) -> dict[str, EntryPoint]:
    """The offers that may be used, by name."""
    taken = refused(built_in)
    return {entry.name: entry for entry in installed() if entry not in taken}


def refused(built_in: Iterable[str]) -> dict[EntryPoint, str]:
    """Offers whose name is not theirs alone, and why that is."""
    own = set(built_in)
    names = [entry.name for entry in installed()]
    reasons = {}
    for entry in installed():
        if entry.name in own:
            reasons[entry] = f"{entry.name} is a method of lowmem itself, which stays in use"
        elif names.count(entry.name) > 1:
            reasons[entry] = f"{names.count(entry.name)} packages offer a method {entry.name}"
    return reasons


def package_of(entry: EntryPoint) -> str:
    """Name and version of the package that offers a method."""
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value


@cache
def load(entry: EntryPoint) -> MethodSpec:
    """The method's sheet. ConfigError: its package fails, or offers something else."""
    try:
        sheet = entry.load()
        problem = sheet_problem(sheet)
    except Exception as error:  # whatever a foreign module or builder may raise
        problem = f"{type(error).__name__}: {error}"
    if problem is not None:
        raise ConfigError(
            f"method {entry.name!r} of {package_of(entry)} cannot be used",
            f"{entry.value}: {problem}",
            f"another version of {entry.dist.name if entry.dist else entry.value}, "
            "or another method of `lowmem methods`",
        )
    return sheet
