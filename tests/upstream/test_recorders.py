"""Recorders, outputs and targets against plain Ultralytics."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ultralytics.cfg import get_cfg
from ultralytics.nn.tasks import OBBModel, PoseModel, yaml_model_load
from ultralytics.utils.ops import xywh2xyxy

from tests.support.models import narrow_model
from yolo_kd.errors import ConfigError
from yolo_kd.upstream.heads import (
    bins_of,
    channels_of,
    family_of,
    find_layers,
    head_split_points,
    head_tails,
    neck_layers,
    strides_of,
)
from yolo_kd.upstream.pairing import pair_spec
from yolo_kd.upstream.recorders import AssignmentRecorder, LayerRecorder, outputs_of
from yolo_kd.upstream.task_loss import cut, targets_of


def batch() -> dict:
    return {
        "img": torch.rand(2, 3, 64, 96),
        "bboxes": torch.tensor([[0.5, 0.5, 0.5, 0.25], [0.25, 0.25, 0.1, 0.2]]),
        "cls": torch.tensor([[1.0], [2.0]]),
        "batch_idx": torch.tensor([0.0, 1.0]),
    }


def test_facts_come_from_the_model(tmp_path: Path) -> None:
    model = narrow_model("yolo26n", tmp_path)
    shapes = {}
    for index in neck_layers(model):
        model.model[index].register_forward_hook(lambda m, i, o, index=index: shapes.update({index: tuple(o.shape)}))
    model.eval()(torch.zeros(1, 3, 128, 128))
    found = [shapes[index] for index in neck_layers(model)]
    assert channels_of(model) == tuple(s[1] for s in found)
    assert strides_of(model) == tuple(128 // s[2] for s in found) == (8, 16, 32)
    assert bins_of(model) == 1


@pytest.mark.parametrize(
    ("file", "family"),
    [
        ("yolov8n.yaml", "yolov8"),
        ("some/where/yolov5n.yaml", "yolov5"),
        ("yolov8s-p2.yaml", "yolov8-p2"),
        ("yolov3.yaml", "yolov3"),
        ("mine.yaml", "mine"),
        (None, "-"),
    ],
)
def test_the_family_is_the_name_of_the_model_file(file: str | None, family: str) -> None:
    assert family_of(SimpleNamespace(yaml={"yaml_file": file})) == family


def test_outputs_are_the_raw_output_point_by_point(tmp_path: Path) -> None:
    model = narrow_model("yolov8n", tmp_path).train()
    raw = model(batch()["img"])
    outputs = outputs_of(raw, model)
    assert outputs.shapes == ((8, 12), (4, 6), (2, 3))
    assert torch.equal(outputs.scores[1, 5], raw["scores"][1, :, 5])
    assert torch.equal(outputs.boxes[0, 7], raw["boxes"][0, :, 7])
    assert outputs.per_level(outputs.scores)[1].shape == (2, 24, 3)


def test_targets_are_pixels(tmp_path: Path) -> None:
    given = batch()
    targets = targets_of(given)
    expected = xywh2xyxy(given["bboxes"]) * torch.tensor([96, 64, 96, 64])
    assert torch.equal(targets.boxes, expected)
    assert targets.image_size == (64, 96)
    assert targets.batch_size == 2
    assert targets.labels.tolist() == [1, 2]


@pytest.mark.parametrize("family", ["yolov8n", "yolo26n"])
def test_the_assignment_is_that_of_the_task_loss(family: str, tmp_path: Path) -> None:
    """Recompute the class loss of the task loss from the recorded targets: the same number, so the same targets."""
    model = narrow_model(family, tmp_path).train()
    model.args = get_cfg()
    criterion = model.init_criterion()
    recorder = AssignmentRecorder(criterion)
    given = batch()
    raw = model(given["img"])
    one = getattr(criterion, "one2many", criterion)
    items = one.loss(raw.get("one2many", raw), given)[1]
    assignment = recorder.take()
    assert assignment is not None
    assert assignment.foreground.any()
    logits = outputs_of(raw, model).scores
    bce = torch.nn.functional.binary_cross_entropy_with_logits(logits, assignment.scores, reduction="sum")
    expected = one.hyp.cls * bce / assignment.scores.sum().clamp(min=1)
    assert items["cls_loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert recorder.take() is None
    recorder.remove()
    one.loss(raw.get("one2many", raw), given)
    assert recorder.take() is None


# Where Ultralytics 8.4 changes the assigned boxes after the assignment, both in ultralytics/utils/loss.py:
# - v8PoseLoss.calculate_keypoints_loss, and the same method of PoseLoss26: `target_bboxes /= stride_tensor`
# - v8OBBLoss.loss: `target_bboxes[..., :4] /= stride_tensor`
IN_PLACE = [
    ("yolov8n-pose", PoseModel),
    ("yolo26n-pose", PoseModel),
    ("yolov8n-obb", OBBModel),
    ("yolo26n-obb", OBBModel),
]


@pytest.mark.parametrize(("name", "kind"), IN_PLACE)
def test_losses_that_change_the_assigned_boxes_in_place(name: str, kind: type, tmp_path: Path) -> None:
    config = {**yaml_model_load(f"{name}.yaml"), "nc": 3, "scales": {"n": [0.33, 0.125, 512]}}
    torch.manual_seed(0)
    model = kind(config, verbose=False).train()
    model.args = get_cfg()
    criterion = model.init_criterion()
    assigner = getattr(criterion, "one2many", criterion).assigner
    given, outputs = batch(), []
    if kind is PoseModel:
        given["keypoints"] = torch.rand(2, 17, 3)
    else:
        given["bboxes"] = torch.cat([given["bboxes"], torch.tensor([[0.3], [0.1]])], -1)
    recorder = AssignmentRecorder(criterion)
    assigner.register_forward_hook(
        lambda _module, _inputs, output: outputs.append((output, [t.clone() for t in output]))
    )
    criterion(model(given["img"]), given)
    (_, boxes, scores, foreground, _), before = outputs[0]
    assignment = recorder.take()
    assert assignment.foreground.any()
    assert not torch.equal(boxes, before[1]), f"{name} no longer changes the boxes: the recorder needs no copy for it"
    assert torch.equal(assignment.boxes, before[1])
    assert torch.equal(scores, before[2])
    assert torch.equal(assignment.scores, before[2])
    assert torch.equal(foreground, before[3])
    assert torch.equal(assignment.foreground, before[3].bool())


def test_boxes_divided_in_place_after_recording() -> None:
    class Assigner(torch.nn.Module):
        def forward(self) -> tuple[torch.Tensor, ...]:
            foreground = torch.tensor([[True, False]])
            return torch.zeros(1, 2), torch.ones(1, 2, 4), torch.ones(1, 2, 3), foreground, torch.zeros(1, 2)

    assigner = Assigner()
    recorder = AssignmentRecorder(SimpleNamespace(assigner=assigner))
    _, boxes, *_ = assigner()
    boxes /= torch.tensor([[8.0], [16.0]])
    assert torch.equal(recorder.take().boxes, torch.ones(1, 2, 4))


def test_assignment_of_a_batch_without_objects(tmp_path: Path) -> None:
    model = narrow_model("yolov8n", tmp_path).train()
    model.args = get_cfg()
    criterion = model.init_criterion()
    recorder = AssignmentRecorder(criterion)
    empty = {**batch(), "bboxes": torch.zeros(0, 4), "cls": torch.zeros(0, 1), "batch_idx": torch.zeros(0)}
    criterion(model(empty["img"]), empty)
    assignment = recorder.take()
    assert assignment is not None
    assert assignment.foreground.dtype == torch.bool
    assert not assignment.foreground.any()
    assert assignment.scores.sum() == 0


@pytest.mark.parametrize("family", ["yolov8n", "yolo11n", "yolo26n", "yolov10n"])
def test_the_split_head_continues_to_the_same_output(family: str, tmp_path: Path) -> None:
    """Features at the split, passed through the tails, give the head's own scores and boxes."""
    model = narrow_model(family, tmp_path).eval()
    recorder = LayerRecorder(head_split_points(model))
    model.model[-1].training = True
    raw = model(torch.rand(1, 3, 64, 64))
    raw = raw.get("one2many", raw)
    layers = recorder.take()
    for i, (cls, box) in enumerate(head_tails(model)):
        start = sum((64 // s) ** 2 for s in strides_of(model)[:i])
        for name, tail, whole in (("cls", cls, raw["scores"]), ("box", box, raw["boxes"])):
            ours = tail(layers[f"{name}{i}"]).flatten(2)
            torch.testing.assert_close(ours, whole[..., start : start + ours.shape[-1]])


def test_layers_by_name(tmp_path: Path) -> None:
    student, teacher = narrow_model("yolov8n", tmp_path), narrow_model("yolov8n", tmp_path / "wide", width=0.25)
    names = ["model.4", "model.6.cv2"]
    layers = find_layers(student, names, "student"), find_layers(teacher, names, "teacher")
    training = student.training
    pair = pair_spec(student, teacher, *layers)
    assert pair.student_layer_strides == {"model.4": 8, "model.6.cv2": 16}
    assert pair.teacher_layer_channels["model.4"] == 2 * pair.student_layer_channels["model.4"]
    assert student.training == training
    assert not any(m._forward_hooks for m in student.modules())
    with pytest.raises(ConfigError, match=r"the student has no layer 'model.99'.*Its layers are model.0 to model.22"):
        find_layers(student, ["model.99"], "student")


def test_a_layer_without_one_map_is_refused(tmp_path: Path) -> None:
    model = narrow_model("yolov8n", tmp_path)
    with pytest.raises(ConfigError, match="does not yield one feature map"):
        pair_spec(model, model, find_layers(model, ["model.22"], "student"))


def test_outputs_cut_in_two_are_slices_and_gradients_come_together() -> None:
    whole = torch.randn(5, 3, requires_grad=True)
    raw = {"one2many": {"scores": whole, "feats": [whole, whole * 2]}, "name": "head"}
    for images in (0, 2, 5):
        for half, chosen in zip(cut(raw, images), (slice(0, images), slice(images, 5)), strict=True):
            assert half["name"] == "head"
            assert torch.equal(half["one2many"]["scores"], whole[chosen])
            assert torch.equal(half["one2many"]["feats"][1], whole[chosen] * 2)
    first, second = cut(raw, 2)
    (first["one2many"]["scores"].sum() + 3 * second["one2many"]["feats"][1].sum()).backward()
    assert torch.equal(whole.grad, torch.tensor([1.0, 1, 6, 6, 6])[:, None].expand(5, 3))
