"""`yolo-kd check` on a pool: how often the teacher's detections are labelled objects, and what thresholds follow."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.test_checks import asked, few, found, texts  # noqa: F401  (few is a fixture)
from yolo_kd.checks import check
from yolo_kd.checks.certainty import ENOUGH, OVERLAP, judge, objects
from yolo_kd.checks.report import Report
from yolo_kd.detections import Detections
from yolo_kd.pool import Pool


def overlap(a: list[float], b: list[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0) * max(height, 0)
    areas = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    return both / (sum(areas) - both)


def test_a_label_is_found_once_and_by_the_most_certain() -> None:
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(60, 2, generator=generator) * 40
    boxes = torch.cat([corner, corner + 10 + torch.rand(60, 2, generator=generator) * 6], 1)
    labels = torch.randint(0, 2, (60,), generator=generator)
    theirs, own = boxes[:25], boxes[25:]
    confidence = torch.rand(35, generator=generator).sort(descending=True).values
    ours = objects(Detections(own, labels[25:], confidence, torch.zeros(35)), theirs, labels[:25])
    expected, free = [], dict(enumerate(theirs.tolist()))
    for box, label in zip(own.tolist(), labels[25:].tolist(), strict=True):
        cover = {i: overlap(box, other) for i, other in free.items() if labels[i] == label}
        best = max(cover, key=cover.__getitem__, default=None)
        expected.append(best is not None and cover[best] >= OVERLAP)
        if best is not None and expected[-1]:
            del free[best]
    assert ours.tolist() == expected
    assert 5 < sum(expected) < 25, "the test would show little"


@pytest.mark.parametrize(("detections", "labelled"), [(3, 0), (0, 3), (0, 0)])
def test_nothing_there(detections: int, labelled: int) -> None:
    found_ = Detections(torch.rand(detections, 4), torch.zeros(detections), torch.rand(detections), torch.zeros(0))
    hit = objects(found_, torch.rand(labelled, 4), torch.zeros(labelled))
    assert hit.tolist() == [False] * detections


def outcome(shares: list[float], pool: Pool, each: int = 100) -> Report:
    """Judge that many detections in each tenth of confidence from 0.1, of which these shares are objects."""
    report = Report({})
    confidence = np.repeat(np.arange(1, 10) / 10 + 0.05, each)
    hit = np.concatenate([np.arange(each) < share * each for share in shares])
    judge(report, pool, confidence, hit, 64)
    return report


CALIBRATED = [0.05, 0.1, 0.15, 0.25, 0.4, 0.6, 0.75, 0.9, 1.0]


def test_thresholds_that_fit() -> None:
    report = outcome(CALIBRATED, Pool(("p",), mode="both"))
    # above 0.4 are those around 0.45 and 0.55, of which 25 and 40 are objects
    assert found(
        report, "warning", "pool: 200 of the teacher's 600 detections above unlabeled_conf=0.4", "lie below 0.6"
    )
    assert found(report, "warning", "in 32% of cases only", "Write unlabeled_conf=0.6 unlabeled_low=0.4.")
    ((title, rows),) = report.tables.items()
    assert "64 val images" in title
    assert rows[1] == ("0.1 to 0.2", "100", "5%")
    assert rows[-1] == ("0.9 to 1", "100", "100%")
    assert report.facts["certainty"]["objects"] == [5, 10, 15, 25, 40, 60, 75, 90, 100]
    # where detections are no labels, the band means nothing
    assert found(outcome(CALIBRATED, Pool(("p",), mode="distill")), "warning", "Write unlabeled_conf=0.6.")
    # and what it says is what it wants
    assert not outcome(CALIBRATED, Pool(("p",), mode="both", conf=0.6, low=0.4)).findings


def test_a_certain_teacher_and_a_blind_one() -> None:
    assert not outcome([0.5] * 9, Pool(("p",))).findings
    blind = outcome([0.1] * 9, Pool(("p",), mode="both"))
    assert found(
        blind, "warning", "600 of the teacher's 600 detections", "in 10% of cases only", "unlabeled_mode=distill"
    )


def test_few_detections_say_nothing() -> None:
    assert outcome([0.0] * 9, Pool(("p",), conf=0.9 - 1e-9), each=ENOUGH - 1).findings == []


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
