"""The page and the three other files of a report: their content, and the page in a browser."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.support import browser
from tests.support.comparison import fake_summary
from yolo_kd.compare.evaluate import predictions_file
from yolo_kd.compare.records import ArmSummary, Summary
from yolo_kd.compare.report import Drawings, draw, html, markdown, write_report
from yolo_kd.compare.tables import tables

SECTIONS = (
    "verdict", "arms", "differences", "curves", "terms", "classes", "sizes", "examples", "reading", "failures",
    "record",
)  # fmt: skip
GAINS = {"objectness": (0.030, 0.031, 0.032), "fgd": (0.02, -0.03, 0.01)}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Summary, dict[str, Path], Drawings]:
    """A whole report, with a failed run."""
    folder = tmp_path_factory.mktemp("report")
    summary, measured, comparison = fake_summary(folder, GAINS, broken=("fgd seed 2",))
    return summary, write_report(comparison.folder, summary, measured), draw(summary, measured)


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
    # differences by seed, class and size on two splits, curves, terms of two arms, and four panels for each example
    assert len(page.pictures) == 3 * 2 + 1 + 2 + 4 * len(made[2].examples)
    assert len(made[2].examples) > 1
    assert all(f"#{link.lstrip('#')}" in [f"#{i}" for i in page.ids] for link in page.loads if link.startswith("#"))


def test_the_verdict_comes_first(made: tuple) -> None:
    summary, files, _ = made
    text = files["html"].read_text(encoding="utf-8")
    assert text.index(summary.verdict.split(",")[0]) < text.index("<nav")
    assert "▲ better" in text
    assert "fgd seed 2: It ended with exit code 1." in text
    assert "RuntimeError: &lt;out&gt; of memory &amp; more" in text  # what a run printed is text, not markup


def test_everything_is_drawn(made: tuple) -> None:
    text = made[1]["html"].read_text(encoding="utf-8")
    assert "Not drawn" not in text
    assert "52 % of the task loss" in text
    for panel in ("labels", "teacher", "baseline", "objectness"):
        assert f"<figcaption>{panel}</figcaption>" in text


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
    summary, files, _ = made
    again = json.loads(files["json"].read_text(encoding="utf-8"))
    assert again["verdict"] == summary.verdict
    assert Summary.from_json(json.dumps(again)) == summary
    text = files["md"].read_text(encoding="utf-8")
    assert text.startswith(f"**{summary.verdict}**")
    for title in ("What was trained", "Accuracy on val", "Accuracy on test", "Cost", "Failed", "How to read it"):
        assert f"### {title}" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in rows)
    assert files["csv"].read_text().count("\n") == 1 + len(summary.runs)


def test_tables_have_one_cell_per_column(made: tuple) -> None:
    for table in tables(made[0]):
        assert table.rows, table.title
        assert {len(row) for row in table.rows} == {len(table.head)}, table.title


def test_numbers_that_json_does_not_know_become_null(made: tuple) -> None:
    run = made[0].runs[0].model_copy(update={"seconds": float("inf"), "curve": ((1.0, float("nan")),)})
    text = made[0].model_copy(update={"runs": (run,), "evaluation": {"iou": -float("inf")}}).to_json()

    def refuse(word: str) -> None:
        raise AssertionError(word)

    again = json.loads(text, parse_constant=refuse)
    assert again["runs"][0]["seconds"] is None
    assert again["runs"][0]["curve"] == [[1.0, None]]
    assert again["evaluation"] == {"iou": None}


def test_a_comparison_in_which_everything_failed_has_a_page(tmp_path: Path) -> None:
    names = [f"{arm} seed {seed}" for arm in ("baseline", "fgd") for seed in range(3)]
    summary, measured, _ = fake_summary(tmp_path, {"fgd": (0.1, 0.1, 0.1)}, broken=names)
    text = html(summary, draw(summary, measured))
    assert set(SECTIONS) <= set(Page(text).ids)
    assert "no result" in text
    assert "Not drawn" not in text
    assert markdown(summary)


def test_what_cannot_be_drawn_is_reported(tmp_path: Path) -> None:
    summary, measured, _ = fake_summary(tmp_path, {"fgd": (0.1, 0.1, 0.1)})
    lost = predictions_file(measured.cache, measured.evaluations["fgd seed 1"].key, "val")
    lost.unlink()
    text = html(summary, draw(summary, measured))
    assert "Not drawn: examples: FileNotFoundError: " in text
    assert lost.name in text
    assert "They could not be drawn." in text


def test_an_image_that_is_gone_is_left_out(tmp_path: Path) -> None:
    summary, measured, _ = fake_summary(tmp_path, {"fgd": (0.1, 0.1, 0.1)})
    shown = draw(summary, measured).examples
    assert len(shown) > 1
    (tmp_path / "pictures" / shown[0].name).unlink()
    assert [example.name for example in draw(summary, measured).examples] == [example.name for example in shown[1:]]


def test_many_classes_and_long_names(tmp_path: Path) -> None:
    summary, measured, _ = fake_summary(tmp_path, {"fgd": (0.1, 0.11, 0.12)})

    def many(arm: ArmSummary) -> ArmSummary:
        score = arm.classes["val"]["circle"]
        names = {f"a class with a name of unusual length, number {i}": score for i in range(80)}
        return arm.model_copy(update={"classes": {**arm.classes, "val": names}})

    summary = summary.model_copy(update={"arms": tuple(many(arm) for arm in summary.arms)})
    drawn = draw(summary, measured)
    assert set(drawn.groups["classes"]) == {"val", "test"}
    assert "number 79" in html(summary, drawn)
