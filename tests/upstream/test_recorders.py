"""Views, targets and taps against plain Ultralytics."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ultralytics.cfg import get_cfg
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


def test_a_view_is_the_raw_output_point_by_point(tmp_path: Path) -> None:
    model = narrow_model("yolov8n", tmp_path).train()
    raw = model(batch()["img"])
    view = outputs_of(raw, model)
    assert view.shapes == ((8, 12), (4, 6), (2, 3))
    assert torch.equal(view.scores[1, 5], raw["scores"][1, :, 5])
    assert torch.equal(view.boxes[0, 7], raw["boxes"][0, :, 7])
    assert view.per_level(view.scores)[1].shape == (2, 24, 3)


def test_targets_are_pixels(tmp_path: Path) -> None:
    given = batch()
    targets = targets_of(given)
    expected = xywh2xyxy(given["bboxes"]) * torch.tensor([96, 64, 96, 64])
    assert torch.equal(targets.boxes, expected)
    assert targets.image_size == (64, 96)
    assert targets.batch_size == 2
    assert targets.labels.tolist() == [1, 2]


@pytest.mark.parametrize("family", ["yolov8n", "yolo26n"])
def test_the_assignment_is_the_one_the_native_loss_used(family: str, tmp_path: Path) -> None:
    """Recompute the native class loss from the captured targets: the same number, so the same targets."""
    model = narrow_model(family, tmp_path).train()
    model.args = get_cfg()
    criterion = model.init_criterion()
    tap = AssignmentRecorder(criterion)
    given = batch()
    raw = model(given["img"])
    one = getattr(criterion, "one2many", criterion)
    native = one.loss(raw.get("one2many", raw), given)[1]
    assignment = tap.take()
    assert assignment is not None
    assert assignment.foreground.any()
    logits = outputs_of(raw, model).scores
    bce = torch.nn.functional.binary_cross_entropy_with_logits(logits, assignment.scores, reduction="sum")
    expected = one.hyp.cls * bce / assignment.scores.sum().clamp(min=1)
    assert native["cls_loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert tap.take() is None
    tap.remove()
    one.loss(raw.get("one2many", raw), given)
    assert tap.take() is None


def test_assignment_of_a_batch_without_objects(tmp_path: Path) -> None:
    model = narrow_model("yolov8n", tmp_path).train()
    model.args = get_cfg()
    criterion = model.init_criterion()
    tap = AssignmentRecorder(criterion)
    empty = {**batch(), "bboxes": torch.zeros(0, 4), "cls": torch.zeros(0, 1), "batch_idx": torch.zeros(0)}
    criterion(model(empty["img"]), empty)
    assignment = tap.take()
    assert assignment is not None
    assert assignment.foreground.dtype == torch.bool
    assert not assignment.foreground.any()
    assert assignment.scores.sum() == 0


@pytest.mark.parametrize("family", ["yolov8n", "yolo11n", "yolo26n", "yolov10n"])
def test_the_split_head_continues_to_the_same_output(family: str, tmp_path: Path) -> None:
    """Features at the split, passed through the tails, give the head's own scores and boxes."""
    model = narrow_model(family, tmp_path).eval()
    tap = LayerRecorder(head_split_points(model))
    model.model[-1].training = True
    raw = model(torch.rand(1, 3, 64, 64))
    raw = raw.get("one2many", raw)
    layers = tap.take()
    for i, (cls, box) in enumerate(head_tails(model)):
        start = sum((64 // s) ** 2 for s in strides_of(model)[:i])
        for name, tail, whole in (("cls", cls, raw["scores"]), ("box", box, raw["boxes"])):
            ours = tail(layers[f"{name}{i}"]).flatten(2)
            torch.testing.assert_close(ours, whole[..., start : start + ours.shape[-1]])


def test_layers_by_name(tmp_path: Path) -> None:
    student, teacher = narrow_model("yolov8n", tmp_path), narrow_model("yolov8n", tmp_path / "wide", width=0.25)
    names = ["model.4", "model.6.cv2"]
    taps = find_layers(student, names, "student"), find_layers(teacher, names, "teacher")
    training = student.training
    pair = pair_spec(student, teacher, *taps)
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
