"""Structured distillation against the authors' numbers and against loops."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.support.golden_vectors import assert_gradient, cases
from tests.support.loss_contract import make_inputs, make_loss, make_pair
from yolo_kd.losses.structured import (
    PAIR_GAIN,
    PIXEL_GAIN,
    Structured,
    affinity,
    pair_wise,
    pixel_wise,
    pixel_wise_sigmoid,
    pool_by_scale,
    pool_to_nodes,
)
from yolo_kd.structures import LossInputs

GOLDEN = pytest.mark.parametrize("golden", cases("structured"), ids=lambda g: f"case {g.case}")


@GOLDEN
def test_pixel_wise_is_the_authors(golden):
    student = golden["logits_s"].requires_grad_()
    value = pixel_wise(student, golden["logits_t"])
    assert value.item() == pytest.approx(golden["out_pixel"].item(), rel=1e-5)
    value.backward()
    assert_gradient(student.grad, golden["grad_pixel_logits_s"])


@GOLDEN
def test_pair_wise_is_the_authors(golden):
    scale, students, values = golden.hyper["pool_scale"], [golden[f"s_feat_{i}"].requires_grad_() for i in range(3)], []
    for i, student in enumerate(students):
        teacher = golden[f"t_feat_{i}"]
        kernel = [int(n * scale) for n in student.shape[2:]]
        assert golden[f"pooled_{i}"].tolist() == [1, *kernel]
        values.append(pair_wise(pool_by_scale(student, scale), pool_by_scale(teacher, scale)))
        # cosines near one differ by 1e-2 with the resolution of float32, 6e-8: the square is good to 1e-5 or 1e-9
        assert values[-1].item() == pytest.approx(golden[f"out_pair_{i}"].item(), rel=1e-5, abs=2e-9)
    total = torch.stack(values).sum()
    assert total.item() == pytest.approx(golden["out_pair_total"].item(), rel=1e-5)
    total.backward()
    for i, student in enumerate(students):
        assert_gradient(student.grad, golden[f"grad_pair_s_feat_{i}"])


@GOLDEN
def test_similarities_are_the_authors(golden):
    for side in "st":
        ours, theirs = affinity(golden[f"{side}_feat_2"]), golden[f"sim_{side}_2"]
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    value = pair_wise(golden["s_feat_2"], golden["t_feat_2"])
    assert value.item() == pytest.approx(golden["out_pair_nopool_2"].item(), rel=1e-5)


def test_two_nodes_on_even_maps_are_the_published_pooling():
    feature = torch.randn(2, 5, 16, 20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pool_to_nodes(feature, 2), pool_by_scale(feature, 0.5))


@pytest.mark.parametrize("size", [(80, 80), (84, 48), (7, 13), (3, 1), (160, 11)])
def test_never_more_nodes_than_asked_for(size):
    pooled = pool_to_nodes(torch.randn(1, 2, *size), 10)
    assert all(side <= 10 for side in pooled.shape[2:])
    assert all(p == s for p, s in zip(pooled.shape[2:], size, strict=True) if s <= 10)


def test_a_window_has_at_least_one_cell():
    """The published code stops on maps that are smaller than a window."""
    assert pool_by_scale(torch.randn(1, 2, 1, 8), 0.5).shape == (1, 2, 1, 2)


def test_class_equals_loops():
    pair, inputs = make_pair(), make_inputs(seed=4)
    columns = make_loss(Structured, pair, lam_pi=2.0, lam_pa=3.0, nodes=4)(inputs)
    s, t = (v.scores.detach().double().sigmoid().numpy() for v in (inputs.student, inputs.teacher))
    divergence = positives = 0.0
    for image in range(s.shape[0]):
        for point in range(s.shape[1]):
            p, q = t[image, point], s[image, point]
            divergence += np.sum(p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))
            positives += p.max()
    assert positives > 2
    assert columns["kpix_loss"].item() == pytest.approx(2 * PIXEL_GAIN * divergence / positives, rel=1e-4)

    levels = []
    for s_map, t_map in zip(inputs.student.features, inputs.teacher.features, strict=True):
        sims = []
        for feature in (s_map.detach().double().numpy(), t_map.double().numpy()):
            _, _, h, w = feature.shape
            kh, kw = -(-h // 4), -(-w // 4)
            corners = [(y, x) for y in range(0, h, kh) for x in range(0, w, kw)]
            nodes = np.stack([feature[:, :, y : y + kh, x : x + kw].max((2, 3)) for y, x in corners], 1)
            nodes /= np.linalg.norm(nodes, axis=2, keepdims=True)
            sims.append(nodes @ nodes.transpose(0, 2, 1))
        levels.append(np.mean((sims[0] - sims[1]) ** 2))
    assert columns["kpair_loss"].item() == pytest.approx(3 * PAIR_GAIN * np.mean(levels), rel=1e-4)


def test_a_teacher_that_sees_nothing_does_not_blow_up_the_pixel_term():
    inputs = make_inputs()
    scores = torch.full_like(inputs.teacher.scores, -12.0)
    inputs = LossInputs(inputs.student, replace(inputs.teacher, scores=scores), inputs.targets)
    value = pixel_wise_sigmoid(inputs.student.scores, scores)
    divergence = -(1 - inputs.student.scores.detach().sigmoid()).log().sum()
    assert value.item() == pytest.approx(divergence.item() / 2, rel=1e-2)


def test_levels_choose_points_and_maps():
    """What happens on other levels is of no account."""
    pair, inputs = make_pair(), make_inputs()
    loss = make_loss(Structured, pair, levels=["p4"])
    before = loss(inputs)
    scores = inputs.student.scores.detach().clone()
    scores[:, : 16 * 20] += 5
    scores[:, -20:] += 5
    features = (inputs.student.features[0] + 1, inputs.student.features[1], -inputs.student.features[2])
    after = loss(LossInputs(replace(inputs.student, scores=scores, features=features), inputs.teacher, inputs.targets))
    assert {k: v.item() for k, v in before.items()} == {k: v.item() for k, v in after.items()}


def test_widths_may_differ_without_an_adapter():
    assert Structured.adapter is None
    assert pair_wise(torch.randn(2, 3, 4, 4), torch.randn(2, 7, 4, 4)).isfinite()


def test_only_the_published_gradient_lengthens_nodes():
    """A cosine does not depend on lengths, so its gradient is at right angles to the node; the published one is not."""
    teacher = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(2))
    along, values = [], []
    for published in (True, False):
        student = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(1)).requires_grad_()
        values.append(pair_wise(student, teacher, published))
        values[-1].backward()
        along.append((student.grad * student).sum(1).abs().max().item())
    assert values[0].item() == pytest.approx(values[1].item(), rel=1e-6)
    assert along[0] > 1e-3
    assert along[1] < 1e-6


def test_nodes_of_zeros_have_bounded_gradients():
    student = torch.zeros(1, 4, 2, 2, requires_grad=True)
    pair_wise(student, torch.randn(1, 4, 2, 2), published=False).backward()
    assert student.grad.isfinite().all()
    assert student.grad.abs().max() < 1e4


@pytest.mark.parametrize("nodes", [1, 0, 2.5, "10", True])
def test_wrong_nodes(nodes):
    with pytest.raises(ValueError, match="nodes must be a whole number of at least 2"):
        Structured(nodes=nodes)


@pytest.mark.parametrize("function", [pixel_wise, pair_wise])
def test_shapes_must_agree(function):
    with pytest.raises(ValueError, match=r"student \(1, \d, 4, 4\), teacher \(1, \d, 4, 5\)"):
        function(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 5))
