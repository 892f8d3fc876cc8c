"""What choosing a method costs in quality, from published perplexities (configs/quality.toml).

    penalty("galore", 0.25, "8bit", 6.74e9)  +0.003 nats, arXiv:2403.03507 Table 3
    penalty("fira", 0.25, "fp32", 6.74e9)    +0.010 nats, no evidence for this size

A penalty is ln(perplexity / that of tuned AdamW under the same protocol). Nothing here imports
torch: the evidence can be shown before anything heavy is loaded.
"""

import math
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from itertools import pairwise
from typing import Any, Literal

Mark = Literal["published", "second-hand", "no evidence"]

CLASS = 0.005  # nats; smaller differences are noise between runs
DOUBT = 0.01  # nats, added for every step away from the evidence
REACH = 4.0  # the factor in model size over which the nearest row still speaks
_PRECISION = {"8bit": 0, "bf16": 1, "fp32": 2}  # of moments
_REFERENCE = "adamw"
_READ = {"published": "as printed", "second-hand": "quoted"}


@dataclass(frozen=True)
class Evidence:
    """One published perplexity.

    rank: as a share of the hidden size; None where the method has no such choice. adamw: in the
    same table, None where it has none. tuned: the best published AdamW under the same protocol.
    variant: what differs from the method as lowmem would choose it. aside: why it does not count.
    reading: "as printed", "quoted", "recomputed" or "from memory".
    """

    method: str
    rank: float | None
    moments: str
    weights: str
    size: str
    parameters: float
    updates: int | None
    tokens: float | None
    ppl: float
    adamw: float | None
    tuned: float | None
    source: str
    mark: Mark
    variant: str | None
    aside: str | None
    protocol: str
    reading: str

    @property
    def counts(self) -> bool:
        """Does it say something about the method as lowmem would choose it?"""
        return self.variant is None and self.aside is None and self.tuned is not None

    @property
    def penalty(self) -> float:
        """Nats of validation loss above tuned AdamW; negative is better."""
        if self.tuned is None:
            raise ValueError(f"{self.source}: no AdamW to compare {self.method} with")
        return math.log(self.ppl / self.tuned)


@dataclass(frozen=True)
class Penalty:
    """A penalty in nats, where it is from, and what the source does not cover."""

    nats: float
    source: str
    mark: Mark
    doubts: tuple[str, ...] = ()

    @property
    def rung(self) -> int:
        """Its class of CLASS nats: what is equal in it is as good."""
        return math.floor(round(self.nats / CLASS, 9))

    def doubted(self, why: str, steps: float = 1.0) -> "Penalty":
        """The same, further from the evidence by so many steps."""
        nats = self.nats + steps * DOUBT
        return Penalty(nats, self.source, "no evidence", (*self.doubts, why))

    def sentence(self) -> str:
        """For people: never a number without its source."""
        marked = ", second-hand" if self.mark == "second-hand" else ""
        doubts = f"; no evidence for {' and '.join(self.doubts)}" if self.doubts else ""
        return f"{self.nats:+.3f} nats against tuned AdamW ({self.source}{marked}{doubts})"


@cache
def _file() -> dict[str, Any]:
    text = (files("lowmem") / "configs" / "quality.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


@cache
def evidence() -> tuple[Evidence, ...]:
    """Every row of configs/quality.toml."""
    return tuple(row for table in _file()["tables"] for row in _rows(table))


def _rows(table: dict[str, Any]) -> Iterator[Evidence]:
    sizes, protocol = table["sizes"], _file()["protocols"][table["protocol"]]
    for row in table["rows"]:
        for at, (size, ppl) in enumerate(zip(sizes, row["ppl"], strict=True)):
            if math.isnan(ppl):
                continue
            yield Evidence(
                method=row["method"],
                rank=row["rank"][at] if "rank" in row else None,
                moments=row.get("moments", "bf16"),
                weights=row.get("weights", "bf16"),
                size=size,
                parameters=_file()["sizes"][size]["parameters"],
                updates=protocol.get("updates", {}).get(size),
                tokens=protocol["tokens"].get(size),
                ppl=ppl,
                adamw=table["adamw"][at] if "adamw" in table else None,
                tuned=protocol["tuned_adamw"].get(size),
                source=table["source"],
                mark=table["mark"],
                variant=row.get("variant"),
                aside=table.get("aside"),
                protocol=table["protocol"],
                reading=table.get("reading", _READ[table["mark"]]),
            )


@dataclass(frozen=True)
class Figure:
    """One published figure of memory or speed. reading: as of `Evidence`."""

    method: str
    size: str
    what: str
    value: float
    unit: str
    setting: str
    source: str
    variant: str | None
    reading: str


@cache
def figures() -> tuple[Figure, ...]:
    """Every published figure that is no perplexity."""
    return tuple(
        Figure(
            row["method"],
            size,
            table["what"],
            value,
            table["unit"],
            table["setting"],
            table["source"],
            row.get("variant"),
            table["reading"],
        )
        for table in _file()["figures"]
        for row in table["rows"]
        for size, value in zip(table["sizes"], row["values"], strict=True)
        if not math.isnan(value)
    )


def published_row(
    source: str, method: str, size: str, variant: str | None, rank: float | None
) -> Evidence | None:
    """The row of one table for one run. rank: as a share of the hidden size.

    AdamW without a row of its own is the table's baseline. None: the table has no such row, or has
    it with another rank.
    """
    table = [row for row in evidence() if (row.source, row.size) == (source, size)]
    for row in table:
        same_rank = row.rank is None or (
            rank is not None and math.isclose(row.rank, rank, rel_tol=0.01)
        )
        if (row.method, row.variant) == (method, variant) and same_rank:
            return row
    baseline = next((row for row in table if row.adamw is not None), None)
    if method != _REFERENCE or variant is not None or baseline is None:
        return None
    assert baseline.adamw is not None
    return replace(
        baseline,
        method=method,
        rank=None,
        moments="bf16",
        weights="bf16",
        ppl=baseline.adamw,
        variant=None,
    )


def automatic(names: Sequence[str], *, ranked: bool = False) -> list[str]:
    """Of these methods those that may be chosen when nobody names one.

    AdamW, which the others are compared with, and what has a published row at some size, unless
    the file says with a reason that it is chosen by name only. ranked: only those whose rows tell
    a rank.
    """
    rows = [row for row in evidence() if row.counts and row.mark == "published"]
    known = {_REFERENCE, *(row.method for row in rows)}
    if ranked:
        known = {row.method for row in rows if row.rank is not None}
    return [name for name in names if name in known - _file()["by_name_only"].keys()]


def why_by_name_only(name: str) -> str:
    """Why the planner does not choose that method by itself; empty where it may."""
    told: str | None = _file()["by_name_only"].get(name)
    if told is not None or automatic([name]):
        return told or ""
    return "nobody has published perplexities of it that count"


@cache
def penalty(
    method: str, rank: float | None, moments: str, parameters: float, weights: str = "bf16"
) -> Penalty:
    """What the method costs in a model of that size, with moments and weights of those formats.

    int8 weights: the rows of the method that was published with them ([int8] in the file), else
    DOUBT more than with exact ones.
    """
    if weights == "int8":
        published = _file()["int8"].get(method)
        if published is None:
            return penalty(method, rank, moments, parameters).doubted("int8 weights")
        rows = [
            r for r in evidence() if r.method == published and r.counts and _reaches(r, parameters)
        ]
        exact = penalty(method, rank, moments, parameters)
        if not rows:
            return exact.doubted("int8 weights of this size")
        return max(penalty(published, rank, moments, parameters), exact, key=lambda p: p.nats)
    return _penalty(method, rank, moments, parameters)


@cache
def _penalty(method: str, rank: float | None, moments: str, parameters: float) -> Penalty:
    """What the method costs with exact weights.

    rank: as a share of the hidden size, None without one. Rows with moments that are coarser than
    asked for count too, since finer ones are no worse. Doubt costs DOUBT: moments coarser than in
    any row, each halving of the rank below all rows, and a size further than REACH from all rows,
    where in addition nothing is believed to be better than AdamW. A method without rows has the
    value of its parent and DOUBT.
    """
    if method == _REFERENCE and moments == "fp32":
        return Penalty(0.0, "the reference", "published")
    mine = [row for row in evidence() if row.method == method and row.counts]
    rows = [row for row in mine if row.mark == "published"] or mine
    if not rows:
        if method == _REFERENCE:
            return penalty(method, None, "fp32", parameters).doubted(f"{moments} moments")
        parent = _file()["parents"].get(method, _REFERENCE)
        format = "fp32" if parent == _REFERENCE else moments
        return penalty(parent, rank, format, parameters).doubted(f"{method}, so as {parent}")
    exact = _by_size(rows, rank, parameters)
    fine = _PRECISION.get(moments, max(_PRECISION.values()))
    coarse = [row for row in rows if _PRECISION[row.moments] <= fine]
    if not any(_reaches(row, parameters) for row in coarse):
        told = len(coarse) == len(rows)  # that the size is another
        return exact if told else exact.doubted(f"{moments} moments")
    return max(_by_size(coarse, rank, parameters), exact, key=lambda each: each.nats)


def _reaches(row: Evidence, parameters: float) -> bool:
    return abs(math.log(parameters / row.parameters)) <= math.log(REACH)


def _by_size(rows: Sequence[Evidence], rank: float | None, parameters: float) -> Penalty:
    """Linear in the logarithm of the size; beyond the outermost rows, theirs."""
    sizes = sorted({row.parameters for row in rows})

    def at(size: float, least: float = -math.inf) -> Penalty:
        return _by_rank([row for row in rows if row.parameters == size], rank, least)

    if not sizes[0] <= parameters <= sizes[-1]:
        nearest = sizes[0] if parameters < sizes[0] else sizes[-1]
        near = any(_reaches(row, parameters) for row in rows)
        return at(nearest) if near else at(nearest, least=0.0).doubted("this size")
    if parameters in sizes:
        return at(parameters)
    below, above = next(pair for pair in pairwise(sizes) if pair[0] < parameters < pair[1])
    share = math.log(parameters / below) / math.log(above / below)
    return _between(at(below), at(above), share)


def _by_rank(rows: Sequence[Evidence], rank: float | None, least: float) -> Penalty:
    """The rows of one size, linear in the logarithm of the rank, at least `least`.

    Their mean where the rank is equal; above all rows, the uppermost.
    """
    ranks = sorted({row.rank for row in rows if row.rank is not None})
    if not ranks or rank is None:
        return _mean(rows, least)
    at = {each: _mean([row for row in rows if row.rank in (each, None)], least) for each in ranks}
    if rank >= ranks[-1]:
        return at[ranks[-1]]
    if rank < ranks[0]:
        halvings = math.log2(ranks[0] / rank)
        rounded = halvings < 0.01  # 0.3333 is a third
        return at[ranks[0]] if rounded else at[ranks[0]].doubted("so small a rank", halvings)
    if rank in at:
        return at[rank]
    below, above = next(pair for pair in pairwise(ranks) if pair[0] < rank < pair[1])
    share = math.log(rank / below) / math.log(above / below)
    return _between(at[below], at[above], share)


def _mean(rows: Sequence[Evidence], least: float) -> Penalty:
    nats = math.fsum(row.penalty for row in rows) / len(rows)
    return Penalty(max(nats, least), _listed([row.source for row in rows]), rows[0].mark)


def _between(one: Penalty, two: Penalty, share: float) -> Penalty:
    """The value at that share of the way; as doubtful as the worse of them."""
    mark = one.mark if one.mark == "no evidence" else two.mark
    source = _listed([*one.source.split("; "), *two.source.split("; ")])
    doubts = tuple(dict.fromkeys([*one.doubts, *two.doubts]))
    return Penalty((1 - share) * one.nats + share * two.nats, source, mark, doubts)


def _listed(sources: Sequence[str]) -> str:
    return "; ".join(dict.fromkeys(sources))
