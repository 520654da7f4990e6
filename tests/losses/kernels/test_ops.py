"""Shared arithmetic against torch, scipy, torchvision and plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import log_softmax, rel_entr, softmax
from torch.distributions import Bernoulli, kl_divergence
from torchvision.ops import generalized_box_iou

from yolo_kd.losses.kernels.ops import (
    attention,
    averaging,
    binary_kl,
    categorical_kl,
    distance_giou,
    expected_distance,
    feature_map_nms,
    same_shape,
    weighted_mean,
)


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


def normal(rng, *shape):
    return torch.randn(shape, generator=rng, dtype=torch.float64)


def test_same_shape_names_every_tensor():
    same_shape(a=torch.zeros(2, 3), b=torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"shapes must agree, received a \(2, 3\), b \(3,\), c \(2, 3\)"):
        same_shape(a=torch.zeros(2, 3), b=torch.zeros(3), c=torch.zeros(2, 3))


def test_binary_kl_is_that_of_bernoulli(rng):
    s, t = 3 * normal(rng, 4, 5), 3 * normal(rng, 4, 5)
    expected = kl_divergence(Bernoulli(logits=t), Bernoulli(logits=s))
    torch.testing.assert_close(binary_kl(s, t), expected)


def test_binary_kl_has_the_gradient_of_cross_entropy(rng):
    s, t = normal(rng, 50).requires_grad_(), normal(rng, 50).requires_grad_()
    (ours,) = torch.autograd.grad(binary_kl(s, t).sum(), s)
    bce = torch.nn.functional.binary_cross_entropy_with_logits(s, t.detach().sigmoid(), reduction="sum")
    (expected,) = torch.autograd.grad(bce, s)
    torch.testing.assert_close(ours, expected)
    assert torch.autograd.grad(binary_kl(s, t).sum(), t, allow_unused=True) == (None,)


def test_binary_kl_is_finite_for_any_logit():
    s, t = torch.tensor([-1e4, 1e4, -1e4, 0.0, 1e4]), torch.tensor([1e4, -1e4, -1e4, 1e4, 1e4])
    expected = torch.tensor([1e4, 1e4, 0.0, math.log(2), 0.0])
    torch.testing.assert_close(binary_kl(s, t), expected, rtol=0, atol=1e-3)  # float32 counts 1e4 in steps of 1e-3


@pytest.mark.parametrize("temperature", [1.0, 2.5, 10.0])
@pytest.mark.parametrize("dim", [-1, 1])
def test_categorical_kl_is_that_of_scipy(rng, temperature, dim):
    s, t = 2 * normal(rng, 3, 4, 7), 2 * normal(rng, 3, 4, 7)
    p, q = (softmax(x.numpy() / temperature, axis=dim) for x in (t, s))
    expected = temperature**2 * rel_entr(p, q).sum(dim)
    np.testing.assert_allclose(categorical_kl(s, t, temperature, dim).numpy(), expected, rtol=1e-9)


def test_categorical_kl_is_finite_when_saturated():
    s, t = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True), torch.tensor([[-1e4, 1e4, 0.0]])
    value = categorical_kl(s, t)
    value.sum().backward()
    assert value.item() == pytest.approx(-log_softmax(s.detach().numpy(), axis=-1)[0, 1])
    assert s.grad.isfinite().all()


def test_expected_distance_is_the_mean_of_the_bins(rng):
    raw = normal(rng, 2, 5, 4 * 6)
    ours = expected_distance(raw, 6)
    for b in range(2):
        for a in range(5):
            for side in range(4):
                p = softmax(raw[b, a, side * 6 : side * 6 + 6].numpy())
                assert ours[b, a, side].item() == pytest.approx(sum(k * p[k] for k in range(6)))


def test_expected_distance_takes_turned_tensors_and_plain_distances(rng):
    raw = normal(rng, 2, 24, 5)
    torch.testing.assert_close(expected_distance(raw.mT, 6), expected_distance(raw.mT.contiguous(), 6))
    plain = normal(rng, 2, 5, 4)
    assert torch.equal(expected_distance(plain, 1), plain)


def corners(d, point=(30.0, 20.0)):
    x, y = point
    left, top, right, bottom = d.unbind(-1)
    return torch.stack([x - left, y - top, x + right, y + bottom], -1)


def test_distance_giou_is_that_of_torchvision(rng):
    a, b = 9 * torch.rand(40, 4, generator=rng) + 0.1, 9 * torch.rand(40, 4, generator=rng) + 0.1
    expected = generalized_box_iou(corners(a), corners(b)).diagonal()
    torch.testing.assert_close(distance_giou(a, b), expected, rtol=1e-4, atol=1e-5)


def test_distance_giou_of_boxes_beside_the_point(rng):
    """A negative distance puts the point outside the box; the boxes may then lie apart."""
    a, b = 4 * torch.rand(200, 4, generator=rng) - 1.9, 4 * torch.rand(200, 4, generator=rng) - 1.9
    proper = [(d[:, :2] + d[:, 2:] > 0.1).all(-1) for d in (a, b)]
    a, b = a[proper[0] & proper[1]], b[proper[0] & proper[1]]
    expected = generalized_box_iou(corners(a), corners(b)).diagonal()
    assert (expected < 0).any()
    torch.testing.assert_close(distance_giou(a, b), expected, rtol=1e-4, atol=1e-4)


def test_distance_giou_of_boxes_without_area_is_finite():
    a = torch.zeros(1, 4, requires_grad=True)
    distance_giou(a, torch.zeros(1, 4)).sum().backward()
    assert a.grad.isfinite().all()
    inverted = distance_giou(torch.full((1, 4), -2.0), torch.ones(1, 4))
    assert inverted.isfinite().all()
    assert inverted.item() <= 0


def test_weighted_mean(rng):
    v, w = normal(rng, 3, 4), torch.rand(3, 4, generator=rng, dtype=torch.float64)
    assert weighted_mean(v, w).item() == pytest.approx(np.average(v.numpy(), weights=w.numpy()))
    v.requires_grad_()
    nothing = weighted_mean(v, torch.zeros(3, 4))
    nothing.backward()
    assert nothing.item() == 0
    assert not v.grad.any()


def slow_nms(scores, shapes, kernel=3):
    """Loop over cells: a point falls to a neighbour on its level with the same class and a higher score."""
    kept, start, reach = np.zeros(scores.shape[:2], bool), 0, kernel // 2
    for h, w in shapes:
        for b in range(len(scores)):
            level = scores[b, start : start + h * w].reshape(h, w, -1)
            for y in range(h):
                for x in range(w):
                    label, best = level[y, x].argmax(), level[y, x].max()
                    beaten = False
                    for v in range(max(0, y - reach), min(h, y + reach + 1)):
                        for u in range(max(0, x - reach), min(w, x + reach + 1)):
                            beaten |= level[v, u].argmax() == label and level[v, u].max() > best
                    kept[b, start + y * w + x] = not beaten
        start += h * w
    return kept


@pytest.mark.parametrize("nc", [1, 2, 5])
@pytest.mark.parametrize("kernel", [3, 5])
def test_feature_map_nms_against_loops_over_cells(rng, nc, kernel):
    shapes = [(6, 9), (3, 4), (1, 2), (1, 1)]
    scores = normal(rng, 2, sum(h * w for h, w in shapes), nc)
    kept = feature_map_nms(scores, shapes, kernel)
    assert kept.dtype == torch.bool
    np.testing.assert_array_equal(kept.numpy(), slow_nms(scores.numpy(), shapes, kernel))
    assert 0 < kept.sum() < kept.numel()


def test_feature_map_nms_keeps_ties_and_other_classes():
    level = torch.full((1, 4, 2), -5.0)
    level[0, :, 0] = torch.tensor([2.0, 2.0, -5.0, 1.0])  # two equal neighbours, and a weaker one out of reach
    level[0, 2, 1] = 0.5  # beside stronger points, but of another class
    assert feature_map_nms(level, [(1, 4)]).tolist() == [[True, True, True, True]]


def test_feature_map_nms_does_not_look_across_levels():
    scores = torch.tensor([[[3.0], [9.0]]])
    assert feature_map_nms(scores, [(1, 1), (1, 1)]).all()
    assert feature_map_nms(scores, [(1, 2)]).tolist() == [[False, True]]


def test_attention_is_a_softmax_with_mean_one(rng):
    strength = normal(rng, 2, 15).abs()
    ours = attention(strength, 0.5)
    for row, given in zip(ours, strength, strict=True):
        np.testing.assert_allclose(row.numpy(), 15 * softmax(given.numpy() / 0.5), rtol=1e-9)
    np.testing.assert_allclose(ours.mean(1).numpy(), 1, rtol=1e-9)


@pytest.mark.parametrize("cells", [1, 3, 20, 40, 64, 65, 200])
@pytest.mark.parametrize("parts", [1, 2, 4, 64])
def test_averaging_is_adaptive_pooling(cells, parts):
    plane = torch.randn(2, 3, cells, cells + 1, generator=torch.Generator().manual_seed(0))
    ours = averaging(cells, parts, plane) @ plane @ averaging(cells + 1, parts, plane).T
    torch.testing.assert_close(ours, F.adaptive_avg_pool2d(plane, parts), rtol=1e-5, atol=1e-6)
