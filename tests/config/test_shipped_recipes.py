"""Every recipe that ships with the package trains, and each of its terms pulls on the student."""

from __future__ import annotations

import csv
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.support.models import narrow_checkpoint
from yolo_kd.config.recipe import load_recipe, shipped_recipes
from yolo_kd.engine.trainer import DistillationTrainer
from yolo_kd.environment import cpu_has_bf16

pytestmark = pytest.mark.e2e

SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> dict[str, Any]:
    """Data, teacher and student: real ones where they lie beside the repository, else drawn and random."""
    folder = tmp_path_factory.mktemp("ground")
    common = {
        "epochs": 2,
        "plots": False,
        "workers": 0,
        "cache": "ram",
        "val": False,
        "project": str(folder),
        "exist_ok": True,
    }
    if not SHARED.is_dir():
        # one that is sure of things, in float32: in bfloat16 random scores are all alike, which leaves crosskd no gap
        teacher = narrow_checkpoint("yolov8n", folder, width=0.25, seed=1, file="teacher.pt", sure=True)
        common = {**common, "teacher_precision": "fp32"}
        student = narrow_checkpoint("yolov8n", folder, seed=2, file="student.pt")
        return {**common, "data": str(shapes), "imgsz": 64, "batch": 8, "teacher": str(teacher), "model": str(student)}
    shutil.copytree(SHARED / "data" / "bccd", folder / "bccd")
    # all training images; validation is not what is tested here
    data = {"data": str(folder / "bccd" / "data.yaml"), "imgsz": 160, "batch": 16, "fraction": [1.0, 0.2]}
    if cpu_has_bf16():
        data = {**data, "amp": "bf16", "device": "cpu"}
    teacher_keys = {**common, **data, "epochs": 1, "model": str(SHARED / "weights" / "yolov8s.pt"), "name": "teacher"}
    trainer = DistillationTrainer(overrides={**teacher_keys, "kd": "none"})
    trainer.train()
    return {**common, **data, "teacher": str(trainer.best), "model": str(SHARED / "weights" / "yolov8n.pt")}


@pytest.mark.parametrize("name", shipped_recipes())
def test_two_epochs_with_every_term_pulling(name: str, ground: dict[str, Any]) -> None:
    trainer = DistillationTrainer(overrides={**ground, "kd": name, "name": name})
    trainer.train()
    recipe = load_recipe(name)
    assert [row.term for row in trainer.distillation.audit_rows] == [term.name for term in recipe.terms]
    assert all(row.gradient > 0 and math.isfinite(row.value) for row in trainer.distillation.audit_rows)
    with open(trainer.save_dir / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2
    for column in trainer.distillation.distiller.columns:
        assert all(math.isfinite(float(row[f"train/{column}"])) for row in rows), column
