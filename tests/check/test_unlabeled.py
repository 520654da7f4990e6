"""`yolo-kd check` on unlabeled images: foreign images, shared images, and what cannot be used."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import ks_2samp

from tests.check.test_check import asked, few, found, texts  # noqa: F401  (few is a fixture)
from yolo_kd.check import check, unlabeled


@pytest.fixture
def pool(tmp_path: Path, shapes: Path) -> Path:
    shutil.copytree(shapes.parent / "images" / "test", tmp_path / "pool")
    return tmp_path / "pool"


@pytest.mark.e2e
def test_images_of_the_same_kind(few: None, shapes: Path, student: Path, sure: Path, pool: Path) -> None:  # noqa: F811
    report = check(asked(sure, student, shapes, kd="objectness", unlabeled=str(pool), unlabeled_conf=0.3))
    facts = report.to_dict()["unlabeled"]
    assert facts["images"] == 8
    assert facts["unlabeled_conf"] == 0.3
    assert facts["confidence"].keys() == {"unlabeled", "train"}
    assert 0 <= facts["distance"] <= 1
    assert not found(report, "warning", "unlabeled:"), texts(report)
    assert not found(report, "error", ""), texts(report)


@pytest.mark.e2e
def test_foreign_and_shared_images(
    few: None,  # noqa: F811
    shapes: Path,
    student: Path,
    sure: Path,
    pool: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for i in range(12):  # blank images next to drawn ones
        Image.fromarray(np.full((96, 96, 3), 10 + i, np.uint8)).save(pool / f"blank{i}.png")
    for path in sorted((shapes.parent / "images" / "val").iterdir())[:2]:
        shutil.copy(path, pool / f"val{path.name}")
    for path in (shapes.parent / "images" / "test").iterdir():
        (pool / path.name).unlink()
    (pool / "broken.jpg").write_text("no image")
    before = sorted((p, p.stat().st_mtime_ns) for p in pool.rglob("*"))
    report = check(asked(sure, student, shapes, kd="objectness", unlabeled=str(pool)))
    assert found(report, "warning", "2 of 14 images of unlabeled=", "are validation images as well")
    assert found(report, "warning", "1 of 15 images of unlabeled=", "cannot be opened: broken.jpg")
    assert found(report, "warning", "the unlabeled images look foreign to the teacher"), report.to_dict()["unlabeled"]
    facts = report.to_dict()["unlabeled"]
    assert facts["distance"] > unlabeled.FAR
    assert facts["p_value"] < unlabeled.SURE
    assert sorted((p, p.stat().st_mtime_ns) for p in pool.rglob("*")) == before


@pytest.mark.e2e
def test_what_cannot_be_used_is_a_finding(
    few: None,  # noqa: F811
    shapes: Path,
    student: Path,
    sure: Path,
    tmp_path: Path,
) -> None:
    report = check(asked(sure, student, shapes, kd="objectness", unlabeled=str(tmp_path / "no")))
    assert found(report, "error", "unlabeled: unlabeled=", "does not exist")


@pytest.mark.e2e
def test_a_data_set_without_labels(
    few: None,  # noqa: F811
    shapes: Path,
    student: Path,
    sure: Path,
    pool: Path,
    tmp_path: Path,
) -> None:
    data = tmp_path / "data.yaml"
    data.write_text(f"path: {shapes.parent}\nval: images/val\nnames: [circle, square, triangle]\n")
    report = check(asked(sure, student, data, kd="objectness", unlabeled=str(pool)))
    assert found(report, "note", "no training image has labels")
    assert not found(report, "error", ""), texts(report)
    assert report.to_dict()["unlabeled"]["confidence"].keys() == {"unlabeled", "val"}


def test_chance_alone_does_not_look_foreign() -> None:
    """On two samples of one distribution the thresholds are crossed in less than one of fifty."""
    rng = np.random.default_rng(0)
    tests = [ks_2samp(rng.random(n), rng.random(64)) for n in (5, 16, 64) for _ in range(100)]
    crossed = [t.statistic > unlabeled.FAR and t.pvalue < unlabeled.SURE for t in tests]
    assert np.mean(crossed) < 0.02
    assert ks_2samp(rng.random(16), 0.5 + rng.random(64)).pvalue < unlabeled.SURE
