"""What a student takes over from its teacher: exactly the tensors that agree, and an honest report of the rest."""

from __future__ import annotations

import copy
from pathlib import Path

import torch

from tests.models import narrow_model
from yolo_kd.inherit import inherit
from yolo_kd.taps import neck_and_head


def test_the_same_model_is_inherited_whole(tmp_path: Path) -> None:
    student, teacher = narrow_model("yolov8n", tmp_path, seed=1), narrow_model("yolov8n", tmp_path, seed=2)
    backbone = copy.deepcopy(student.model[0].state_dict())
    result = inherit(student, teacher)
    assert not result.kept
    assert result.parameters == result.total
    first = len(student.yaml["backbone"])
    for layer, partner in zip(student.model[first:], teacher.model[first:], strict=True):
        for a, b in zip(layer.state_dict().values(), partner.state_dict().values(), strict=True):
            assert torch.equal(a, b)
    assert all(
        torch.equal(a, b) for a, b in zip(student.model[0].state_dict().values(), backbone.values(), strict=True)
    )


def test_a_wider_teacher_gives_what_fits(tmp_path: Path) -> None:
    student = narrow_model("yolov8n", tmp_path, seed=1)
    teacher = narrow_model("yolov8n", tmp_path / "wide", width=0.25, seed=2)
    before = copy.deepcopy(student.state_dict())
    result = inherit(student, teacher)
    theirs = teacher.state_dict()
    assert result.taken
    assert result.kept
    for name, tensor in student.state_dict().items():
        if name in result.taken:
            assert torch.equal(tensor, theirs[name]), name
        else:
            assert torch.equal(tensor, before[name]), name
            assert name not in result.kept or tensor.shape != theirs[name].shape
    assert any(name.startswith("model.22.cv2.0.1") for name in result.taken)  # box branches are equally wide
    assert result.report().startswith(f"Inherited {len(result.taken)} of ")
    assert "shape (" in result.report()


def test_another_family_gives_its_head_only_where_layers_agree(tmp_path: Path) -> None:
    student, teacher = narrow_model("yolo11n", tmp_path, seed=1), narrow_model("yolov8n", tmp_path, seed=2)
    result = inherit(student, teacher)
    assert any(name.startswith("model.23.cv2") for name in result.taken)
    assert any("C3k2 here and C2f in the teacher" in reason for reason in result.kept.values())
    assert [place for place, _ in neck_and_head(student)][-1] == 0
