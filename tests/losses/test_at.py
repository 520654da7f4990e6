"""Attention transfer against loops and the usual form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.support.loss_contract import make_inputs, make_loss, make_pair
from yolo_kd.losses.at import AT, attention_map, attention_transfer


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 4.0])
def test_equals_loops(p):
    rng = np.random.default_rng(0)
    s, t = rng.normal(size=(2, 3, 4, 5)), rng.normal(size=(2, 6, 4, 5))
    total = 0.0
    for b in range(2):
        units = []
        for f in (s, t):
            q = [sum(abs(f[b, c, i, j]) ** p for c in range(f.shape[1])) for i in range(4) for j in range(5)]
            units.append([v / np.sqrt(sum(w * w for w in q)) for v in q])
        total += sum((a - c) ** 2 for a, c in zip(*units, strict=True))
    ours = attention_transfer(torch.from_numpy(s), torch.from_numpy(t), p)
    assert ours.item() == pytest.approx(total / 2, rel=1e-9)


def test_is_the_usual_form_without_its_division_by_the_cells():
    """The common form: normalised mean of squares over channels, mean of squared differences over images and cells."""
    s, t = torch.randn(3, 4, 5, 6), torch.randn(3, 8, 5, 6)
    usual = F.mse_loss(*(F.normalize(f.square().mean(1).flatten(1)) for f in (s, t)))
    assert attention_transfer(s, t).item() == pytest.approx(30 * usual.item(), rel=1e-5)


def test_is_twice_one_minus_the_cosine():
    s, t = torch.randn(3, 4, 5, 6), torch.randn(3, 8, 5, 6)
    cosine = F.cosine_similarity(*(f.square().sum(1).flatten(1) for f in (s, t)))
    assert attention_transfer(s, t).item() == pytest.approx(2 * (1 - cosine).mean().item(), rel=1e-4)


def test_range():
    left, right = torch.zeros(1, 2, 2, 2), torch.zeros(1, 5, 2, 2)
    left[..., 0], right[..., 1] = 3.0, -0.2
    assert attention_transfer(left, right).item() == pytest.approx(2)
    assert attention_transfer(left, -7 * left).item() == pytest.approx(0, abs=1e-12), "sign and scale do not matter"


def test_map_has_unit_length():
    assert attention_map(torch.randn(3, 4, 5, 6) * 100).norm(dim=1).tolist() == pytest.approx([1, 1, 1])


@pytest.mark.parametrize("p", [1.0, 2.0, 8.0])
def test_a_student_without_activation_is_finite(p):
    s = torch.zeros(2, 3, 4, 5, requires_grad=True)
    value = attention_transfer(s, torch.randn(2, 3, 4, 5), p)
    value.backward()
    assert value.item() == pytest.approx(1)
    assert s.grad.isfinite().all()


def test_strength_does_not_grow_with_the_image():
    s, t = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    once, tiled = attention_transfer(s, t), attention_transfer(s.repeat(1, 1, 2, 3), t.repeat(1, 1, 2, 3))
    assert tiled.item() == pytest.approx(once.item(), rel=1e-5)


def test_loss_adds_up_its_levels():
    pair = make_pair()
    inputs = make_inputs(pair)
    maps = [(inputs.student.features[i], inputs.teacher.features[i]) for i in (0, 2)]
    expected = AT.strength * sum(attention_transfer(s, t, 3.0).item() for s, t in maps)
    assert make_loss(AT, pair, levels=["p3", "p5"], p=3.0)(inputs)["at_loss"].item() == pytest.approx(
        expected, rel=1e-6
    )


def test_refuses_other_sizes_and_exponents():
    with pytest.raises(ValueError, match=r"\(2, 1, 4, 5\).*\(2, 1, 4, 6\)"):
        attention_transfer(torch.ones(2, 3, 4, 5), torch.ones(2, 7, 4, 6))
    with pytest.raises(ValueError, match=r"p must be a number of at least 1 and at most 8, received 0\.5"):
        AT(p=0.5)
