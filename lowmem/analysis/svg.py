"""A figure as inline SVG for a page: scales with its place, takes its colours from the page.

Classes: `axis` and `grid` for lines, `text` for words, `c0` to `c7` for curves, `raw`, `point` and
`mark`. The size is that of a phone, so that letters stay readable where a page is narrow.
"""

from html import escape

from lowmem.analysis.axes import Axis, tick_text
from lowmem.analysis.figures import Curve, Figure, Points, thinned

COLOURS = 8
_WIDTH, _HEIGHT = 340, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 10, 20, 34
_MOST_POINTS = 600


def drawn(figure: Figure) -> str:
    """The element <svg>; its title says in words what it shows."""
    title = f"{figure.y.label} against {figure.x.label}"
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">',
        f"<title>{escape(title)}</title>",
        *_axes(figure),
        *(
            part
            for number, curve in enumerate(figure.curves)
            for part in _curve(figure, curve, f"c{number % COLOURS}")
        ),
    ]
    for mark in figure.marks:
        x, y = _place(figure, mark.x, mark.y)
        name = escape(mark.name)
        parts.append(
            f'<path class="mark" d="M{x - 4:.1f} {y:.1f}L{x:.1f} {y - 4:.1f}L{x + 4:.1f} {y:.1f}'
            f'L{x:.1f} {y + 4:.1f}Z"><title>{name}</title></path>'
        )
    return "\n".join([*parts, "</svg>"])


def _axes(figure: Figure) -> list[str]:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = []
    for tick in figure.y.ticks(5):
        y = _place(figure, figure.x.low, tick)[1]
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{right}"/>')
        parts.append(_text(_LEFT - 4, y + 3.5, tick_text(tick), "end"))
    for tick in figure.x.ticks(5):
        x = _place(figure, tick, figure.y.low)[0]
        parts.append(f'<path class="grid" d="M{x:.1f} {_TOP}V{bottom}"/>')
        parts.append(_text(x, bottom + 13, tick_text(tick), "middle"))
    parts.append(f'<path class="axis" d="M{_LEFT} {_TOP}V{bottom}H{right}"/>')
    parts.append(_text(2, 11, _words(figure.y), "start"))
    parts.append(_text(right, _HEIGHT - 5, _words(figure.x), "end"))
    return parts


def _words(axis: Axis) -> str:
    return axis.label + (", logarithmic" if axis.log else "")


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return (
        f'<text class="text" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'
    )


def _curve(figure: Figure, curve: Curve, colour: str) -> list[str]:
    parts = []
    if curve.raw:
        parts.append(f'<path class="raw {colour}" d="{_path(figure, curve.raw)}"/>')
    if len(curve.line) == 1:  # a path of one point shows nothing
        parts.append(_dot(figure, *curve.line[0], colour, curve.name))
    elif curve.line:
        parts.append(f'<path class="{colour}" d="{_path(figure, curve.line)}"/>')
    for x, y in curve.points:
        if figure.x.holds(x) and figure.y.holds(y):
            parts.append(_dot(figure, x, y, colour, f"{curve.name} {y:.5g}"))
    return parts


def _dot(figure: Figure, x: float, y: float, colour: str, words: str) -> str:
    across, down = _place(figure, x, y)
    title = f"<title>{escape(words)}</title>"
    return (
        f'<circle class="point {colour}" cx="{across:.1f}" cy="{down:.1f}" r="2.5">{title}</circle>'
    )


def _path(figure: Figure, points: Points) -> str:
    """Lines from point to point; what is not within the axes leaves a gap."""
    words, pen = [], "M"
    for x, y in thinned(points, _MOST_POINTS):
        if figure.x.holds(x) and figure.y.holds(y) and 0 <= figure.y.share(y) <= 1:
            across, down = _place(figure, x, y)
            words.append(f"{pen}{across:.1f} {down:.1f}")
            pen = "L"
        else:
            pen = "M"
    return "".join(words)


def _place(figure: Figure, x: float, y: float) -> tuple[float, float]:
    across = _LEFT + figure.x.share(x) * (_WIDTH - _LEFT - _RIGHT)
    return across, _HEIGHT - _BOTTOM - figure.y.share(y) * (_HEIGHT - _TOP - _BOTTOM)
