"""LD: the published numbers, the region they were made with, and a slow reading of the whole loss."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.support.golden_vectors import Golden, assert_gradient, cases
from tests.support.loss_contract import BOXES, make_inputs, make_loss, make_pair
from yolo_kd.losses.kernels.ops import categorical_kl
from yolo_kd.losses.ld import LD, MAIN_STRENGTH, VLR_STRENGTH, localisation_kl, reference_boxes, valuable_region
from yolo_kd.structures import LossInputs

golden = pytest.mark.parametrize("case", cases("ld"), ids=lambda g: f"case_{g.case}")


def gradient(value: Tensor, of: Tensor) -> Tensor:
    return torch.autograd.grad(value, of)[0]


@golden
def test_rows_and_both_terms_equal_the_published_code(case: Golden) -> None:
    student = case["logits_s"].requires_grad_()
    rows = localisation_kl(student, case["logits_t"], case.hyper["T"])
    torch.testing.assert_close(rows * case.hyper["loss_weight"], case["per_row"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(rows.mean() * case.hyper["loss_weight"], case["out_unweighted_mean"], rtol=1e-5, atol=0)
    weighted = case.hyper["loss_weight"] * (rows * case["weight4"]).sum()
    main, vlr = weighted / case.hyper["main_avg_factor"], weighted / case.hyper["vlr_avg_factor"]
    torch.testing.assert_close(main, case["out_ld_main"], rtol=1e-5, atol=0)
    torch.testing.assert_close(vlr, case["out_ld_vlr"], rtol=1e-5, atol=0)
    assert_gradient(gradient(main, student), case["grad_ld_main"])


@golden
def test_the_same_function_is_the_published_class_term(case: Golden) -> None:
    student = case["cls_logits_s"].requires_grad_()
    loss = localisation_kl(student, case["cls_logits_t"], case.hyper["kd_T"]).mean() * case.hyper["kd_loss_weight"]
    torch.testing.assert_close(loss, case["out_kd_cls"], rtol=1e-5, atol=0)
    assert_gradient(gradient(loss, student), case["grad_kd_cls"])


@golden
def test_summed_over_bins_it_is_crosskds_box_term(case: Golden) -> None:
    student = case["logits_s"].requires_grad_()
    loss = 4.0 * (categorical_kl(student, case["logits_t"], 1.0) * case["weight4"]).sum() / 4.0
    torch.testing.assert_close(loss, case["out_crosskd_reg_sum_T1_lw4"], rtol=1e-5, atol=0)
    assert_gradient(gradient(loss, student), case["grad_crosskd_reg"])


@pytest.mark.parametrize("case", cases("ld_vlr"), ids=lambda g: f"case_{g.case}")
def test_region_equals_the_published_code_with_all_images_at_once(case: Golden) -> None:
    boxes = [case["gt_boxes_0"], case["gt_boxes_1"]]
    index = torch.tensor([i for i, b in enumerate(boxes) for _ in b])
    order = torch.randperm(len(index), generator=torch.Generator().manual_seed(0))
    sizes = case["num_level"].tolist()
    region = valuable_region(case["anchors"], sizes, torch.cat(boxes)[order], index[order], 3)
    for i in range(2):
        torch.testing.assert_close(region[i], case[f"vlr_{i}"], rtol=1e-5, atol=1e-7)
        assert (region[i] > 0).equal(case[f"vlr_{i}"] > 0)
    assert not region[2].any()  # an image without objects


def slow_region(anchors: list[list[float]], sizes: tuple[int, ...], boxes: list[list[float]]) -> list[float]:
    """The region of one image, one object and one reference box at a time."""
    weights = [0.0] * len(anchors)
    for gx1, gy1, gx2, gy2 in boxes:
        iou, close, distance = [], [], []
        for x1, y1, x2, y2 in anchors:
            inter = max(0.0, min(x2, gx2) - max(x1, gx1)) * max(0.0, min(y2, gy2) - max(y1, gy1))
            area, area_g = (x2 - x1) * (y2 - y1), (gx2 - gx1) * (gy2 - gy1)
            rho = ((x1 + x2 - gx1 - gx2) / 2) ** 2 + ((y1 + y2 - gy1 - gy2) / 2) ** 2
            c = (max(x2, gx2) - min(x1, gx1)) ** 2 + (max(y2, gy2) - min(y1, gy1)) ** 2
            iou.append(inter / (area + area_g - inter))
            close.append(inter / area - rho / c)
            distance.append(rho)
        candidates, start = [], 0
        for size in sizes:
            nearest = sorted(range(start, start + size), key=lambda i: distance[i])[:9]
            candidates += [iou[i] for i in nearest]
            start += size
        mean = sum(candidates) / len(candidates)
        std = math.sqrt(sum((v - mean) ** 2 for v in candidates) / (len(candidates) - 1))
        for i in range(len(anchors)):
            if 0.25 * (mean + std) <= close[i] < mean + std:
                weights[i] = max(weights[i], iou[i])
    return weights


def slow_loss(loss: LD, inputs: LossInputs) -> tuple[float, float]:
    """Both terms, one point, side and bin at a time."""
    t, targets = loss.temperature, inputs.targets
    assert targets is not None
    assert targets.assignment is not None
    anchors = [
        [(x + 0.5) * s - 4 * s, (y + 0.5) * s - 4 * s, (x + 0.5) * s + 4 * s, (y + 0.5) * s + 4 * s]
        for (h, w), s in zip(inputs.student.shapes, inputs.student.strides, strict=True)
        for y in range(h)
        for x in range(w)
    ]
    sums = [[0.0, 0.0], [0.0, 0.0]]
    for b in range(targets.batch_size):
        boxes = targets.boxes[targets.image_index == b].double().tolist()
        region = slow_region(anchors, inputs.student.level_sizes, boxes)
        for a in range(len(anchors)):
            weights = targets.assignment.scores[b, a].max().item(), region[a]
            if not any(weights):
                continue
            divergence = 0.0
            for side in range(4):
                n = inputs.student.reg_max
                p = (inputs.teacher.boxes[b, a, side * n : (side + 1) * n].double() / t).softmax(0).tolist()
                q = (inputs.student.boxes[b, a, side * n : (side + 1) * n].double() / t).softmax(0).tolist()
                divergence += t * t * sum(u * math.log(u / v) for u, v in zip(p, q, strict=True)) / 4
            for total, weight in zip(sums, weights, strict=True):
                total[0] += weight * divergence
                total[1] += weight
    (main, positives), (vlr, around) = sums
    return MAIN_STRENGTH * loss.lam_main * main / positives, VLR_STRENGTH * loss.lam_vlr * vlr / around


@pytest.mark.parametrize("temperature", [10.0, 1.0])
def test_equals_a_slow_reading_of_the_definition(temperature: float) -> None:
    pair = make_pair()
    inputs = make_inputs(pair, boxes=BOXES["typical"], seed=4)
    loss = make_loss(LD, pair, temperature=temperature, lam_main=0.5, lam_vlr=0.75)
    assert isinstance(loss, LD)
    main, vlr = slow_loss(loss, inputs)
    columns = loss(inputs)
    assert columns["kld_loss"].item() == pytest.approx(main, rel=1e-4)
    assert columns["kvlr_loss"].item() == pytest.approx(vlr, rel=1e-4)


def test_reference_boxes_lie_around_the_points_in_reading_order() -> None:
    boxes = reference_boxes([(2, 3), (1, 1)], [8, 16], torch.zeros(()))
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    assert centres.tolist() == [[4, 4], [12, 4], [20, 4], [4, 12], [12, 12], [20, 12], [8, 8]]
    assert (boxes[:, 2:] - boxes[:, :2]).tolist() == [[64, 64]] * 6 + [[128, 128]]


def test_without_objects_both_terms_are_zero() -> None:
    pair = make_pair()
    columns = make_loss(LD, pair)(make_inputs(pair, boxes=BOXES["none"]))
    assert [v.item() for v in columns.values()] == [0, 0]


def test_more_objects_of_the_same_kind_do_not_change_the_strength() -> None:
    """Every object twice: the weights double, and so does what they are divided by."""
    pair = make_pair()
    boxes = ((10, 12, 70, 90),), ((60, 40, 150, 120),)
    once = make_inputs(pair, boxes=boxes)
    columns = make_loss(LD, pair)(once)
    twice = make_loss(LD, pair)(make_inputs(pair, boxes=tuple(b * 2 for b in boxes)))
    assert twice["kvlr_loss"].item() == pytest.approx(columns["kvlr_loss"].item(), rel=1e-6)
    assert twice["kld_loss"].item() == pytest.approx(columns["kld_loss"].item(), rel=0.3)  # other positives, same size


def test_says_what_does_not_fit() -> None:
    anchors, boxes = torch.zeros(7, 4), torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"\(6, 2\) must sum to the length of anchors \(7, 4\)"):
        valuable_region(anchors, (6, 2), boxes, torch.zeros(2, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match=r"image_index \(3,\), boxes \(2,\)"):
        valuable_region(anchors, (6, 1), boxes, torch.zeros(3, dtype=torch.int64), 1)
    inputs = make_inputs()
    with pytest.raises(ValueError, match="assignment"):
        LD()(LossInputs(inputs.student, inputs.teacher))
