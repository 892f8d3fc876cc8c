"""A figure as PNG or SVG by matplotlib, which only this needs."""

from pathlib import Path

from lowmem.analysis.axes import Axis, tick_text
from lowmem.analysis.figures import Figure, thinned
from lowmem.errors import ConfigError, HardwareError, short

FORMATS = (".png", ".svg")
_COLOURS = ("#1f6fb4", "#d1600a", "#2b8a3e", "#b3273f", "#7a4fb5", "#8a5a44", "#c2428f", "#0e8088")
_MARKERS = "D^sPX*v<>"
_MOST_RAW = 3  # curves; of more, the unsmoothed losses would hide one another
_MOST_POINTS = 4000
_LONGEST_LEGEND = 12


def write_image(figure: Figure, path: Path) -> None:
    """Draw the figure into `path`, whose suffix is the format.

    ConfigError: another suffix, or a path that cannot be written. HardwareError: no matplotlib.
    """
    require_format(path)
    try:
        import matplotlib
        from matplotlib.figure import Figure as Canvas
    except ImportError:
        raise HardwareError(
            "matplotlib is not installed",
            f"it draws {path.suffix[1:].upper()} files; without --out the plot is text and needs "
            "nothing",
            "pip install 'lowmem[plot]'",
        ) from None
    canvas = Canvas(figsize=(8, 5), dpi=150, layout="constrained")
    axes = canvas.add_subplot()
    _draw(figure, axes)
    words = "\n".join(figure.notes)
    canvas.supxlabel(words, fontsize=7, color="#5c6570", x=0.01, ha="left")
    settings = {"svg.fonttype": "none", "svg.hashsalt": "lowmem"}  # text stays text; same bytes
    metadata = {"Date": None} if path.suffix.lower() == ".svg" else {"Software": "lowmem"}
    try:
        with matplotlib.rc_context(settings):
            canvas.savefig(path, format=path.suffix[1:].lower(), metadata=metadata)
    except OSError as error:
        raise ConfigError(
            f"--out {path} cannot be written", f"{error.strerror}", "a folder that is there"
        ) from None


def require_format(path: Path) -> None:
    """ConfigError unless the suffix is one that can be drawn."""
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(
            f"--out {path} has no known format",
            f"the suffix chooses it: {', '.join(FORMATS)}",
            f"--out {path.stem}.png",
        )


def _draw(figure: Figure, axes) -> None:  # type: ignore[no-untyped-def]  # matplotlib's Axes
    for number, curve in enumerate(figure.curves):
        colour = _COLOURS[number % len(_COLOURS)]
        style = "-" if number < len(_COLOURS) else "--"
        if curve.raw and len(figure.curves) <= _MOST_RAW:
            axes.plot(*_columns(thinned(curve.raw, _MOST_POINTS)), color=colour, lw=0.6, alpha=0.3)
        label = short(curve.name)
        if curve.points:
            label += f"  {curve.points[-1][1]:.5g}"
        if curve.line:
            line = thinned(curve.line, _MOST_POINTS)
            axes.plot(*_columns(line), style, color=colour, lw=1.5, label=label)
            label = ""
        if curve.points:
            axes.plot(
                *_columns(curve.points), "o", color=colour, mfc="white", ms=4.5, label=label or None
            )
            if not curve.line:
                axes.annotate(
                    short(curve.name),
                    curve.points[-1],
                    (0, 6),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8,
                )
    for number, mark in enumerate(figure.marks):
        axes.plot(
            [mark.x], [mark.y], _MARKERS[number % len(_MARKERS)], color="black", ms=6,
            label=mark.name,
        )  # fmt: skip
    _scale(axes.xaxis, axes.set_xscale, axes.set_xlim, figure.x)
    _scale(axes.yaxis, axes.set_yscale, axes.set_ylim, figure.y)
    axes.set_xlabel(figure.x.label)
    axes.set_ylabel(figure.y.label)
    axes.grid(color="#dfe3e8", lw=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    entries = len(figure.curves) + len(figure.marks)
    axes.legend(frameon=False, fontsize=8 if entries <= _LONGEST_LEGEND else 5)


def _columns(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _scale(axis, set_scale, set_limits, scale: Axis) -> None:  # type: ignore[no-untyped-def]
    set_scale("log" if scale.log else "linear")
    set_limits(scale.low, scale.high)
    ticks = scale.ticks(7)
    axis.set_ticks(ticks, labels=[tick_text(tick) for tick in ticks])
    axis.set_ticks([], minor=True)
