"""The records between the taps and the losses."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from functools import partial

import pytest
import torch

from tests.support.loss_contract import make_inputs, make_pair
from yolo_kd.structures import DetectorOutputs, LossInputs, PairSpec


@pytest.fixture
def view():
    features = (torch.zeros(2, 5, 4, 6), torch.zeros(2, 7, 2, 3))
    return DetectorOutputs(features, torch.randn(2, 30, 3), torch.zeros(2, 30, 4), (8, 16), 1)


def test_shapes_and_sizes(view):
    assert view.shapes == ((4, 6), (2, 3))
    assert view.level_sizes == (24, 6)


def test_per_level_splits_points_in_stride_order(view):
    fine, coarse = view.per_level(view.scores)
    assert torch.equal(fine, view.scores[:, :24])
    assert torch.equal(coarse, view.scores[:, 24:])


def test_objectness_is_the_largest_probability(view):
    scores = view.scores.clone().requires_grad_()
    objectness = DetectorOutputs(view.features, scores, view.boxes, view.strides, 1).objectness
    expected = [[max(1 / (1 + torch.exp(-x)) for x in point) for point in image] for image in view.scores]
    torch.testing.assert_close(objectness, torch.tensor(expected))
    assert not objectness.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_objectness_is_float32(view, dtype):
    half = DetectorOutputs(view.features, view.scores.to(dtype), view.boxes, view.strides, 1)
    assert half.objectness.dtype == torch.float32
    torch.testing.assert_close(half.objectness, view.scores.to(dtype).float().sigmoid().amax(-1))


def test_records_are_frozen(view):
    with pytest.raises(FrozenInstanceError):
        view.reg_max = 2


@pytest.mark.parametrize(
    ("strides", "names"),
    [((8, 16, 32), ("p3", "p4", "p5")), ((4, 8, 16, 32), ("p2", "p3", "p4", "p5")), ((64,), ("p6",))],
)
def test_level_names(strides, names):
    widths = (8,) * len(strides)
    assert PairSpec(widths, widths, strides, 80, 16, 16).level_names == names


@pytest.mark.parametrize(
    ("student", "teacher", "same"), [(16, 16, True), (16, 8, False), (1, 16, False), (1, 1, False)]
)
def test_same_bins(student, teacher, same):
    assert make_pair(student_reg_max=student, teacher_reg_max=teacher).same_bins is same


def test_what_two_terms_need_is_computed_once(view):
    step, calls = LossInputs(view, view), []
    for _ in range(2):
        assert step.once("mask", lambda: calls.append(1) or "made") == "made"
    assert step.once("other", lambda: "another") == "another"
    assert calls == [1]


def test_nothing_is_remembered_from_one_step_to_the_next(view):
    LossInputs(view, view).once("mask", lambda: 1)
    assert LossInputs(view, view).once("mask", lambda: 2) == 2


def test_a_remembered_none_is_not_computed_again(view):
    step, calls = LossInputs(view, view), []
    for _ in range(2):
        step.once("nothing", lambda: calls.append(1))
    assert calls == [1]


def test_aligned_without_adapters_is_the_student(view):
    assert torch.equal(LossInputs(view, view).aligned("conv1x1", 1), view.features[1])


def test_aligned_asks_once_for_each_kind_and_level(view):
    asked = []

    def align(kind, level):
        asked.append((kind, level))
        return view.features[level].half() + len(asked)

    step = LossInputs(view, view, align=align)
    first = step.aligned("mlp", 0)
    assert step.aligned("mlp", 0) is first
    assert step.aligned("conv1x1", 0) is not first
    step.aligned("mlp", 1)
    assert asked == [("mlp", 0), ("conv1x1", 0), ("mlp", 1)]
    assert first.dtype == torch.float32


def test_teacher_features_are_float32_detached_and_shared():
    step = make_inputs(dtype=torch.bfloat16, teacher_grad=True)
    feature = step.teacher_feature(1)
    assert feature.dtype == torch.float32
    assert not feature.requires_grad
    assert step.teacher_feature(1) is feature
    assert torch.equal(feature, step.teacher.features[1].detach().float())


@pytest.mark.parametrize("own", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("other", [torch.contiguous_format, torch.channels_last])
def test_float32_maps_lie_as_the_students_do(own: torch.memory_format, other: torch.memory_format) -> None:
    maps = [torch.randn(2, 4, 3, 5).bfloat16().to(memory_format=layout) for layout in (own, other)]
    student, teacher = (DetectorOutputs((m,), torch.zeros(2, 15, 1), torch.zeros(2, 15, 4), (8,), 1) for m in maps)
    step = LossInputs(student, teacher)
    for m, read in ((maps[0], partial(step.aligned, "conv1x1")), (maps[1], step.teacher_feature)):
        found, raw = read(0), read(0, as_is=True)
        assert found.dtype == torch.float32
        assert found.is_contiguous(memory_format=own)
        assert read(0) is found, "made once"
        assert torch.equal(found, m.float())
        assert raw.data_ptr() == m.data_ptr(), "nothing is laid out anew"


def test_aligned_keeps_the_gradient():
    step = make_inputs(dtype=torch.float16)
    step.aligned("conv1x1", 0).sum().backward()
    assert step.student.features[0].grad.abs().sum() > 0
