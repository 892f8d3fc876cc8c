"""Quantities: what people write is read exactly, and nothing else is read at all."""

import math
import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowmem.units import (
    GIB,
    MIB,
    format_bytes,
    format_count,
    format_seconds,
    format_span,
    parse_batch,
    parse_bytes,
    parse_count,
)

UNITS = {  # powers written out, as the two families of prefixes define them
    "": 1,
    "B": 1,
    "kB": 1000,
    "MB": 1000**2,
    "GB": 1000**3,
    "TB": 1000**4,
    "KiB": 1024,
    "MiB": 1024**2,
    "GiB": 1024**3,
    "TiB": 1024**4,
}
PARSERS: dict[str, Callable[[str], object]] = {
    "bytes": parse_bytes,
    "count": parse_count,
    "batch": parse_batch,
}


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("24GB", 24_000_000_000),
        ("24GiB", 25_769_803_776),
        ("512MiB", 536_870_912),
        (" 1.5 gib ", 1_610_612_736),
        ("100_000", 100_000),
        (4096, 4096),
    ],
)
def test_bytes_in_both_families_of_units(text: str | int, count: int) -> None:
    assert parse_bytes(text) == count


@given(
    number=st.integers(0, 8000),
    unit=st.sampled_from(list(UNITS)),
    case=st.sampled_from([str, str.lower, str.upper]),
    space=st.sampled_from(["", " "]),
)
def test_every_unit_of_bytes_in_any_case(
    number: int, unit: str, case: Callable[[str], str], space: str
) -> None:
    assert parse_bytes(f"{number}{space}{case(unit)}") == number * UNITS[unit]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("1.1B", 1_100_000_000),
        ("1.1g", 1_100_000_000),
        ("131k", 131_000),
        ("20_000", 20_000),
        ("1e6", 1_000_000),
        ("2.5e-1M", 250_000),
        ("6.4T", 6_400_000_000_000),
        (7, 7),
    ],
)
def test_counts_as_people_write_them(text: str | int, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize(
    ("text", "batch"),
    [
        ("32seq", (32, "seq")),
        ("1 sequence", (1, "seq")),
        ("131k-tokens", (131_000, "tokens")),
        (" 0.5M - tokens ", (500_000, "tokens")),
        ("256token", (256, "tokens")),
    ],
)
def test_batches_in_sequences_or_tokens(text: str, batch: tuple[int, str]) -> None:
    assert parse_batch(text) == batch


@pytest.mark.parametrize("kind", PARSERS)
@pytest.mark.parametrize(
    "text",
    ["", " ", "\n", "-5", "-1GB", "-3seq", "nan", "inf", "1.", ".5", "0x10", "24GX", "1 2", "½"],
)
def test_what_is_no_quantity_is_refused_with_an_example(kind: str, text: str) -> None:
    with pytest.raises(ValueError, match="write it like") as caught:
        PARSERS[kind](text)
    shown = text.removesuffix("seq") if kind == "batch" else text
    assert repr(shown) in str(caught.value)


@pytest.mark.parametrize("kind", PARSERS)
@pytest.mark.parametrize("number", ["1e400", "9" * 400, "1e99999999999"])
def test_numbers_without_end_are_refused(kind: str, number: str) -> None:
    with pytest.raises(ValueError, match="is too large for a"):
        PARSERS[kind](number + ("seq" if kind == "batch" else ""))


@pytest.mark.parametrize("value", [True, None, math.nan, math.inf, -1, -0.5, [1]])
def test_values_of_a_file_that_are_no_count_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match="is no count"):
        parse_count(value)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["0seq", "0 tokens"])
def test_an_empty_batch_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"a batch of '{text}' is empty"):
        parse_batch(text)


@pytest.mark.parametrize("kind", PARSERS)
@given(text=st.text() | st.from_regex(r"[-+]?[0-9_.eE+-]{1,12}[A-Za-z-]{0,7}", fullmatch=True))
def test_any_text_is_read_or_refused_with_a_sentence(kind: str, text: str) -> None:
    try:
        value = PARSERS[kind](text)
    except ValueError as error:
        told = str(error)
    else:
        number = value[0] if isinstance(value, tuple) else value
        assert isinstance(number, int)
        assert number >= (1 if kind == "batch" else 0)
        return
    assert "write it like" in told or "is too large for a" in told


@given(st.integers(0, 2**60))
def test_bytes_for_people_can_be_read_back(count: int) -> None:
    """Two decimals below 10, one above: half a unit of the last digit is at most 0.5 %."""
    assert parse_bytes(format_bytes(count)) == pytest.approx(count, rel=0.005, abs=0.5)


@given(st.integers(0, 10**18))
def test_counts_for_people_can_be_read_back(count: int) -> None:
    assert parse_count(format_count(count)) == pytest.approx(count, rel=0.005, abs=0.5)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (format_bytes(13.9 * GIB), "13.9 GiB"),
        (format_bytes(1.25 * MIB), "1.25 MiB"),
        (format_bytes(-3 * GIB), "-3.00 GiB"),
        (format_bytes(900), "900 B"),
        (format_count(6.74e9), "6.74 B"),
        (format_count(131_072), "131.1 k"),
        (format_count(512), "512"),
        (format_seconds(0.42), "0.42 s"),
        (format_seconds(42), "42 s"),
        (format_seconds(59.6), "1 min 0 s"),
        (format_seconds(200), "3 min 20 s"),
        (format_seconds(3599.6), "1 h 0 min"),
        (format_seconds(39 * 3600), "1 d 15 h"),
        (format_span(0.42), "0.4 s"),
        (format_span(0.0235), "0.02 s"),
        (format_span(99.2), "99 s"),
        (format_span(40 * 60), "40 min"),
        (format_span(13 * 3600), "13 h"),
        (format_span(48 * 3600), "2.0 days"),
        (format_span(26 * 86400), "26 days"),
        (format_span(133 * 86400), "4.4 months"),  # of 30.4 days
        (format_span(3 * 365.25 * 86400), "3.0 years"),
    ],
)
def test_what_people_read(text: str, expected: str) -> None:
    assert text == expected


@given(st.floats(1, 1e12))
def test_a_span_is_told_to_half_of_its_last_digit(seconds: float) -> None:
    lengths: dict[str, float] = {"s": 1, "min": 60, "h": 3600, "days": 86400}
    lengths |= {"months": 365.25 * 7200, "years": 365.25 * 86400}
    number, unit = format_span(seconds).split()
    last = 0.1 if "." in number else 1
    assert abs(float(number) - seconds / lengths[unit]) <= last / 2 * (1 + 1e-9)
    assert float(number) >= 1


@given(st.floats(0, 1e9))
def test_a_duration_is_off_by_less_than_its_last_unit(seconds: float) -> None:
    lengths = {"d": 86400, "h": 3600, "min": 60, "s": 1}
    parts = re.findall(r"([0-9.]+) (d|h|min|s)", format_seconds(seconds))
    assert 1 <= len(parts) <= 2
    told = sum(float(number) * lengths[unit] for number, unit in parts)
    last = 0.01 if "." in parts[-1][0] else lengths[parts[-1][1]]
    assert abs(told - seconds) < last
