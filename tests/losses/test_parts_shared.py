"""Sums in parts whose function also reads tensors as a whole, and the divergence of distributions built on them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from yolo_kd.losses import parts
from yolo_kd.losses.ops import categorical_kl
from yolo_kd.losses.parts import softmax_kl_sum, sum_in_parts


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
def test_softmax_kl_is_that_of_whole_tensors(dim, temperature, monkeypatch):
    monkeypatch.setattr(parts, "PART", 40)
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 4, 9)
    results = []
    for whole in (False, True):
        s = student.clone().requires_grad_()
        kl = (
            categorical_kl(s, teacher, temperature, dim).sum()
            if whole
            else softmax_kl_sum(s, teacher, temperature, dim)
        )
        kl.backward()
        results.append((kl.detach(), s.grad))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
