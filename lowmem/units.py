"""Quantities as people write them ("24GB", "1.1B", "131k-tokens"), read and written.

GB means 10^9 bytes and GiB 2^30, except for graphics cards, whose "24GB" is a class of card:
see `planner/hardware.py`.
"""

import math
import re

_NUMBER = re.compile(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)\s*")
_BATCH = re.compile(r"(.*[^\s-])[\s-]*(seqs?|sequences?|tokens?)")
_LONGEST_INT = 1024  # bits: what a float can hold
_BYTES = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_BYTES |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_SECONDS = {"s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600, "d": 86400, "days": 86400}
_COUNTS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}

KIB, MIB, GIB = 2**10, 2**20, 2**30
_MONTH = 365.25 * 86400 / 12  # seconds


def _parse(text: str | int | float, factors: dict[str, int], kind: str, example: str) -> int:
    if isinstance(text, int) and text.bit_length() > _LONGEST_INT:  # str() may refuse it
        raise ValueError(f"a number of {text.bit_length()} bits is too large for a {kind}")
    match = _NUMBER.fullmatch(str(text))
    if match is None or match[2].lower() not in factors:
        raise ValueError(f"{text!r} is no {kind}; write it like {example}")
    value = float(match[1].replace("_", "")) * factors[match[2].lower()]
    if not math.isfinite(value):
        raise ValueError(f"{text!r} is too large for a {kind}")
    if factors[match[2].lower()] == 1 and value != round(value):
        raise ValueError(f"{text!r} is no whole {kind}; write it like {example}")
    return round(value)


def parse_bytes(text: str | int) -> int:
    """Bytes of "24GB" (10^9), "24GiB" (2^30), "512MiB" or a plain number."""
    return _parse(text, _BYTES, "number of bytes", "24GB, 24GiB or 512MiB")


def parse_count(text: str | int | float) -> int:
    """A count such as "1.1B", "131k", "20_000" or "1e6"; B and G are both 10^9."""
    return _parse(text, _COUNTS, "count", "1.1B, 131k or 20000")


def parse_batch(text: str) -> tuple[int, str]:
    """(number, "seq" or "tokens") of "32seq" or "131k-tokens"."""
    match = _BATCH.fullmatch(str(text).strip())
    if match is None:
        raise ValueError(f"{text!r} is no batch; write it like 32seq or 131k-tokens")
    number = parse_count(match[1])
    if number < 1:
        raise ValueError(f"a batch of {text!r} is empty; write it like 32seq or 131k-tokens")
    return number, "tokens" if match[2].startswith("tok") else "seq"


def parse_seconds(text: str) -> float:
    """Seconds of "90s", "30min", "1.5h" or "2d"."""
    match = _NUMBER.fullmatch(text)
    if match is None or match[2].lower() not in _SECONDS:
        raise ValueError(f"{text!r} is no duration; write it like 30min, 1.5h or 90s")
    seconds = float(match[1].replace("_", "")) * _SECONDS[match[2].lower()]
    if not 0 < seconds < math.inf:
        raise ValueError(f"{text!r} is no time to spend; write it like 30min, 1.5h or 90s")
    return seconds


def format_bytes(count: int | float) -> str:
    """Bytes for people, in binary units: "13.9 GiB", "512.0 MiB", "900 B"."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(count) >= unit:
            value = count / unit
            return f"{value:.2f} {name}" if abs(value) < 10 else f"{value:.1f} {name}"
    return f"{count:.0f} B"


def format_count(count: int | float) -> str:
    """A count for people: "6.74 B", "131.1 k", "512"."""
    for unit, name in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if abs(count) >= unit:
            value = count / unit
            return f"{value:.2f} {name}" if abs(value) < 10 else f"{value:.1f} {name}"
    return f"{count:.0f}"


def format_seconds(seconds: float) -> str:
    """A duration for people: "1 d 15 h", "3 min 20 s", "0.42 s"."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 10:
        return f"{seconds:.2f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h"


def format_span(seconds: float) -> str:
    """A long duration that is only estimated: "40 min", "13 h", "26 days", "4.4 months"."""
    for unit, name, most in (
        (1, "s", 120),
        (60, "min", 120),
        (3600, "h", 48),
        (86400, "days", 60),
        (_MONTH, "months", 24),
    ):
        if seconds < most * unit:
            return f"{_two_digits(seconds / unit)} {name}"
    return f"{_two_digits(seconds / (12 * _MONTH))} years"


def _two_digits(value: float) -> str:
    """Or one, of less than 1: 0.02 is not 0.0."""
    if value < 1:
        return f"{value:.1g}"
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"
