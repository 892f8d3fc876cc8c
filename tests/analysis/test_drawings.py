"""The three ways to draw a figure: letters, inline SVG and files by matplotlib."""

import math
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from lowmem.analysis import image, svg, terminal
from lowmem.analysis.axes import Axis
from lowmem.analysis.figures import Curve, Figure, Mark, losses
from lowmem.analysis.history import read_all
from lowmem.errors import ConfigError, HardwareError
from tests.analysis.conftest import Make

HOSTILE = '<b>"&\x1b'
FIGURE = Figure(
    Axis("tokens <k>", 0.0, 10.0),
    Axis("loss", 1.0, 100.0, log=True),
    [
        Curve("one", [(0.0, 100.0), (5.0, math.nan), (6.0, 10.0), (10.0, 1.0)], [], [(10.0, 1.0)]),
        Curve(HOSTILE, [(0.0, 1.0)]),
    ],
    [Mark("paper", 5.0, 10.0)],
    ["a note that is long " * 8],
)


@pytest.mark.parametrize("width", [20, 80, 120])
def test_letters_stand_where_the_values_are(width: int) -> None:
    lines = terminal.drawn(FIGURE, width)
    assert max(map(len, lines)) <= max(40, width)
    plot = [line.partition("|")[2] for line in lines if "|" in line]
    columns = max(40, width) - len("100") - 3
    assert plot[0][0] == "a"
    assert plot[-1][columns - 1] == "A"  # where it was evaluated
    assert plot[-1][0] == "b"
    assert plot[len(plot) // 2][(columns - 1) // 2].strip() in ("*", "")
    assert sum(line.count("*") for line in plot) == 1
    assert lines[-1].strip().endswith("long")
    assert not any("\x1b" in line for line in lines)


def test_letters_that_meet_are_marked() -> None:
    figure = Figure(
        Axis("x", 0, 1), Axis("y", 0, 1), [Curve("one", [(0, 0)]), Curve("two", [(0, 0)])]
    )
    assert any("|#" in line for line in terminal.drawn(figure, 80))


def test_inline_svg_is_well_formed_and_inside_its_frame() -> None:
    figure = Figure(FIGURE.x, FIGURE.y, [FIGURE.curves[0], Curve('<b>"&', [(0.0, 1.0)])])
    root = ElementTree.fromstring(svg.drawn(figure))
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    circles = [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in root.iter("circle")]
    assert len(circles) == 2
    assert all(0 <= x <= width and 0 <= y <= height for x, y in circles)
    (line,) = [p.attrib["d"] for p in root.iter("path") if p.attrib["class"] == "c0"]
    assert line.count("M") == 2  # what is not finite leaves a gap
    assert "nan" not in line
    words = [text.text for text in root.iter("text")]
    assert "tokens <k>" in words
    assert "loss, logarithmic" in words


def test_the_upper_end_of_an_axis_is_above_the_lower() -> None:
    figure = Figure(FIGURE.x, FIGURE.y, [Curve("", [], [], [(0.0, 100.0), (10.0, 1.0)])])
    first, last = ElementTree.fromstring(svg.drawn(figure)).iter("circle")
    assert float(first.attrib["cy"]) < float(last.attrib["cy"])
    assert float(first.attrib["cx"]) < float(last.attrib["cx"])


def test_a_picture_is_written_in_the_format_of_its_name(make_run: Make, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figure = losses(read_all([make_run("a"), make_run("b", seed=1)]), "tokens", "loss", None)
    image.write_image(figure, tmp_path / "a.PNG")
    assert (tmp_path / "a.PNG").read_bytes().startswith(b"\x89PNG")
    for name in ("a.svg", "b.svg"):
        image.write_image(figure, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    words = " ".join(ElementTree.parse(tmp_path / "a.svg").getroot().itertext())
    assert "a  4" in words
    assert "exponential mean" in words or "not smoothed" in words


def test_without_matplotlib_the_command_that_installs_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(HardwareError) as raised:
        image.write_image(FIGURE, tmp_path / "a.png")
    assert raised.value.fix == "pip install 'lowmem[plot]'"


@pytest.mark.parametrize("name", ["a", "a.jpg", "nothing/a.png"])
def test_a_picture_that_cannot_be_written_is_refused(tmp_path: Path, name: str) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ConfigError, match=r"no known format|cannot be written"):
        image.write_image(FIGURE, tmp_path / name)
