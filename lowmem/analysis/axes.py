"""Scales of a figure: where a value lies, and which round values are written beside it."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """A scale from low to high, linear or logarithmic (then both are positive)."""

    label: str
    low: float
    high: float
    log: bool = False

    @staticmethod
    def over(
        label: str, values: Sequence[float], *, log: bool = False, room: float = 0.0
    ) -> "Axis":
        """The scale that holds these values, with some room at its ends."""
        known = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
        low, high = (min(known), max(known)) if known else (1.0, 2.0)
        if log:
            span = max(math.log(high / low), 0.1)
            return Axis(label, low * math.exp(-room * span), high * math.exp(room * span), True)
        span = high - low
        if span <= 1e-3 * abs(high):  # one value, or as good as one
            room, span = 1.0, 0.1 * abs(high) or 1.0
        return Axis(label, low - room * span, high + room * span)

    def share(self, value: float) -> float:
        """Where a value lies, 0 at the lower end and 1 at the upper."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def holds(self, value: float) -> bool:
        """Can it be drawn?"""
        return math.isfinite(value) and (value > 0 or not self.log)

    def ticks(self, most: int) -> list[float]:
        """At most so many round values within the scale."""
        return _log_ticks(self.low, self.high, most) if self.log else self._linear(most)

    def _linear(self, most: int) -> list[float]:
        rough = (self.high - self.low) / max(1, most)
        step = next(s for s in _steps(rough) if s >= rough and self._count(s) <= most)
        first = math.ceil(self.low / step - 1e-9)
        return [(first + n) * step for n in range(self._count(step))]

    def _count(self, step: float) -> int:
        return math.floor(self.high / step + 1e-9) - math.ceil(self.low / step - 1e-9) + 1


def _steps(rough: float) -> Iterator[float]:
    """1, 2 and 5 times powers of ten, from below `rough` upwards."""
    power = math.floor(math.log10(rough))
    while True:
        yield from (factor * 10.0**power for factor in (1, 2, 5))
        power += 1


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    """Powers of ten, with 2 and 5 between them where there is room, or every so many powers."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    fine = [(1, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 5), (1, 3), (1,)]
    for factors in fine:
        ticks = [f * 10.0**p for p in powers for f in factors if low <= f * 10.0**p <= high]
        if len(ticks) <= most:
            break
    else:
        ticks = ticks[:: math.ceil(len(ticks) / most)]
    return ticks if len(ticks) > 1 else Axis("", low, high)._linear(most)


def tick_text(value: float) -> str:
    """A tick in few letters."""
    if value and not 1e-3 <= abs(value) < 1e5:
        mantissa, _, exponent = f"{value:.3e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.6g}"
