"""Plots: the same for the same numbers, valid XML, and legible without colour."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.support.comparison import fake_summary
from yolo_kd.compare import plots
from yolo_kd.compare.records import Summary


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> Summary:
    gains = {"fgd": (0.02, -0.01, 0.0), "objectness": (0.03, 0.031, 0.032)}
    return fake_summary(tmp_path_factory.mktemp("s"), gains, broken=("fgd seed 0",))[0]


def all_of(summary: Summary) -> list[str | None]:
    return [
        plots.differences(summary, "test"),
        plots.learning_curves(summary),
        plots.loss_terms(summary, "fgd"),
        plots.groups(summary, "classes", "val"),
        plots.groups(summary, "sizes", "test"),
    ]


def test_equal_numbers_make_equal_pictures(summary: Summary) -> None:
    first = all_of(summary)
    assert first == all_of(summary)
    for svg in first:
        assert svg is not None
        ElementTree.fromstring(svg)
        assert "<dc:date>" not in svg


def test_missing_results_are_not_drawn(summary: Summary, tmp_path: Path) -> None:
    assert plots.loss_terms(summary, "baseline") is None
    names = [f"{arm} seed 0" for arm in ("baseline", "fgd")]
    empty = fake_summary(tmp_path, {"fgd": (0.1,)}, broken=names)[0]
    assert plots.groups(empty, "classes", "val") is None
    for svg in (plots.differences(empty, "val"), plots.learning_curves(empty)):
        ElementTree.fromstring(svg)


def test_arms_differ_in_line_and_marker_not_only_in_colour() -> None:
    styles = [plots.style_of(n) for n in range(8)]
    assert len({str(line) for _, line, _ in styles}) == 8
    assert len({marker for _, _, marker in styles}) == 8
    assert plots.style_of(8) == plots.style_of(0)


def test_the_reference_comes_first(summary: Summary) -> None:
    last = summary.model_copy(update={"reference": "objectness"})
    assert [arm.name for arm in summary.by_reference] == ["baseline", "fgd", "objectness"]
    assert [arm.name for arm in last.by_reference] == ["objectness", "baseline", "fgd"]
    assert [arm.name for arm in last.others] == ["baseline", "fgd"]
