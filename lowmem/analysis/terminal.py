"""A figure in letters, for any terminal.

  perplexity
8000 |a
     | aa b
 300 |   aaaa
     +--------
     0      60
     tokens, thousands
"""

from textwrap import wrap

from lowmem.analysis.axes import Axis, tick_text
from lowmem.analysis.figures import Curve, Figure
from lowmem.errors import short

LETTERS = "abcdefghijklmnopqrstuvwxyz"
_MARK = "*"
_SHARED = "#"
_HEIGHT = 18
_TICKS = 5


def drawn(figure: Figure, width: int) -> list[str]:
    """Lines of at most `width` characters (and at least 40): axes, curves, a legend, the notes."""
    width = max(40, width)

    labels = {_row(figure.y, tick): tick_text(tick) for tick in figure.y.ticks(_TICKS)}
    margin = max((len(text) for text in labels.values()), default=1)
    columns = width - margin - 3
    grid = _grid(figure, columns)
    lines = [f"{'':{margin}}  {figure.y.label}{', logarithmic' if figure.y.log else ''}"]
    lines += [f"{labels.get(row, ''):>{margin}} |{''.join(grid[row])}" for row in range(_HEIGHT)]
    lines.append(f"{'':{margin}} +{'-' * columns}")
    lines.append(f"{'':{margin}}  {_x_labels(figure.x, columns)}".rstrip())
    lines.append(f"{'':{margin}}  {figure.x.label}{', logarithmic' if figure.x.log else ''}")
    below = [
        f"{letter}  {short(curve.name)}{_last(curve)}"
        for letter, curve in zip(_letters(figure), figure.curves, strict=True)
    ]
    if any(curve.points for curve in figure.curves):
        below.append(f"capitals: validation, the last beside the name; {_SHARED}: several")
    below += [f"{_MARK}  published: {mark.name}" for mark in figure.marks]
    below += figure.notes
    return [*lines, *(part for line in below for part in _wrapped(line, width))]


def _wrapped(line: str, width: int) -> list[str]:
    return wrap(line, width, initial_indent="  ", subsequent_indent="     ")


def _letters(figure: Figure) -> list[str]:
    return [LETTERS[n % len(LETTERS)] for n in range(len(figure.curves))]


def _last(curve: Curve) -> str:
    return f"  {curve.points[-1][1]:.5g}" if curve.points else ""


def _grid(figure: Figure, columns: int) -> list[list[str]]:
    """Letters of lines, in upper case where a run was evaluated; # where curves meet."""
    grid = [[" "] * columns for _ in range(_HEIGHT)]

    def put(x: float, y: float, letter: str) -> None:
        if not (figure.x.holds(x) and figure.y.holds(y)):
            return
        column = min(columns - 1, max(0, round(figure.x.share(x) * (columns - 1))))
        row = _row(figure.y, y)
        there = grid[row][column]
        same = there in (" ", letter.lower(), letter.upper())
        grid[row][column] = letter if same else _SHARED

    for letter, curve in zip(_letters(figure), figure.curves, strict=True):
        for x, y in curve.line:
            put(x, y, letter)
        for x, y in curve.points:
            put(x, y, letter.upper())
    for mark in figure.marks:
        put(mark.x, mark.y, _MARK)
    return grid


def _row(axis: Axis, value: float) -> int:
    return min(_HEIGHT - 1, max(0, round((1 - axis.share(value)) * (_HEIGHT - 1))))


def _x_labels(axis: Axis, columns: int) -> str:
    """Ticks below the axis, each centred under its place where nothing else stands."""
    line = [" "] * columns
    for tick in axis.ticks(max(2, columns // 12)):
        text = tick_text(tick)
        start = round(axis.share(tick) * (columns - 1)) - len(text) // 2
        start = min(columns - len(text), max(0, start))
        if all(letter == " " for letter in line[max(0, start - 1) : start + len(text) + 1]):
            line[start : start + len(text)] = text
    return "".join(line)
