"""What a student takes over from its teacher: exactly the tensors that agree, and an honest report of the rest."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from ultralytics import YOLO
from ultralytics.nn.modules import C2f, Concat
from ultralytics.nn.tasks import DetectionModel

from tests.support.models import narrow_model, narrow_yaml
from yolo_kd.distillation.student_init import inherit, thin
from yolo_kd.engine.trainer import DistillationTrainer
from yolo_kd.errors import ConfigError
from yolo_kd.upstream.heads import neck_and_head


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


# ------------------------------------------------------------------------------------------------ thinned


def test_half_the_channels_of_every_layer(tmp_path: Path) -> None:
    student = narrow_model("yolov8n", tmp_path, seed=1)
    teacher = narrow_model("yolov8n", tmp_path / "wide", width=0.25, seed=2)
    result = thin(student, teacher)
    assert not result.kept
    assert result.parameters == result.total
    theirs = {name: tensor.numpy() for name, tensor in teacher.state_dict().items()}
    for name, tensor in student.state_dict().items():
        steps = [wide // own for own, wide in zip(tensor.shape, theirs[name].shape, strict=True)]
        expected = theirs[name][np.ix_(*(range(0, n, k) for n, k in zip(theirs[name].shape, steps, strict=True)))]
        assert np.array_equal(tensor.numpy(), expected if tensor.ndim else theirs[name]), name


def scaled(folder: Path, depth: float, width: float, limit: int) -> DetectionModel:
    """Return a YOLOv8 whose weights are the numbers of their input channels, shifts those of the output channels."""
    path = narrow_yaml("yolov8n", folder)
    config = yaml.safe_load(path.read_text())
    config["scales"] = {"n": [depth, width, limit]}
    path.write_text(yaml.safe_dump(config))
    model = DetectionModel(str(path), nc=3, verbose=False)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.copy_(torch.arange(module.in_channels)[:, None, None].expand_as(module.weight))
            if isinstance(module, nn.BatchNorm2d):
                module.bias.copy_(torch.arange(module.num_features))
    return model


def inputs_of(convolution: Any) -> list[int]:
    return convolution.conv.weight[0, :, 0, 0].int().tolist()


def layer_outputs(convolution: Any) -> list[int]:
    return convolution.bn.bias.int().tolist()


def test_what_reads_several_layers_reads_of_each_what_the_student_has(tmp_path: Path) -> None:
    """Of capped widths the student has a half in the deepest maps and a quarter in the others; and it is less deep."""
    student, teacher = scaled(tmp_path, 0.33, 0.125, 1024), scaled(tmp_path / "wide", 0.67, 0.5, 512)
    result = thin(student, teacher)
    assert not result.kept
    layers, theirs = student.model, teacher.model

    def source(index: int) -> int:
        return source(index - 1) if isinstance(layers[index], nn.Upsample) else index

    joined = 0
    for i, layer in enumerate(layers[:-1]):
        if isinstance(layers[i - 1], Concat) and i:
            expected, start = [], 0
            for j in layers[i - 1].f:
                j = source(i - 1 + j if j < 0 else j)
                last = getattr(layers[j], "cv2", layers[j])
                expected += [start + channel for channel in layer_outputs(last)]
                start += getattr(theirs[j], "cv2", theirs[j]).conv.out_channels
            assert inputs_of(layer.cv1) == expected
            joined += 1
        if isinstance(layer, C2f):
            start = theirs[i].cv1.conv.out_channels
            expected = layer_outputs(layer.cv1)
            assert len(layer.m) < len(theirs[i].m) or len(theirs[i].m) == 1
            for block, wide in zip(layer.m, theirs[i].m, strict=False):  # the student has the first ones
                expected += [start + channel for channel in layer_outputs(block.cv2)]
                start += wide.cv2.conv.out_channels
            assert inputs_of(layer.cv2) == expected
    assert joined == 4


def test_a_thinned_copy_of_a_model_with_idle_channels_computes_the_same(tmp_path: Path) -> None:
    student = narrow_model("yolov8n", tmp_path, seed=1)
    teacher = narrow_model("yolov8n", tmp_path / "wide", width=0.25, seed=2)
    with torch.no_grad():
        for module in teacher.modules():  # what the student leaves out adds nothing
            if isinstance(module, nn.Conv2d) and module.in_channels % 16 == 0:
                module.weight[:, 1::2] = 0
    # of box branches, which are equally wide, the student has all channels
    for branch, own in zip(teacher.model[-1].cv2, student.model[-1].cv2, strict=True):
        assert branch[1].conv.in_channels == own[1].conv.in_channels
    thin(student, teacher)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        ours, theirs = student.eval()(images)[0], teacher.eval()(images)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["yolov5n", "yolov9t", "yolov10n", "yolo11n", "yolo26n"])
def test_other_families(family: str, tmp_path: Path) -> None:
    student, teacher = narrow_model(family, tmp_path, seed=1), narrow_model(family, tmp_path / "w", width=0.5, seed=2)
    before = copy.deepcopy(student.state_dict())
    result = thin(student, teacher)
    assert result.parameters > 0.8 * result.total
    reasons = ("channels of an attention", "here, ")
    assert all(any(r in reason for r in reasons) for reason in result.kept.values()), set(result.kept.values())
    for name, tensor in student.state_dict().items():
        assert name in result.taken or torch.equal(tensor, before[name])
    student.eval()(torch.rand(1, 3, 64, 64))


def test_a_narrower_teacher_and_other_classes(tmp_path: Path) -> None:
    student = narrow_model("yolov8n", tmp_path, width=0.25, seed=1)
    teacher = narrow_model("yolov8n", tmp_path / "narrow", seed=2)
    before = copy.deepcopy(student.state_dict())
    result = thin(student, teacher)
    assert "shape (64, 32, 3, 3) here, (32, 16, 3, 3) in the teacher" in result.kept.values()
    assert all(torch.equal(student.state_dict()[name], before[name]) for name in result.kept)
    teacher = narrow_model("yolov8n", tmp_path / "wide", width=0.5, nc=5, seed=2)
    result = thin(student, teacher, same_classes=False)
    assert set(result.kept.values()) == {"the classes are others, or in another order"}
    assert len(result.kept) == 6  # weight and bias of each level


def test_single_layers_of_another_family_are_no_start(tmp_path: Path) -> None:
    student, teacher = narrow_model("yolov8n", tmp_path, seed=1), narrow_model("yolo11n", tmp_path / "w", width=0.25)
    before = copy.deepcopy(student.state_dict())
    assert not thin(student, teacher, least=0.5).taken
    result = thin(student, teacher, least=0.5)
    assert result.parameters == 0
    assert any("of the student has a counterpart in the teacher" in reason for reason in result.kept.values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    assert 0 < thin(student, teacher).parameters < 0.5 * result.total


def started(
    folder: Path, data: Path, teacher: Path, caplog: pytest.LogCaptureFixture, **keys: Any
) -> tuple[bool, dict[str, torch.Tensor]]:
    """Set a training up; return whether its log speaks of inheriting, and the student's weights."""
    keys = {"imgsz": 64, "batch": 8, "epochs": 1, "workers": 0, "plots": False, "teacher": str(teacher), **keys}
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="ultralytics"):
        trainer = DistillationTrainer(
            overrides={"data": str(data), "project": str(folder), "name": "run", "exist_ok": True, **keys}
        )
        trainer._setup_train()
    assert ("inherit=false leaves them random" in caplog.text) == ("Inherited" in caplog.text and "inherit" not in keys)
    return "Inherited" in caplog.text, {k: v.clone() for k, v in trainer.model.state_dict().items()}


@pytest.mark.e2e
def test_the_default_recipe_starts_students_without_weights_from_the_teacher(
    tmp_path: Path, shapes: Path, student: Path, teacher: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("ultralytics").propagate = True
    fresh = str(narrow_yaml("yolov8n", tmp_path))
    wide = YOLO(teacher).model.float().state_dict()["model.2.cv1.conv.weight"]
    for keys, thinned in (
        ({"model": fresh}, True),
        ({"model": fresh, "inherit": False}, False),
        ({"model": fresh, "kd": "objectness"}, False),
        ({"model": fresh, "kd": "objectness", "inherit": "thinned"}, True),
        ({"model": str(student)}, False),
        ({"model": str(student), "inherit": "thinned"}, True),
    ):
        said, weights = started(tmp_path, shapes, teacher, caplog, **keys)
        assert said == thinned, keys
        assert torch.equal(weights["model.2.cv1.conv.weight"], wide[::2, ::2]) == thinned, keys


def test_what_inherit_may_be(shapes: Path, student: Path, teacher: Path) -> None:
    keys = {"data": str(shapes), "model": str(student), "teacher": str(teacher), "inherit": "thin"}
    with pytest.raises(ConfigError, match=r"inherit must be true, false or thinned, received 'thin'\. Did you mean"):
        DistillationTrainer(overrides=keys)
