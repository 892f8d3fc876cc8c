"""Random nonsense, reproducible: odd values, changed texts, damaged files.

Everything here is a function of the generator it is given, so a failure is a seed and a number.
"""

import random
from pathlib import Path
from typing import Any

HUGE_DIGITS = "9" * 5000  # more than int() reads
TEXTS = (
    "",
    " ",
    "auto",
    "sample",
    "c4",
    "adamw",
    "galore",
    "llama-tiny",
    "24GB",
    "-1GB",
    "rtx4090",
    "1.1B",
    "32seq",
    "131k-tokens",
    "1e999",
    "nan",
    "inf",
    "-0",
    "0x10",
    "\0",
    "a\0b",
    "a\nb: 2",
    "\x1b[31mred\x1b[0m",
    "\u202eabc\u202c",
    "\U0001f600" * 7,
    "\udce4",
    "na\u00efve",
    "~nobody-of-that-name/x",
    "~",
    "/",
    "/dev/null",
    "/proc/self/mem",
    "../../../../etc/passwd",
    "x" * 300,
    "x" * 100_000,
    " " * 10_000 + "y",
    "[" * 3000,
    "{a=" * 3000,
    HUGE_DIGITS,
    "%s%n{0}",
    "true",
)
NUMBERS = (
    0,
    -1,
    1,
    2,
    3,
    7,
    64,
    2**31,
    2**63,
    2**64,
    10**30,
    10**400,
    -(10**400),
    0.0,
    -0.0,
    0.5,
    1.0,
    1e-320,
    1e308,
    float("inf"),
    float("-inf"),
    float("nan"),
)


def odd_value(rng: random.Random, depth: int = 3) -> Any:
    """A value of any type that TOML or JSON knows, likely of the wrong one."""
    kind = rng.randrange(8 if depth else 5)
    match kind:
        case 0 | 1:
            return rng.choice(NUMBERS)
        case 2 | 3:
            return rng.choice(TEXTS)
        case 4:
            return rng.choice([True, False, None])
        case 5 | 6:
            return [odd_value(rng, depth - 1) for _ in range(rng.randrange(4))]
    return {
        rng.choice((*TEXTS[:9], "rank", "mlp", "type", "factor")): odd_value(rng, depth - 1)
        for _ in range(rng.randrange(4))
    }


def changed_text(rng: random.Random, text: str) -> str:
    """`text` after a few edits: characters dropped, doubled or exchanged, parts moved or cut."""
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(text) + 1)
        other = rng.randrange(len(text) + 1)
        first, last = min(place, other), max(place, other)
        match rng.randrange(7):
            case 0:
                text = text[:place] + text[place + 1 :]
            case 1:
                text = text[:place] + rng.choice("=[]{}\"'.,#\n\0\\-+e0\u00e9") + text[place:]
            case 2:
                text = text[:first] + text[last:]
            case 3:
                text = text[:last] + text[first:]
            case 4:
                text = text[:place]
            case 5:
                text = text[:place] + rng.choice(TEXTS) + text[place:]
            case 6:
                line = rng.choice(text.splitlines() or [""])
                text = text[:place] + "\n" + line + "\n" + text[place:]
    return text


def damaged(rng: random.Random, content: bytes) -> bytes:
    """`content` cut off, with flipped bits, with other bytes in place of some, or longer."""
    place = rng.randrange(len(content) + 1)
    match rng.randrange(6):
        case 0:
            return content[:place]
        case 1 | 2:
            changed = bytearray(content)
            for _ in range(rng.choice([1, 1, 1, 8])):
                if changed:
                    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
            return bytes(changed)
        case 3:
            some = rng.randbytes(rng.choice([1, 8, 100]))
            return content[:place] + some + content[place + len(some) :]
        case 4:
            zeros = bytes(rng.choice([1, 8, 4096]))
            return content[:place] + zeros + content[place + len(zeros) :]
    return content[:place] + rng.randbytes(rng.randrange(64)) + content[place:]


def changed_json(rng: random.Random, value: Any) -> Any:
    """A copy of `value` with one part removed or replaced by something odd."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        if rng.random() < 0.15:
            return {name: item for name, item in value.items() if name != key}
        return value | {key: changed_json(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.9:
        place = rng.randrange(len(value))
        return [*value[:place], changed_json(rng, value[place]), *value[place + 1 :]]
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.5:
        return value + rng.choice([-1, 1, 2**31, -value - 1, 10**18])
    return odd_value(rng)


def files_of(folder: Path) -> list[Path]:
    """Every file below `folder`, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file())
