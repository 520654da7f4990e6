"""CrossKD: the published numbers, the way through the teacher's head, and how that head is kept apart."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.support.golden_vectors import Golden, assert_gradient, cases
from tests.support.loss_contract import Facts, make_inputs, make_loss, make_pair, make_tails
from yolo_kd.errors import PairError
from yolo_kd.losses.crosskd import BOX_STRENGTH, CLS_STRENGTH, CrossKD, align_scale, crosskd_box, crosskd_cls
from yolo_kd.losses.kernels import chunked
from yolo_kd.losses.kernels.ops import corners, giou_distance
from yolo_kd.structures import LossInputs

FACTS = {
    "crosskd": Facts(
        exempt={
            "minimum": "the scale of the class term has a kink at agreement, and the 1e-6 of `align_scale` keeps even "
            "an equal student beside it; see below"
        }
    )
}

golden = pytest.mark.parametrize("case", cases("crosskd"), ids=lambda g: f"case_{g.case}")


def rows(maps: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) to (B, H * W, C)."""
    return maps.flatten(2).transpose(1, 2)


@golden
def test_class_term_equals_the_published_code(case: Golden) -> None:
    for i in range(3):
        reused, teacher = case[f"r_cls_{i}"].requires_grad_(), rows(case[f"t_cls_{i}"])
        assert case[f"label_weights_{i}"].unique().tolist() in ([0, 1], [1])
        kept = case[f"label_weights_{i}"] > 0
        divisor = case.hyper["avg_factor"]
        loss = case.hyper["cls_weight"] * crosskd_cls(rows(reused)[kept], teacher[kept], divisor, case.hyper["beta"])
        torch.testing.assert_close(loss, case[f"out_cls_{i}"], rtol=1e-5, atol=0)
        loss.backward()
        assert_gradient(reused.grad, case[f"grad_r_cls_{i}"])


@golden
def test_box_term_equals_the_published_code(case: Golden) -> None:
    """It is stored before the division by the weights of all levels; ours divides by those of the points it gets."""
    sums = [case[f"out_reg_weight_sum_{i}"] for i in range(3)]
    for i in (i for i in range(3) if f"r_reg_{i}" in case):
        reused, teacher = case[f"r_reg_{i}"].requires_grad_(), rows(case[f"t_reg_{i}"])
        weight = rows(case[f"t_cls_{i}"]).amax(-1).sigmoid() * (case[f"label_weights_{i}"] > 0)
        torch.testing.assert_close(weight.sum(), sums[i], rtol=1e-5, atol=0)
        loss = crosskd_box(rows(reused), teacher, weight, case.hyper["reg_max"] + 1, case.hyper["T"])
        raw = case.hyper["reg_weight"] * loss * sums[i]
        torch.testing.assert_close(raw, case[f"out_reg_raw_{i}"], rtol=1e-5, atol=0)
        if f"grad_r_reg_{i}" in case:
            (raw / torch.stack(sums).sum()).backward()
            assert_gradient(reused.grad, case[f"grad_r_reg_{i}"])


@golden
def test_scale_alignment_equals_the_published_code(case: Golden) -> None:
    student = case["align_s_in"].requires_grad_()
    aligned = align_scale(student, case["align_t_in"])
    torch.testing.assert_close(aligned, case["align_out"], rtol=1e-5, atol=1e-5)
    aligned.backward(case["align_cotangent"])
    assert_gradient(student.grad, case["align_grad_s"])


@pytest.mark.parametrize("chunk", [1, 2**18])
@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (1, 3, 1, 2)])
def test_scale_and_its_gradient_are_autograds(
    chunk: int, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked, "CHUNK", chunk)
    torch.manual_seed(0)
    student, teacher, cotangent = (torch.randn(shape, dtype=torch.float64) + 2 for _ in range(3))
    student.requires_grad_()
    mean, std = ([f(x, dim=(0, 2, 3), keepdim=True) for x in (student, teacher)] for f in (torch.mean, torch.std))
    plain = (student - mean[0]) / (std[0] + 1e-6) * std[1] + mean[1]
    ours = align_scale(student, teacher)
    torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9)
    found, expected = (torch.autograd.grad(x, student, cotangent)[0] for x in (ours, plain))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_scale_of_maps_in_half_precision_is_found_in_float32() -> None:
    torch.manual_seed(0)
    maps = [torch.randn(2, 4, 5, 6).bfloat16() for _ in range(3)]
    half, single = maps[0].clone().requires_grad_(), maps[0].float().requires_grad_()
    aligned = align_scale(half, maps[1]), align_scale(single, maps[1].float(), dtype=torch.bfloat16)
    torch.testing.assert_close(*aligned)
    for result in aligned:
        result.backward(maps[2])
    torch.testing.assert_close(half.grad, single.grad.bfloat16())


def test_a_channel_without_deviation_takes_the_teachers_mean() -> None:
    student, teacher = torch.ones(1, 2, 3, 3, requires_grad=True), torch.randn(1, 2, 3, 3)
    aligned = align_scale(student, teacher)
    torch.testing.assert_close(aligned, teacher.mean((2, 3), keepdim=True).expand_as(teacher))
    aligned.square().sum().backward()
    assert student.grad.isfinite().all()


def test_a_teacher_without_bins_is_compared_by_overlap() -> None:
    rng = torch.Generator().manual_seed(0)
    reused, teacher = torch.rand(2, 2, 9, 4, generator=rng) * 5 + 0.1
    weight = torch.rand(2, 9, generator=rng)
    expected = (giou_distance(corners(reused, 1), corners(teacher, 1)) * weight).sum() / weight.sum()
    torch.testing.assert_close(crosskd_box(reused, teacher, weight, 1), expected)


def test_no_weight_at_all_is_zero_and_not_nan() -> None:
    boxes = torch.randn(1, 5, 32)
    assert crosskd_box(boxes, boxes + 1, torch.zeros(1, 5), 8).item() == 0


@pytest.mark.parametrize(("student_reg_max", "teacher_reg_max"), [(8, 8), (1, 8), (8, 1)])
def test_equals_a_slow_reading_of_the_definition(student_reg_max: int, teacher_reg_max: int) -> None:
    pair = make_pair(student_reg_max=student_reg_max, teacher_reg_max=teacher_reg_max)
    loss, inputs, tails = make_loss(CrossKD, pair), make_inputs(pair, seed=8), make_tails(pair)
    assert isinstance(loss, CrossKD)
    assert inputs.targets is not None
    assert inputs.targets.assignment is not None
    t = inputs.teacher
    scores, boxes = [], []
    for i in range(3):
        for name, tail, into in ((f"cls{i}", tails[i][0], scores), (f"box{i}", tails[i][1], boxes)):
            feature = inputs.student.layers[name]
            if name in loss.adapters:
                feature = loss.adapters[name](feature)
            channels = []
            for s, k in zip(feature.unbind(1), t.layers[name].unbind(1), strict=True):
                channels.append((s - s.mean()) / (s.std() + 1e-6) * k.std() + k.mean())
            into.append(rows(tail(torch.stack(channels, 1))))
    r, q = torch.cat(scores, 1).sigmoid(), t.scores.sigmoid()
    entropy = -(q * r.log() + (1 - q) * (1 - r).log())
    cls = (entropy * (r - q).abs()).sum() / inputs.targets.assignment.scores.sum()
    weight, reused = q.amax(-1), torch.cat(boxes, 1)
    if teacher_reg_max == 1:
        each = giou_distance(corners(reused, 1), corners(t.boxes, 1))
    else:
        p = t.boxes.unflatten(-1, (4, 8)).softmax(-1)
        each = (p * (p.log() - reused.unflatten(-1, (4, 8)).log_softmax(-1))).sum(-1).mean(-1)
    columns = loss(inputs)
    torch.testing.assert_close(columns["xcls_loss"], CLS_STRENGTH * cls, rtol=1e-4, atol=0)
    torch.testing.assert_close(
        columns["xbox_loss"], BOX_STRENGTH * 4 * (each * weight).sum() / weight.sum(), rtol=1e-4, atol=0
    )


def test_a_student_that_equals_its_teacher_loses_nothing() -> None:
    pair = make_pair(equal=True)
    loss = make_loss(CrossKD, pair)
    for name, value in loss(make_inputs(pair, equal=True)).items():
        assert value.item() == pytest.approx(0, abs=1e-5), name


def test_gradients_reach_the_students_head_and_not_the_teachers() -> None:
    pair = make_pair()
    loss, inputs = make_loss(CrossKD, pair), make_inputs(pair)
    assert isinstance(loss, CrossKD)
    torch.stack(list(loss(inputs).values())).sum().backward()
    for name, layer in inputs.student.layers.items():
        assert layer.grad is not None, name
        assert layer.grad.any(), name
    assert inputs.student.scores.grad is None  # the student's own predictions meet the labels only
    assert inputs.student.boxes.grad is None
    assert all(p.grad is None for pair_ in loss.tails for tail in pair_ for p in tail.parameters())


def test_the_teachers_head_is_nobodys_parameter_and_is_shared_by_copies() -> None:
    loss = make_loss(CrossKD, make_pair())
    assert isinstance(loss, CrossKD)
    assert set(loss.state_dict()) == {f"adapters.cls{i}.{part}" for i in range(3) for part in ("weight", "bias")}
    assert {n for n, _ in loss.named_parameters()} == set(loss.state_dict())
    assert not any(m is tail for m in loss.modules() for pair in loss.tails for tail in pair)
    assert copy.deepcopy(loss).tails[0][0] is loss.tails[0][0]


def test_a_convolution_is_made_only_where_widths_differ() -> None:
    loss = make_loss(CrossKD, make_pair(equal=True))
    assert isinstance(loss, CrossKD)
    assert len(loss.adapters) == 0
    assert not list(loss.parameters())


def test_a_teacher_in_half_precision_is_served() -> None:
    pair = make_pair()
    loss, half = make_loss(CrossKD, pair), make_loss(CrossKD, pair)
    half.attach_teacher_head([(cls.bfloat16(), box.bfloat16()) for cls, box in make_tails(pair)])
    exact = loss(make_inputs(pair))
    for name, value in half(make_inputs(pair)).items():
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(exact[name].item(), rel=0.02)


def test_says_what_is_missing() -> None:
    pair = make_pair()
    with pytest.raises(PairError, match="'cls0' among the student's layer channels, which hold nothing"):
        CrossKD().build(replace(pair, student_layer_channels={}))
    loss = CrossKD()
    loss.build(pair)
    inputs = make_inputs(pair)
    with pytest.raises(PairError, match="for 3 levels, but 0 were attached"):
        loss(inputs)
    loss.attach_teacher_head(make_tails(pair))
    blind = LossInputs(replace(inputs.student, layers={}), inputs.teacher, inputs.targets)
    with pytest.raises(PairError, match="'cls0' among the student's layers"):
        loss(blind)


def test_a_head_that_could_be_trained_is_refused() -> None:
    loss = CrossKD()
    loose = nn.Conv2d(4, 4, 1)
    frozen = nn.Conv2d(4, 4, 1).requires_grad_(False).eval()
    with pytest.raises(PairError, match="'box0' of the teacher's head must be frozen"):
        loss.attach_teacher_head([(frozen, loose)])
