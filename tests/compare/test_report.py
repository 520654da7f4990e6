"""The page and its three companions: what they hold, and what a browser makes of them."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.support import browser
from tests.support.comparison import fake_summary
from tests.support.models import narrow_checkpoint
from yolo_kd.compare import report
from yolo_kd.compare.report import draw, html, markdown, tables, write_report

SECTIONS = (
    "verdict", "arms", "differences", "curves", "terms", "classes", "sizes", "scenes", "attention", "reading",
    "failures", "record",
)  # fmt: skip
GAINS = {"objectness": (0.030, 0.031, 0.032), "fgd": (0.02, -0.03, 0.01)}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Path]]:
    """A whole report, with attention maps of small random models and a failed run."""
    folder = tmp_path_factory.mktemp("report")
    summary, parts, comparison = fake_summary(folder, GAINS, broken=("fgd seed 2",))
    model = narrow_checkpoint("yolov8n", folder)
    parts["checkpoints"] = dict.fromkeys(parts["checkpoints"], model)
    parts["teachers"] = {str(model): next(iter(parts["teachers"].values()))}
    return summary, write_report(comparison.folder, summary, parts)


class Page(HTMLParser):
    """Collects ids, pictures and whatever could load something."""

    def __init__(self, text: str):
        super().__init__()
        self.ids: list[str] = []
        self.pictures: list[dict[str, str | None]] = []
        self.loads: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.add(tag)
        if found.get("id"):
            self.ids.append(str(found["id"]))
        if tag == "img":
            self.pictures.append(found)
        self.loads += [str(found[key]) for key in ("src", "href", "srcset", "data", "action") if found.get(key)]


def test_the_page_stands_alone(made: tuple) -> None:
    text = made[1]["html"].read_text(encoding="utf-8")
    page = Page(text)
    assert set(SECTIONS) <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert not page.tags & {"script", "iframe", "object", "embed", "form", "video", "audio"}
    assert all(link.startswith(("data:", "#")) for link in page.loads)
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org)", re.sub(r"base64,[^\"]+", "", text))
    assert all(picture.get("alt") for picture in page.pictures)
    # plots, two attention rows of three models and levels, side-by-side panels
    assert len(page.pictures) > 20
    assert all(f"#{link.lstrip('#')}" in [f"#{i}" for i in page.ids] for link in page.loads if link.startswith("#"))


def test_the_verdict_is_the_first_thing_said(made: tuple) -> None:
    summary, files = made
    text = files["html"].read_text(encoding="utf-8")
    assert text.index(summary["verdict"].split(",")[0]) < text.index("<nav")
    assert "▲ better" in text
    assert "fgd seed 2: It ended with exit code 1." in text
    assert "RuntimeError: &lt;out&gt; of memory &amp; more" in text  # what a run printed is text, not markup


def test_nothing_was_left_undrawn(made: tuple) -> None:
    text = made[1]["html"].read_text(encoding="utf-8")
    assert "Not drawn" not in text
    assert "52 % of the task loss" in text
    for model in ("teacher", "baseline", "objectness"):
        assert f"<strong>{model}</strong>" in text


def test_a_browser_asks_for_nothing_and_has_no_complaint(made: tuple, tmp_path: Path) -> None:
    seen = browser.visit(made[1]["html"], tmp_path)
    assert seen.requests == []
    assert seen.console == []
    assert set(SECTIONS) <= set(Page(seen.dom).ids)


def test_the_browser_test_would_notice(tmp_path: Path) -> None:
    """The check above is only worth something if it fails on a page that does what ours must not."""
    page = tmp_path / "bad.html"
    page.write_text("<script>console.error('broken')</script><img src='http://127.0.0.1:9/x.png'><p id='a'>text")
    seen = browser.visit(page, tmp_path)
    assert any("127.0.0.1:9" in url for url in seen.requests)
    assert any("broken" in line for line in seen.console)


PROBE = """<!DOCTYPE html><body style="margin:0"><iframe id="f" style="border:0" width="390" height="4000"></iframe>
<script>
const frame = document.getElementById("f");
frame.srcdoc = decodeURIComponent("TEXT").replace(/<meta http-equiv[^>]*>/, "");
frame.onload = () => {
  const page = frame.contentDocument;
  const shown = [...page.querySelectorAll("body *")].filter((e) => !e.closest("thead"));  // for screen readers there
  const wide = shown.filter((e) => e.getBoundingClientRect().right > 390.5);
  document.body.insertAdjacentHTML("beforeend",
    `<output id="width">${page.documentElement.scrollWidth} ${wide.length}</output>`);
};
</script>"""


def test_nothing_is_cut_off_on_a_phone(made: tuple, tmp_path: Path) -> None:
    from urllib.parse import quote

    probe = tmp_path / "probe.html"
    probe.write_text(PROBE.replace("TEXT", quote(made[1]["html"].read_text(encoding="utf-8"))), encoding="utf-8")
    seen = browser.visit(probe, tmp_path, "--virtual-time-budget=10000")
    found = re.search(r'<output id="width">(\d+) (\d+)', seen.dom)
    assert found is not None
    assert (int(found[1]), int(found[2])) == (390, 0)


def test_the_other_files(made: tuple) -> None:
    summary, files = made
    again = json.loads(files["json"].read_text(encoding="utf-8"))
    assert again["verdict"] == summary["verdict"]
    text = files["md"].read_text(encoding="utf-8")
    assert text.startswith(f"**{summary['verdict']}**")
    for title in ("What was trained", "Accuracy on val", "Accuracy on test", "Cost", "Failed", "How to read it"):
        assert f"### {title}" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in rows)
    assert files["csv"].read_text().count("\n") == 1 + len(summary["runs"])


def test_tables_have_one_cell_per_column(made: tuple) -> None:
    for title, head, rows in tables(made[0]):
        assert rows, title
        assert {len(row) for row in rows} == {len(head)}, title


def test_numbers_that_json_does_not_know_become_null(tmp_path: Path) -> None:
    assert report._finite({"a": [float("nan"), float("inf"), 1.0], "b": ({"c": -float("inf")},)}) == {
        "a": [None, None, 1.0],
        "b": [{"c": None}],
    }


def test_a_comparison_in_which_everything_failed_has_a_page(tmp_path: Path) -> None:
    names = [f"{arm} seed {seed}" for arm in ("baseline", "fgd") for seed in range(3)]
    summary, parts, _ = fake_summary(tmp_path, {"fgd": (0.1, 0.1, 0.1)}, broken=names)
    text = html(summary, draw(summary, parts))
    assert set(SECTIONS) <= set(Page(text).ids)
    assert "no result" in text
    assert "Not drawn" not in text
    assert markdown(summary)


def test_what_cannot_be_drawn_is_said(tmp_path: Path) -> None:
    summary, parts, _ = fake_summary(tmp_path, {"fgd": (0.1, 0.1, 0.1)})  # whose checkpoints do not exist
    text = html(summary, draw(summary, parts))
    assert "Not drawn: scenes: CheckpointError: model=teacher.pt does not exist." in text


def test_many_classes_and_long_names(tmp_path: Path) -> None:
    summary, parts, _ = fake_summary(tmp_path, {"fgd": (0.1, 0.11, 0.12)})
    for arm in summary["arms"]:
        part = arm["classes"]["val"]["circle"]
        arm["classes"]["val"] = {f"a class with a name of unusual length, number {i}": part for i in range(80)}
    drawn = draw(summary, parts)
    assert set(drawn["classes"]) == {"val", "test"}
    assert "number 79" in html(summary, drawn)
