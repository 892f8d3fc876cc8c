"""The page of a run: whole, closed, private, and the same as the figures of the run."""

import json
import os
import re
import shutil
import socket
import subprocess
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lowmem.analysis.history import History
from lowmem.analysis.report import page, write_report
from lowmem.errors import CheckpointError
from lowmem.train.events import Grown, Paused, Skipped
from lowmem.train.run import EVENTS
from tests.analysis.conftest import PAPERS, Make, append

VOID = {"meta", "br", "path", "circle"}
NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
VERDICT = {
    "recipe": "galore-60m",
    "true_perplexity": 35.6,
    "published": 34.88,
    "measured": 35.000006103515625,
    "tolerance": 0.34880000000000005,
    "verdict": "no match",
    "deviations": ["batch 8seq instead of 512seq", "<script>alert(1)</script>"],
}


class Page(HTMLParser):
    """Elements, attributes and words of a page; an error where tags do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def written(folder: Path) -> str:
    return write_report(folder).read_text("utf-8")


def test_the_page_lies_in_the_run_and_says_what_it_reached(make_run: Make) -> None:
    folder = make_run("a", final=4.0)
    assert write_report(folder) == folder / "report.html"
    words = Page(written(folder)).words
    for told in ("finished", "54.598", "4.0000", "in 4 updates", "976.6 KiB", "665.14"):
        assert told in words, told


def test_the_page_asks_nothing_from_anywhere(make_run: Make) -> None:
    text = written(make_run("a"))
    for tag, attributes in Page(text).elements:
        assert tag not in ("script", "link", "img", "iframe", "object", "base"), tag
        for name, value in attributes.items():
            assert name not in ("src", "href", "srcset", "data", "action"), value
            assert not name.startswith("on")
    assert not re.search(r"url\(|@import|https?:", text)
    assert "default-src 'none'" in text


def test_everything_that_was_read_is_escaped(make_run: Make) -> None:
    folder = make_run("<img src=x>", method="galore")
    attack = "</style><script>alert(1)</script>"
    append(folder / EVENTS, [Skipped(1, attack, False, [attack])])
    (folder / "env.json").write_text(json.dumps({"system": attack, attack: 1, "command": [attack]}))
    (folder / "verdict.json").write_text(json.dumps(VERDICT | {"recipe": attack}))
    found = Page(written(folder))
    assert {tag for tag, _ in found.elements}.isdisjoint({"script", "img"})
    assert found.words.count("alert(1)") >= 5
    assert "<img src=x>" in found.words


def test_no_private_path_host_or_token_is_in_the_page(
    make_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "attic-box")
    folder = make_run("a", data={"source": "/home/somebody/secret/text"})
    known = {"command": ["train", "--data", "/home/somebody/secret/text", "hf_abcdefgh1234"]}
    (folder / "env.json").write_text(json.dumps(known | {"system": "Linux attic-box"}))
    append(folder / EVENTS, [Paused("/home/somebody/a/PAUSE is there")])
    append(folder / EVENTS, [Grown(1, "/home/somebody/program", 1, 2)])
    deviations = ["data /home/somebody/secret/text"]
    (folder / "verdict.json").write_text(json.dumps(VERDICT | {"deviations": deviations}))
    text = written(folder)
    for private in ("somebody", "attic", "hf_abc", str(tmp_path), os.fspath(Path.home()) + "/"):
        assert private not in text, private
    assert ".../text" in text


def test_the_command_keeps_its_flags(make_run: Make) -> None:
    folder = make_run("a")
    command = ["train", "--data", "/home/x/my text", "--tokenizer", "/home/x/t5", "--seed", "3"]
    (folder / "env.json").write_text(json.dumps({"command": command}))
    told = "lowmem train --data '.../my text' --tokenizer .../t5 --seed 3"
    assert told in Page(written(folder)).words


def test_the_verdict_stands_with_its_deviations(make_run: Make) -> None:
    folder = make_run("a")
    assert "Verdict" not in Page(written(folder)).words
    (folder / "verdict.json").write_text(json.dumps(VERDICT))
    words = Page(written(folder)).words
    for told in (
        "Verdict",
        "reproduction: no match",
        "34.88",
        "measured35tolerance0.3488verdict",  # rounded
        "true perplexity",
        "35.6",
        "batch 8seq instead",
    ):
        assert told in words, told


@pytest.mark.parametrize("damage", [[], {"verdict": None}, {"deviations": 5}, {"published": {}}])
def test_any_verdict_gives_a_page(make_run: Make, damage: object) -> None:
    folder = make_run("a")
    (folder / "verdict.json").write_text(json.dumps(damage))
    Page(written(folder))


@pytest.mark.parametrize("losses", [(), (5.0,), (float("nan"), float("inf")), (900.0, 5.0)])
def test_a_run_of_any_length_has_a_page(make_run: Make, losses: tuple[float, ...]) -> None:
    folder = make_run("a", losses=losses, final=None, ended=False, corpus=None)
    words = Page(written(folder)).words
    assert ("Nothing has been trained yet" in words) == (not losses)
    assert "unfinished" in words


def test_published_results_stand_on_the_page_its_own_method_first(make_run: Make) -> None:
    words = Page(written(make_run("a", model="llama-60m", method="galore", data=PAPERS))).words
    assert words.index("galore, rank 0.25 of the width, 10,000 updates34.88") < words.index("fira,")
    assert "Published" not in Page(written(make_run("b", method="galore"))).words


def test_damage_is_told_on_the_page(make_run: Make) -> None:
    folder = make_run("a")
    (folder / "plan.json").write_text("{")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("{\n")
    words = Page(written(folder)).words
    assert "1 line is no record" in words
    assert "plan.json is damaged" in words


@pytest.mark.parametrize(
    "event",
    [{"event": 5}, {}, {"event": "saved", "bytes": "x"}, {"event": "skipped", "update": []}],
)
def test_odd_events_are_shown_and_break_nothing(make_run: Make, event: dict[str, object]) -> None:
    folder = make_run("a")
    with (folder / EVENTS).open("a") as file:
        file.write(json.dumps(event) + "\n")
    Page(written(folder))


def test_a_folder_that_cannot_be_written_is_told(
    make_run: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lowmem.analysis.report.write_whole", refuse)
    with pytest.raises(CheckpointError, match="No space left"):
        write_report(make_run("a"))


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on this machine")
@pytest.mark.parametrize("width", [360, 1280])
def test_a_browser_shows_the_page_without_scrolling_sideways(
    make_run: Make, tmp_path: Path, width: int
) -> None:
    folder = make_run("a-run-with-a-" + "very" * 20 + "-long-name", method="galore")
    (folder / "verdict.json").write_text(json.dumps(VERDICT | {"recipe": "x" * 200}))
    append(folder / EVENTS, [Skipped(1, "y" * 300, False, ["text at token 5"])])
    frame = f"""<!DOCTYPE html><iframe id="f" style="width:{width}px;height:800px;border:0"
      srcdoc="{escape(page(History.read(folder)))}"></iframe><p id="out"></p><script>
      onload = () => {{
        const page = document.getElementById("f").contentDocument;
        const root = page.documentElement;
        const drawn = [...page.querySelectorAll("svg")].map(s => s.getBoundingClientRect().width);
        document.getElementById("out").textContent =
          `wide ${{root.scrollWidth}} of ${{root.clientWidth}} figures ${{Math.min(...drawn)}}`;
      }};</script>"""
    (tmp_path / "frame.html").write_text(frame, encoding="utf-8")
    dom = subprocess.run(
        [
            str(BROWSER),
            *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
            *("--disable-background-networking", "--disable-component-update", "--disable-quic"),
            "--hide-scrollbars",
            f"--user-data-dir={tmp_path / 'profile'}",
            *("--dump-dom", f"file://{tmp_path / 'frame.html'}"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    found = re.search(r"wide (\d+) of (\d+) figures ([\d.]+)", dom)
    assert found is not None, dom[-500:]
    assert int(found[1]) == int(found[2]) == width
    assert float(found[3]) >= 300
