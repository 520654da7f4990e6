"""Semantic-aware alignment against loops that follow its definitions; there are no published numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support import loss_contract
from tests.support.loss_contract import BOXES, Facts, duplicated, make_inputs, make_loss, make_pair
from yolo_kd.losses import sea
from yolo_kd.losses.kernels.sea_alignment import cell_alignment
from yolo_kd.losses.sea import (
    CAD_GAIN,
    LDA_GAIN,
    SEA,
    TDD_GAIN,
    Categories,
    anchor_distillation,
    category_anchors,
    count_cells,
    covered_cells,
    semantic_masks,
)
from yolo_kd.structures import LossInputs

FACTS = {"sea": Facts(exempt={"waits_for_nothing": "asks which classes occur on a CPU; a GPU's way is tested here"})}


def slow_categories(boxes, labels, image_index, size, shape, stride, shrink, batch):
    """Return {category: set of (image, row, column)} by loops; categories are (class, part) and background."""
    found: dict[object, set[tuple[int, int, int]]] = {"background": set()}
    for image in range(batch):
        for row in range(shape[0]):
            for column in range(shape[1]):
                cell = (column * stride, row * stride, (column + 1) * stride, (row + 1) * stride)
                centres, wholes = set(), set()
                for box, label, index in zip(boxes, labels, image_index, strict=True):
                    x1, x2 = (min(max(v, 0), size[1]) for v in (box[0], box[2]))
                    y1, y2 = (min(max(v, 0), size[0]) for v in (box[1], box[3]))
                    if index != image or x2 <= x1 or y2 <= y1:
                        continue
                    for share, into in ((1.0, wholes), (shrink, centres)):
                        cx, cy, w, h = (x1 + x2) / 2, (y1 + y2) / 2, (x2 - x1) * share / 2, (y2 - y1) * share / 2
                        wide = cx - w < cell[2] and cx + w > cell[0]
                        if wide and cy - h < cell[3] and cy + h > cell[1]:
                            into.add(label)
                for label in wholes:
                    part = "centre" if label in centres else "edge"
                    found.setdefault((label, part), set()).add((image, row, column))
                if not wholes:
                    found["background"].add((image, row, column))
    return {k: v for k, v in found.items() if v}


def in_all_images(masks: torch.Tensor) -> Categories:
    """Return categories of (B, P, H, W) masks that list all P of them for each image."""
    return count_cells(masks, torch.arange(masks.shape[1]).expand(masks.shape[:2]), masks.shape[1])


def log_softmax(x, axis):
    x = x - x.max(axis, keepdims=True)
    return x - np.log(np.exp(x).sum(axis, keepdims=True))


def slow_sea(inputs: LossInputs, strides, tau1, tau2, shrink):
    """Return the three terms, unweighted, in float64."""
    t = inputs.targets
    cad, tdd, lda = [], [], []
    for i, stride in enumerate(strides):
        s_map, t_map = (f.detach().double().numpy() for f in (inputs.aligned("conv1x1", i), inputs.teacher_feature(i)))
        b, c, h, w = t_map.shape
        categories = slow_categories(
            t.boxes.tolist(), t.labels.tolist(), t.image_index.tolist(), t.image_size, (h, w), stride, shrink, b
        )
        anchors = [
            np.stack([np.mean([f[n, :, y, x] for n, y, x in cells], 0) for cells in categories.values()])
            for f in (s_map, t_map)
        ]
        cad.append(np.mean((anchors[0] - anchors[1]) ** 2))
        kl = []
        for n in range(b):
            for y in range(h):
                for x in range(w):
                    log = []
                    for f, a in zip((s_map, t_map), anchors, strict=True):
                        v = f[n, :, y, x]
                        cosine = a @ v / np.linalg.norm(a, axis=1) / np.linalg.norm(v)
                        log.append(log_softmax(cosine / tau1, 0))
                    kl.append(tau1**2 * np.sum(np.exp(log[1]) * (log[1] - log[0])))
        tdd.append(np.mean(kl))
        log_s, log_t = (log_softmax(f.reshape(b, c, -1) / tau2, 2) for f in (s_map, t_map))
        lda.append(np.mean(tau2**2 * np.sum(np.exp(log_t) * (log_t - log_s), 2)))
    return np.mean(cad), np.mean(tdd), np.mean(lda)


@pytest.mark.parametrize("boxes", ["typical", "overlapping", "none", "partly outside", "tiny", "no area", "everything"])
def test_equals_loops(boxes):
    keys = {"tau1": 0.3, "tau2": 2.0, "shrink": 0.4}
    pair, inputs = make_pair(), make_inputs(boxes=BOXES[boxes], seed=3)
    columns = make_loss(SEA, pair, alpha=2.0, beta=3.0, gamma=5.0, **keys)(inputs)
    cad, tdd, lda = slow_sea(inputs, pair.strides, **keys)
    assert columns["kcad_loss"].item() == pytest.approx(2 * CAD_GAIN * cad, rel=1e-4)
    assert columns["ktdd_loss"].item() == pytest.approx(3 * TDD_GAIN * tdd, rel=1e-3, abs=1e-7)
    assert columns["klda_loss"].item() == pytest.approx(5 * LDA_GAIN * lda, rel=1e-4)


def test_masks_by_hand():
    """One box of 4x4 cells: its middle 2x2 cells are the centre, the ring is the edge."""
    box, zero = torch.tensor([[8.0, 8.0, 40.0, 40.0]]), torch.zeros(1, dtype=torch.int64)
    centre, edge, background = semantic_masks(box, zero, zero, 1, 1, (6, 6), 8, 0.5)[0]
    assert centre.nonzero().tolist() == [[2, 2], [2, 3], [3, 2], [3, 3]]
    assert edge.sum() == 12
    assert not (edge & centre).any()
    assert torch.equal(background, ~(edge | centre))


def test_a_class_pools_all_images_and_a_cell_may_have_two_classes():
    boxes = torch.tensor([[0.0, 0.0, 16.0, 16.0], [0.0, 0.0, 8.0, 8.0], [0.0, 0.0, 8.0, 8.0]])
    masks = semantic_masks(boxes, torch.tensor([0, 1, 0]), torch.tensor([0, 0, 1]), 2, 2, (2, 2), 8, 1.0)
    assert masks.shape == (2, 5, 2, 2)
    assert masks[0, 0].all()
    assert masks[0, 1].nonzero().tolist() == [[0, 0]]
    assert masks[1, 0].nonzero().tolist() == [[0, 0]]
    feature = torch.arange(8.0).view(2, 1, 2, 2)
    anchors = category_anchors(feature, in_all_images(masks))
    assert anchors[:, 0].tolist() == [(0 + 1 + 2 + 3 + 4) / 5, 0, 0, 0, (5 + 6 + 7) / 3]


def test_every_object_has_a_cell_on_every_level():
    box, zero = torch.tensor([[33.0, 20.0, 34.0, 20.5]]), torch.zeros(1, dtype=torch.int64)
    for stride, shape in ((8, (16, 20)), (32, (4, 5)), (64, (2, 3))):
        assert covered_cells(box, zero, 1, shape, stride).sum() == 1


def test_chunks_do_not_matter():
    boxes = torch.rand(40, 4, generator=torch.Generator().manual_seed(0)) * 60
    boxes[:, 2:] += boxes[:, :2]
    slot = torch.arange(40) % 7
    whole = covered_cells(boxes, slot, 7, (16, 20), 8)
    assert torch.equal(whole, covered_cells(boxes, slot, 7, (16, 20), 8, chunk=700))


def test_absent_categories_change_nothing():
    """A category without a cell takes no part in any term, and no infinity comes of it."""
    torch.manual_seed(0)
    s, t = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    masks = torch.zeros(2, 3, 3, 3, dtype=torch.bool)
    masks[:, 0, 0], masks[:, 2, 1:] = True, True
    for tau in (0.01, 0.5, 5.0):
        results = []
        for chosen in (masks, masks[:, [0, 2]]):
            student = s.clone().requires_grad_()
            present, categories = chosen.any((0, 2, 3)), in_all_images(chosen)
            a_s, a_t = category_anchors(student, categories), category_anchors(t, categories)
            value = anchor_distillation(a_s, a_t, present)
            value = value + cell_alignment(student, t, (a_s, a_t), present, tau, 1.0)[0]
            value.backward()
            results.append((value.detach(), student.grad))
        torch.testing.assert_close(results[0], results[1])


def test_duplicating_the_batch_is_exact():
    pair = make_pair()
    loss, inputs = make_loss(SEA, pair), make_inputs(pair)
    for once, twice in zip(loss(inputs).values(), loss(duplicated(inputs, pair)).values(), strict=True):
        assert twice.item() == pytest.approx(once.item(), rel=1e-5)


@pytest.mark.parametrize("tau", [0.01, 0.1, 1.0, 5.0])
def test_temperatures_of_the_papers_range(tau):
    """The strength stays within two orders of magnitude where the paper finds its result unchanged."""
    pair, inputs = make_pair(), make_inputs()
    columns = make_loss(SEA, pair, tau1=tau, tau2=max(tau, 0.1))(inputs)
    assert all(1e-4 < v.item() < 1e2 for v in columns.values()), columns


def test_cells_of_zeros_have_bounded_gradients():
    feature = torch.zeros(1, 3, 2, 2, requires_grad=True)
    anchors, present = torch.randn(3, 3), torch.ones(3, dtype=torch.bool)
    teacher = torch.randn(1, 3, 2, 2)
    cell_alignment(feature, teacher, (anchors, anchors), present, 0.5, 1.0)[0].backward()
    assert feature.grad.isfinite().all()
    assert feature.grad.abs().max() < 1e4


def test_masks_are_shared_between_terms():
    inputs, pair = make_inputs(), make_pair()
    make_loss(SEA, pair)(inputs)
    make_loss(SEA, pair, levels=["p3"])(inputs)
    assert sum(key[0] == "semantic masks" for key in inputs._memo) == 1


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"alpha": -1}, "alpha must be a number of at least 0"),
        ({"tau1": 0}, "tau1 must be a number of more than 0"),
        ({"tau2": 0}, "tau2 must be a number of more than 0"),
        ({"shrink": 1.5}, "shrink must be a number of more than 0 and at most 1"),
        ({"shrink": 0}, "shrink must be a number of more than 0"),
    ],
)
def test_wrong_keys(keys, message):
    with pytest.raises(ValueError, match=message):
        SEA(**keys)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"student \(1, 3, 4, 4\), teacher \(1, 3, 4, 5\)"):
        cell_alignment(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 5), torch.zeros(2, 2, 3), torch.ones(2), 1.0, 1.0)
    with pytest.raises(ValueError, match=r"student \(3, 4\), teacher \(5, 4\)"):
        anchor_distillation(torch.zeros(3, 4), torch.zeros(5, 4), torch.ones(3, dtype=torch.bool))


@pytest.mark.parametrize("boxes", ["typical", "overlapping", "none", "one empty image", "partly outside", "no area"])
def test_taking_all_classes_changes_nothing(boxes, monkeypatch):
    pair = make_pair(nc=7)
    found = []
    for all_classes in (False, True):
        monkeypatch.setattr(sea, "_takes_all", lambda device, classes, taken=all_classes: taken)
        inputs = make_inputs(pair, boxes=BOXES[boxes], seed=3)
        columns = make_loss(SEA, pair)(inputs)
        torch.stack(list(columns.values())).sum().backward()
        found.append((columns, [f.grad for f in inputs.student.features]))
    for name, value in found[0][0].items():
        assert value.item() == pytest.approx(found[1][0][name].item(), rel=1e-5, abs=1e-7)
    for compact, whole in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(compact, whole, rtol=1e-4, atol=1e-7)


def test_products_in_bfloat16_are_close_to_those_in_float32():
    torch.manual_seed(0)
    student, teacher = (torch.randn(2, 16, 12, 12).bfloat16() for _ in range(2))
    box, index = torch.tensor([[8.0, 8.0, 60.0, 50.0], [30.0, 20.0, 90.0, 90.0]]), torch.tensor([0, 1])
    masks = semantic_masks(box, torch.tensor([0, 1]), index, 2, 2, (12, 12), 8, 0.5)
    categories = count_cells(masks, torch.arange(5).expand(2, -1), 5)
    values, slopes = [], []
    for dtype in (torch.bfloat16, torch.float32):
        s = student.detach().clone().requires_grad_()
        anchors = [category_anchors(x, categories, dtype) for x in (s, teacher)]
        assert {a.dtype for a in anchors} == {torch.float32}
        cad = anchor_distillation(*anchors, categories.cells > 0)
        terms = (cad, *cell_alignment(s, teacher, anchors, categories.cells > 0, 0.5, 1.0, dtype))
        values.append(torch.stack(terms).detach())
        sum(terms).backward()
        slopes.append(s.grad.float())
    torch.testing.assert_close(*values, rtol=0.02, atol=0)
    assert (slopes[0] - slopes[1]).norm() < 0.02 * slopes[1].norm()


def test_takes_all_classes_on_a_gpu_unless_they_are_many():
    assert [sea._takes_all(*case) for case in (("cpu", 3), ("cuda", 80), ("cuda", 1203))] == [False, True, False]


def test_waits_for_nothing_on_a_gpu(monkeypatch):
    monkeypatch.setattr(sea, "_takes_all", lambda device, classes: True)
    loss_contract.check_waits_for_nothing(SEA)
