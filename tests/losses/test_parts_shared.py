"""Sums in parts whose function also reads tensors as a whole, and the divergence of distributions built on them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from yolo_kd.losses import parts
from yolo_kd.losses.ops import categorical_kl
from yolo_kd.losses.parts import softmax_kl, sum_in_parts, sums_in_parts


@pytest.mark.parametrize("by_hand", [False, True])
def test_shared_tensors_get_the_gradient_of_all_parts(by_hand, monkeypatch):
    monkeypatch.setattr(parts, "PART", 12)
    torch.manual_seed(0)
    student, other, weight = torch.randn(7, 3, 2), torch.randn(7, 3, 2), torch.randn(3, 2)

    def function(s: Tensor, o: Tensor, w: Tensor) -> Tensor | tuple[Tensor, ...]:
        assert len(s) <= 2
        if by_hand:
            s, w = s.detach(), w.detach()
            return (s * o * w).square().sum(), 2 * s * (o * w).square(), (2 * w * (s * o).square()).sum(0)
        return (s * o * w).square().sum()

    results = []
    for whole in (False, True):
        s, w = student.clone().requires_grad_(), weight.clone().requires_grad_()
        value = (s * other * w).square().sum() if whole else sum_in_parts(function, s, other, shared=(w,))
        (3 * value).backward()
        results.append((value.detach(), s.grad, w.grad))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("temperature", [1.0, 0.3, 4.0])
def test_softmax_kl_and_its_gradient(dim, temperature):
    student, teacher = torch.randn(2, 5, 4, 9, generator=torch.Generator().manual_seed(0))
    student.requires_grad_()
    value, slope = softmax_kl(student, teacher, temperature, dim)
    plain = categorical_kl(student, teacher, temperature, dim).sum()
    torch.testing.assert_close(value, plain.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(slope, torch.autograd.grad(plain, student)[0], rtol=1e-5, atol=1e-6)


def test_several_sums_are_each_what_it_would_be_alone(monkeypatch):
    """Values, and gradients under different scales, of all tensors; a sum that goes unused has no part in them."""
    monkeypatch.setattr(parts, "PART", 12)
    torch.manual_seed(0)
    student, other, weight = torch.randn(7, 3, 2), torch.randn(7, 3, 2), torch.randn(3, 2)

    def function(s: Tensor, o: Tensor, w: Tensor) -> list[tuple[Tensor, ...]]:
        s, w = s.detach(), w.detach()
        first = (s * o * w).square().sum(), 2 * s * (o * w).square(), (2 * w * (s * o).square()).sum(0)
        return [first, (s.pow(3).sum(), 3 * s.square(), torch.zeros_like(w))]

    for scales in ((1.0, 1.0), (2.0, -3.0), (0.0, 5.0), (4.0, 0.0)):
        results = []
        for whole in (False, True):
            s, w = student.clone().requires_grad_(), weight.clone().requires_grad_()
            plain = (s * other * w).square().sum(), s.pow(3).sum()
            a, b = plain if whole else sums_in_parts(function, s, other, shared=(w,))
            (scales[0] * a + scales[1] * b if all(scales) else scales[0] * a if scales[0] else scales[1] * b).backward()
            results.append((a.detach(), b.detach(), s.grad, torch.zeros_like(w) if w.grad is None else w.grad))
        for ours, expected in zip(*results, strict=True):
            torch.testing.assert_close(ours, expected)
