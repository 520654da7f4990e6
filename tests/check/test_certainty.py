"""`yolo-kd check` on unlabeled images: how often detections are objects, and the thresholds that follow."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.check.test_check import asked, few, found, texts  # noqa: F401  (few is a fixture)
from yolo_kd.check import check
from yolo_kd.check.certainty import ENOUGH, judge
from yolo_kd.check.report import Report
from yolo_kd.config.unlabeled import UnlabeledOptions


def outcome(shares: list[float], pool: UnlabeledOptions, each: int = 100) -> Report:
    """Judge that many detections in each tenth of confidence from 0.1, of which these shares are objects."""
    report = Report({})
    confidence = np.repeat(np.arange(1, 10) / 10 + 0.05, each)
    hit = np.concatenate([np.arange(each) < share * each for share in shares])
    judge(report, pool, confidence, hit, 64)
    return report


CALIBRATED = [0.05, 0.1, 0.15, 0.25, 0.4, 0.6, 0.75, 0.9, 1.0]


def test_thresholds_that_fit() -> None:
    report = outcome(CALIBRATED, UnlabeledOptions(("p",), mode="both"))
    # above 0.4 are those around 0.45 and 0.55, of which 25 and 40 are objects
    assert found(
        report, "warning", "unlabeled: 200 of the teacher's 600 detections above unlabeled_conf=0.4", "lie below 0.6"
    )
    assert found(report, "warning", "in only 32% of cases", "Write unlabeled_conf=0.6 unlabeled_low=0.4.")
    ((title, rows),) = report.tables.items()
    assert "64 val images" in title
    assert rows[1] == ("0.1 to 0.2", "100", "5%")
    assert rows[-1] == ("0.9 to 1", "100", "100%")
    assert report.facts["certainty"]["objects"] == [5, 10, 15, 25, 40, 60, 75, 90, 100]
    # where detections are no labels, the band means nothing
    assert found(outcome(CALIBRATED, UnlabeledOptions(("p",), mode="distill")), "warning", "Write unlabeled_conf=0.6.")
    # and what it says is what it wants
    assert not outcome(CALIBRATED, UnlabeledOptions(("p",), mode="both", conf=0.6, low=0.4)).findings


def test_a_certain_teacher_and_a_blind_one() -> None:
    assert not outcome([0.5] * 9, UnlabeledOptions(("p",))).findings
    blind = outcome([0.1] * 9, UnlabeledOptions(("p",), mode="both"))
    assert found(
        blind, "warning", "600 of the teacher's 600 detections", "in only 10% of cases", "unlabeled_mode=distill"
    )


def test_few_detections_say_nothing() -> None:
    assert outcome([0.0] * 9, UnlabeledOptions(("p",), conf=0.9 - 1e-9), each=ENOUGH - 1).findings == []


@pytest.mark.e2e
def test_in_the_whole_check(
    few: None,  # noqa: F811
    shapes: Path,
    student: Path,
    sure: Path,
    tmp_path: Path,
) -> None:
    shutil.copytree(shapes.parent / "images" / "test", tmp_path / "pool")
    keys = {"unlabeled": str(tmp_path / "pool"), "kd": "objectness"}
    report = check(asked(sure, student, shapes, **keys, unlabeled_mode="both"))
    facts = report.to_dict()["certainty"]
    assert facts["images"] == 8
    assert sum(facts["detections"]) > ENOUGH
    assert sum(facts["objects"]) < 0.2 * sum(facts["detections"]), "weights are random"
    assert found(report, "warning", "detections above unlabeled_conf=0.4", "unlabeled_mode=distill")
    assert not found(report, "error", ""), texts(report)
    some = check(asked(sure, student, shapes, **keys, unlabeled_mode="both", classes=[1])).to_dict()["certainty"]
    assert 0 < sum(some["detections"]) < sum(facts["detections"]), "of one class of three"
    assert "certainty" not in check(asked(sure, student, shapes, **keys)).to_dict(), "nothing reads boxes there"
