"""Which card, and how much of it a run may use.

find_card("24GB", "auto")     the smallest common card of that class, 24,564 MiB
find_card("24GiB", "auto")    exactly that
find_card("RTX 4090", "auto") a name of configs/cards.toml
find_card("auto", "auto")     the CUDA device at hand as measured, else the host's memory
"""

import difflib
import os
import platform
import re
import subprocess
import tomllib
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from lowmem.errors import ConfigError, HardwareError
from lowmem.planner.calibration import Found, find
from lowmem.planner.plan import Card, Rates
from lowmem.planner.workspaces import CONTEXT, HOST_MARGIN, MARGIN, OTHERS
from lowmem.units import GIB, MIB, format_bytes, parse_bytes

_LONGEST_NAME = 60  # letters; the search for neighbours takes quadratic time
_LARGEST = 1024 * GIB  # more is a slip of the unit

_CLASS = re.compile(r"\s*([0-9]{1,5}(?:\.[0-9]+)?)\s*gb\s*", re.IGNORECASE)
_BARE = re.compile(r"\s*[0-9]{1,6}\s*")  # more digits are bytes
_SIZE = re.compile(r"\s*[-+0-9.].*")
_FORMS = "allowed are a class such as 24GB, a size such as 24GiB, a card such as rtx4090, or auto"


@dataclass(frozen=True)
class CardFacts:
    """A card as its maker and driver describe it.

    bandwidth: GB/s. tflops: bf16 products summed in float32, dense. desktop: drives a screen.
    watts: power limit, None where it varies.
    """

    name: str
    total: int  # bytes
    bandwidth: float
    tflops: float
    desktop: bool
    watts: float | None = None

    @property
    def rates(self) -> Rates:
        return Rates(self.name, self.tflops, self.bandwidth, watts=self.watts)


def find_card(gpu: str, device: str) -> Card:
    """The card that `gpu` means; `device` ("auto", "cpu", "cuda") decides what "auto" measures.

    ConfigError: `gpu` is none of the forms above, or too small to hold anything.
    HardwareError: a CUDA device is asked for, and there is none.
    """
    if gpu.strip().lower() == "auto":
        return _host_card() if device == "cpu" or not _has_cuda(device) else _measured_card()
    return _named_card(gpu)


def check_card(gpu: str) -> None:
    """ConfigError unless `gpu` is "auto" or names a card; nothing is measured."""
    if gpu.strip().lower() != "auto":
        _named_card(gpu)


def _named_card(gpu: str) -> Card:
    if match := _CLASS.fullmatch(gpu):
        return _checked(_class_card(float(match[1])), gpu)
    if _BARE.fullmatch(gpu):
        raise _without_unit(gpu.strip())
    if _SIZE.fullmatch(gpu):
        return _checked(_preset(gpu.strip(), _exact_bytes(gpu), desktop=True), gpu)
    facts = card_facts(gpu)
    preset = _preset(facts.name, facts.total, facts.desktop, facts.rates)
    return calibrated(preset, find(lambda c: rates_of_device(c.name, c.total) == facts.rates))


def calibrated(card: Card, found: Found) -> Card:
    """`card` with the constants that were measured on it; bytes of a plan are never scaled."""
    card = replace(card, warnings=tuple(found.warnings))
    kept = found.calibration
    if kept is None:
        return card
    rates = card.rates
    if kept.tflops is not None and kept.bandwidth is not None:
        watts = card.rates.watts if card.rates else None
        rates = Rates(card.name, kept.tflops, kept.bandwidth, measured=True, watts=watts)
    return replace(
        card,
        context=card.context if kept.context is None else kept.context,
        workspace=card.workspace if kept.workspace is None else kept.workspace,
        rates=rates,
        calibration=f"{found.path} of {kept.date}",
    )


def card_facts(name: str) -> CardFacts:
    """The row of configs/cards.toml for a name as a person or the driver writes it.

    ConfigError: no such card, or one that is sold with several sizes of memory.
    """
    known, word = _cards(), _squash(name)
    if word in known:
        return known[word]
    sizes = _sold_as(word)
    if len(sizes) == 1:
        return sizes[0]
    if sizes:
        names = [card.name for card in sizes]
        raise ConfigError(
            f"gpu = {name!r} is sold with several sizes of memory",
            f"known are {', '.join(names)}",
            f'gpu = "{names[0]}"',
        )
    close = difflib.get_close_matches(word[:_LONGEST_NAME], known, n=3)
    near = [known[key].name for key in close]
    fix = f"did you mean {' or '.join(dict.fromkeys(near))}?" if near else 'gpu = "24GB"'
    raise ConfigError(f"gpu = {name!r}: no such card is known", _FORMS, fix)


def _sold_as(word: str) -> list[CardFacts]:
    """Cards whose name is `word` and a size, or `word` less a size that is right; smallest first.

    "rtx3060" is rtx3060-12gb, "rtx409024gb" is rtx4090.
    """
    found: dict[str, CardFacts] = {}
    for key, card in _cards().items():
        bare = _squash(re.sub("-[0-9]+gb$", "", card.name))
        size = re.fullmatch(f"{key}([0-9]{{1,4}})gb", word)
        if word == bare or (size and abs(card.total / GIB - int(size[1])) < 0.1 * int(size[1])):
            found[card.name] = card
    return sorted(found.values(), key=lambda card: card.total)


def _preset(name: str, total: int, desktop: bool, rates: Rates | None = None) -> Card:
    others = OTHERS if desktop else 0
    margin = round(MARGIN * total)
    return Card(name, total, CONTEXT, others, margin, "preset", rates=rates)


def _class_card(gib: float) -> Card:
    row = _table()["classes"].get(f"{gib:g}")
    if row is not None:
        rates = card_facts(row["like"]).rates
        return _preset(f"{gib:g}GB card", row["mib"] * MIB, row["desktop"], rates)
    total = round(gib * 0.999 * 1024) * MIB
    name = f"{gib:g}GB card, taken as {total // MIB} MiB"
    return _preset(name, total, desktop=True)


def _exact_bytes(gpu: str) -> int:
    try:
        return parse_bytes(gpu)
    except ValueError as error:
        raise ConfigError(f"gpu = {gpu!r}: no size and no card", _FORMS, 'gpu = "24GB"') from error


def _checked(card: Card, gpu: str) -> Card:
    """Refuse sizes that no card has."""
    if card.usable_bytes <= 0:
        needed = format_bytes(card.total - card.usable_bytes)
        why = f"a CUDA context, a desktop and a margin alone take {needed}; {_FORMS}"
        raise ConfigError(f"gpu = {gpu!r} is {format_bytes(card.total)}", why, 'gpu = "8GB"')
    if card.total > _LARGEST:
        why = f"no card has more than {format_bytes(_LARGEST)}; {_FORMS}"
        raise ConfigError(f"gpu = {gpu!r} is larger than any card", why, 'gpu = "24GB"')
    return card


def _without_unit(number: str) -> ConfigError:
    """ "24" is meant as 24GB and "4090" as rtx4090, but a wrong guess would cost a run."""
    size = f"{number}GB" if 4 <= int(number) <= _LARGEST // GIB else "24GB"
    fix = f"rtx{number}" if _sold_as(f"rtx{number}") else size
    return ConfigError(f"gpu = {number!r} has no unit", _FORMS, f'gpu = "{fix}"')


def _has_cuda(device: str) -> bool:
    import torch  # here, because `lowmem plan --gpu 24GB` needs none

    if torch.cuda.is_available():
        return True
    if device == "cuda":
        raise HardwareError(
            'train.device = "cuda", but torch finds no CUDA device',
            f"torch {torch.__version__} was built for CUDA {torch.version.cuda}",
            'use train.device = "cpu", or name a card to plan for, e.g. gpu = "24GB"',
        )
    return False


def _measured_card() -> Card:
    """The current CUDA device; asking creates our context, so that is part of what is used."""
    import torch

    smi = SmiReading.of_this_device()
    driver, uuid = smi.driver, smi.uuid
    found = find(lambda c: c.uuid == uuid and c.driver == driver)
    name = torch.cuda.get_device_name()
    free, total = torch.cuda.mem_get_info()
    card = Card(name, total, CONTEXT, 0, round(MARGIN * total), "measured")
    card = calibrated(replace(card, rates=rates_of_device(name, total)), found)
    used = total - free - torch.cuda.memory_reserved()
    # Kernels are loaded when first used, so the context will still grow to about what is planned.
    return replace(card, others=max(used - card.context, 0))


@dataclass(frozen=True)
class SmiReading:
    """What nvidia-smi says of one card. used: MiB by all processes, as bytes."""

    uuid: str
    driver: str
    used: int

    @staticmethod
    def all() -> "list[SmiReading]":
        """Every card, without touching any; empty where nvidia-smi does not answer."""
        asked = ["--query-gpu=uuid,driver_version,memory.used", "--format=csv,noheader,nounits"]
        try:
            told = subprocess.run(
                ["nvidia-smi", *asked], capture_output=True, text=True, timeout=10, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return []
        rows = [[word.strip() for word in line.split(",")] for line in told.stdout.splitlines()]
        return [
            SmiReading(uuid.removeprefix("GPU-"), driver, int(used) * MIB)
            for uuid, driver, used in (row for row in rows if len(row) == 3)
            if used.isdigit()
        ]

    @staticmethod
    def of_this_device(before: "list[SmiReading] | None" = None) -> "SmiReading":
        """That of torch's current device, among `before` or as it is now; empty if there is none.

        Where one answer is not ours (a container without nvidia-smi), driver is "unknown".
        """
        import torch

        uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        rows = SmiReading.all() if before is None else before
        return next((row for row in rows if row.uuid == uuid), SmiReading(uuid, "unknown", 0))


def rates_of_device(name: str, total: int) -> Rates | None:
    """The table's rates for a device as its driver names it, None where it is not in the table."""
    known, word = _cards(), _squash(name)
    if word in known:
        return known[word].rates
    sizes = _sold_as(word)
    return min(sizes, key=lambda card: abs(card.total - total)).rates if sizes else None


def _host_card() -> Card:
    available = available_memory()
    margin = round(HOST_MARGIN * available)
    return Card("host memory", available, 0, 0, margin, "measured", kind="cpu")


def available_memory(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Bytes that programs can still get; all of the memory where the system does not say."""
    if meminfo.exists():
        match = re.search(r"^MemAvailable:\s+([0-9]+) kB$", meminfo.read_text(), re.MULTILINE)
        if match is not None:
            return int(match[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The name of the CPU as it calls itself, with the number of cores that we may use."""
    name = platform.processor() or platform.machine()
    if cpuinfo.exists():
        match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        name = match[1] if match else name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"


@cache
def _table() -> dict[str, Any]:
    path = files("lowmem") / "configs" / "cards.toml"
    return tomllib.loads(path.read_text(encoding="utf-8"))


@cache
def _cards() -> dict[str, CardFacts]:
    """Every name, squashed -> its card."""
    known: dict[str, CardFacts] = {}
    for name, row in _table()["cards"].items():
        facts = CardFacts(
            name,
            row["mib"] * MIB,
            row["bandwidth"],
            row["tflops"],
            row["desktop"],
            row.get("watts"),
        )
        known |= {_squash(word): facts for word in (name, *row.get("also", ()))}
    return known


def _squash(name: str) -> str:
    """ "NVIDIA GeForce RTX 4090 Laptop GPU" and "rtx4090-laptop" become the same word."""
    words = re.findall("[a-z0-9]+", name.lower())
    dropped = {"nvidia", "geforce", "tesla", "quadro", "gpu", "generation"}
    word = "".join(word for word in words if word not in dropped)
    return re.sub("^rtx(?=a[0-9])", "", word)  # the driver says RTX A6000, people A6000
