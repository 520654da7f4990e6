"""Divergences of softmax distributions against autograd."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.losses.kernels.draws import draw
from yolo_kd.losses.kernels.ops import categorical_kl
from yolo_kd.losses.kernels.softmax_kl import kl_of_powers, softmax_kl


@pytest.mark.parametrize("dim", [1, 2, (2, 3)])
@pytest.mark.parametrize("temperature", [1.0, 0.3, 4.0])
@pytest.mark.parametrize("offset", [0.0, 800.0])  # an exponential cannot hold the latter
def test_softmax_kl_and_its_gradient(dim: int | tuple[int, ...], temperature: float, offset: float) -> None:
    student, teacher = (draw(5, 4, 3, 9, seed=i, spread=1.0) + offset for i in (0, 1))
    given = student.clone(), teacher.clone()
    student.requires_grad_()
    value, slope = softmax_kl(student, teacher, temperature, dim)
    flat = (x.flatten(2) if dim == (2, 3) else x for x in (student, teacher))
    plain = categorical_kl(*flat, temperature, 2 if dim == (2, 3) else dim).sum()
    torch.testing.assert_close(value, plain.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(slope, torch.autograd.grad(plain, student)[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(student, given[0])
    assert torch.equal(teacher, given[1])
    again = softmax_kl(student.detach(), teacher, temperature, dim, overwrite=True)
    torch.testing.assert_close(again, (value, slope), rtol=0, atol=0)


@pytest.mark.parametrize("dim", [2, (2, 3)])
@pytest.mark.parametrize("overwrite", [True, False])
def test_softmax_kl_of_logits_times_factors(dim: int | tuple[int, ...], overwrite: bool) -> None:
    student, teacher = (draw(5, 4, 3, 9, seed=i, spread=1.0) + 500 for i in (0, 1))
    factors = tuple(draw(4, 1, 1, seed=i).abs() + 0.1 for i in (2, 3))
    expected = softmax_kl(student * factors[0], teacher * factors[1], 2.0, dim)
    given = factors[0].clone()
    found = softmax_kl(student, teacher, 2.0, dim, overwrite, factors)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(factors[0], given)


@pytest.mark.parametrize("scale", [0.25, draw(5, 1, 9, seed=2)], ids=["one", "each"])
def test_kl_of_powers_scales_its_gradient_alone(scale: Tensor | float) -> None:
    student, teacher = (draw(5, 4, 9, seed=i, spread=1.0) for i in (0, 1))
    value, slope = kl_of_powers(student, teacher.clone(), 1)
    found = kl_of_powers(student, teacher, 1, scale=scale)
    torch.testing.assert_close(found, (value, slope * scale))


@pytest.mark.parametrize("in_place", [True, False])
def test_kl_of_powers_overwrites_what_its_docstring_names(in_place: bool) -> None:
    student, teacher = (draw(5, 4, 9, seed=i, spread=1.0) for i in (0, 1))
    for x in (student, teacher):
        x[:, 1] = -1e4  # a category that does not occur
    p, q = (x.mul(math.log(2)).softmax(1) for x in (teacher, student))
    kept, given = [0, 2, 3], student.clone()
    expected = (p * (p / q).log2())[:, kept].sum()
    value, slope = kl_of_powers(student, teacher, 1, into=student if in_place else None)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(slope, q - p)
    assert (slope is student) if in_place else torch.equal(student, given)
