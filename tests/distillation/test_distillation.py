"""`Distillation` without a trainer: the documented loop, what it builds, and what it leaves behind."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ultralytics import YOLO
from ultralytics.cfg import get_cfg
from ultralytics.nn.tasks import DetectionModel

from tests.conftest import ROOT
from tests.distillation.test_criterion import make_batch
from tests.support.models import narrow_checkpoint, narrow_model
from yolo_kd import Distillation, load_recipe
from yolo_kd.distillation.finite_guard import FiniteGuard
from yolo_kd.errors import PairError
from yolo_kd.losses import Objectness

PAGE = ROOT / "docs" / "how-to" / "own-loop.md"


@pytest.fixture
def student(tmp_path: Path) -> DetectionModel:
    model = narrow_model("yolov8n", tmp_path, seed=1).train()
    model.args = get_cfg()
    model.names = {0: "circle", 1: "square", 2: "triangle"}
    return model


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return narrow_checkpoint("yolov8n", tmp_path, width=0.25, seed=2, file="wide.pt")


def step(distillation: Distillation, student: DetectionModel, **keys: Any) -> Any:
    batch = make_batch()
    distillation.begin(batch)
    return distillation.loss(distillation.observe(student(batch["img"]), batch), **keys)


@pytest.mark.e2e
def test_the_documented_loop_runs(
    tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch, student: DetectionModel, teacher: Path
) -> None:
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    loop = code[1].split("\n\n", 3)[3]
    assert len([line for line in loop.splitlines() if line.strip()]) <= 20, "about twenty lines"
    data = yaml.safe_load(shapes.read_text())
    (tmp_path / "my.yaml").write_text(yaml.safe_dump({"path": str(shapes.parent), **data}))
    file = narrow_checkpoint("yolov8n", tmp_path, seed=1, file="yolov8n.pt")
    before = YOLO(file).model.float().state_dict()
    (tmp_path / "yolov8s.pt").write_bytes(teacher.read_bytes())
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(compile(code[1].replace('"imgsz": 320', '"imgsz": 64'), str(PAGE), "exec"), found)
    assert found["losses"].total.isfinite()
    assert [row.term for row in found["distillation"].audit_rows] == [t.name for t in load_recipe("default").terms]
    assert not any(m._forward_hooks for m in found["student"].modules())
    after = YOLO(tmp_path / "distilled.pt").model
    assert type(after) is DetectionModel
    assert any(not torch.equal(v, before[k]) for k, v in after.float().state_dict().items())


def test_one_step_has_every_column_and_its_gradient(student: DetectionModel, teacher: Path) -> None:
    distillation = Distillation.build(student, teacher, {"losses": {"objectness": {}, "ultralytics": {}}})
    losses = step(distillation, student)
    assert {"box_loss", "cls_loss", "dfl_loss", "kcls_loss", "kbox_loss", "dis_loss"} == set(losses.items)
    assert losses.vector.shape == (6,)
    losses.total.backward()
    assert all(p.grad is not None for p in distillation.parameters())
    assert student.model[0].conv.weight.grad.abs().sum() > 0
    distillation.teacher.verify_untouched()


def test_layers_of_the_student_are_hooked_only_while_it_trains(student: DetectionModel, teacher: Path) -> None:
    recipe = {"losses": {"mimic": {"student_layers": ["model.9"], "teacher_layers": ["model.9"]}}}
    distillation = Distillation.build(student, teacher, recipe)
    layer = student.model[9]
    assert not layer._forward_hooks
    assert step(distillation, student).items["mimic_loss"] > 0
    assert layer._forward_hooks
    distillation.detach()
    assert not layer._forward_hooks
    assert step(distillation, student).items["mimic_loss"] > 0, "the next step adds the hooks again"
    distillation.close()
    assert not any(m._forward_hooks for m in student.modules())
    assert not any(m._forward_hooks for m in distillation.teacher.model.modules())


def test_state_returns_to_another_run(tmp_path: Path, student: DetectionModel, teacher: Path) -> None:
    first, second = (Distillation.build(student, teacher, "cwd") for _ in range(2))
    assert any(not torch.equal(v, second.state_dict()[k]) for k, v in first.state_dict().items())
    second.load_state_dict(first.state_dict())
    assert all(torch.equal(v, second.state_dict()[k]) for k, v in first.state_dict().items())


def test_a_rehearsal_changes_nothing(student: DetectionModel, teacher: Path) -> None:
    distillation = Distillation.build(student, teacher, "objectness")
    copy = distillation.rehearsal()
    step(copy, copy.student).total.backward()
    assert all(p.grad is None for p in student.parameters())
    assert not copy.audit_rows
    assert distillation.teacher._runner is None


def test_no_common_class_is_an_error(tmp_path: Path, student: DetectionModel, teacher: Path) -> None:
    student.names = {0: "boat", 1: "plane", 2: "train"}
    with pytest.raises(PairError, match="none of"):
        Distillation.build(student, teacher, "objectness")


def test_progress_reaches_schedules(student: DetectionModel, teacher: Path) -> None:
    recipe = {"losses": {"objectness": {"schedule": {"kind": "linear", "end": 0.0}}}}
    distillation = Distillation.build(student, teacher, recipe)
    distillation.audits = False
    assert step(distillation, student, progress=0.0).items["kcls_loss"] > 0
    assert step(distillation, student, progress=1.0).items["kcls_loss"] == 0


def test_a_guard_keeps_a_bad_batch_out(student: DetectionModel, teacher: Path) -> None:
    distillation = Distillation.build(student, teacher, "objectness")
    distillation.audits = False
    distillation.guard = FiniteGuard(distillation.parameters())
    term = distillation.distiller.losses["objectness"]
    assert isinstance(term, Objectness)
    forward = term.forward
    term.forward = lambda inputs: {k: v * torch.nan for k, v in forward(inputs).items()}  # type: ignore[method-assign]
    losses = step(distillation, student)
    assert losses.total == 0
    assert distillation.guard.skipped == 1
