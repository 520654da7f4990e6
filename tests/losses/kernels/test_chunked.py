"""Sums in parts against the plain formulas of `ops`, with autograd's gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from yolo_kd.losses.kernels import chunked
from yolo_kd.losses.kernels.chunked import (
    channel_norms,
    gap_cross_entropy_sum,
    kl_of_powers,
    points_that_count,
    softmax_kl,
    sum_cells,
    sum_in_parts,
    sums_in_parts,
    weighted_binary_kl,
    weighted_bins_kl,
)
from yolo_kd.losses.kernels.ops import binary_kl, categorical_kl, gap_cross_entropy


@pytest.fixture(autouse=True, params=[7, 2**18], ids=["many parts", "one part"])
def part_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "PART", request.param)


def draw(*shape: int, seed: int = 0, spread: float = 3.0) -> Tensor:
    return spread * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def both(ours: Tensor, plain: Tensor, student: Tensor) -> None:
    """Compare values and gradients."""
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10)
    found, expected = (torch.autograd.grad(v * 0.3, student, retain_graph=True)[0] for v in (ours, plain))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-9)


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "float", lambda self: self)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("by_hand", [True, False])
def test_a_sum_and_its_gradient(dim: int, by_hand: bool) -> None:
    student, teacher, weight = draw(3, 5, 4).requires_grad_(), draw(3, 5, 4, seed=1), draw(3, 5, 1, seed=2)

    def function(s: Tensor, t: Tensor, w: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        value = ((s - t).square() * w).sum()
        return (value, 2 * (s - t) * w) if by_hand else value

    ours = sum_in_parts(function, student, teacher.requires_grad_(), weight, dim=dim)
    both(ours, ((student - teacher.detach()).square() * weight).sum(), student)
    ours.backward()
    assert teacher.grad is None


def test_student_without_gradient() -> None:
    value = sum_in_parts(lambda s, t: (s - t).square().sum(), draw(2, 3), draw(2, 3, seed=1))
    assert not value.requires_grad
    assert value.item() == pytest.approx((draw(2, 3) - draw(2, 3, seed=1)).square().sum().item())


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match=r"equally long along dimension 1, received \[3, 4\]"):
        sum_in_parts(lambda s, t: (s * t).sum(), draw(2, 3), draw(2, 4), dim=1)


def test_precision_of_the_gradient_is_the_students() -> None:
    student = draw(2, 6, 3).bfloat16().requires_grad_()
    value = weighted_binary_kl(student, draw(2, 6, 3, seed=1).bfloat16(), torch.ones(2, 6))
    assert value.dtype == torch.float32
    assert torch.autograd.grad(value, student)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("spread", [1.0, 30.0])
@pytest.mark.usefixtures("in_float64")
def test_binary_kl(spread: float) -> None:
    student, teacher = draw(3, 8, 5, spread=spread).requires_grad_(), draw(3, 8, 5, seed=1, spread=spread)
    weights = draw(3, 8, seed=2).abs()
    before = student.detach().clone()
    plain = (binary_kl(student, teacher).sum(-1) * weights).sum()
    both(weighted_binary_kl(student, teacher, weights), plain, student)
    assert torch.equal(student, before)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.usefixtures("in_float64")
def test_bins_kl(temperature: float) -> None:
    student, teacher = draw(3, 8, 20).requires_grad_(), draw(3, 8, 20, seed=1)
    weights = draw(3, 8, seed=2).abs()
    sides = (4, 5)
    rows = categorical_kl(student.unflatten(-1, sides), teacher.unflatten(-1, sides), temperature).mean(-1)
    before = student.detach().clone()
    both(weighted_bins_kl(student, teacher, weights, 5, temperature), (rows * weights).sum(), student)
    assert torch.equal(student, before)


@pytest.mark.parametrize("beta", [1.0, 2.5])
@pytest.mark.parametrize("shape", [(3, 8, 5), (8, 5)])
@pytest.mark.usefixtures("in_float64")
def test_gap_cross_entropy(shape: tuple[int, ...], beta: float) -> None:
    student, teacher = draw(*shape).requires_grad_(), draw(*shape, seed=1)
    both(gap_cross_entropy_sum(student, teacher, beta), gap_cross_entropy(student, teacher, beta).sum(), student)
    with pytest.raises(ValueError, match="shapes must agree"):
        gap_cross_entropy_sum(student, teacher[..., :1], beta)


@pytest.mark.parametrize("by_hand", [False, True])
def test_shared_tensors_get_the_gradient_of_all_parts(by_hand, monkeypatch):
    monkeypatch.setattr(chunked, "PART", 12)
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


@pytest.mark.parametrize("raw", [True, False])
def test_raw_parts_come_as_they_are(raw: bool) -> None:
    student, teacher = draw(3, 4, 5).bfloat16(), draw(3, 5, 4, seed=1).bfloat16().mT
    seen = []

    def function(s: Tensor, t: Tensor) -> list[tuple[Tensor, ...]]:
        seen.append((s.dtype, t.dtype, t.stride() == s.stride()))
        return [((s.detach().float() * t.float()).sum(), t)]

    (value,) = sums_in_parts(function, student.requires_grad_(), teacher, raw=raw)
    assert set(seen) == {(torch.bfloat16, torch.bfloat16, False) if raw else (torch.float32, torch.float32, True)}
    assert torch.equal(torch.autograd.grad(value, student)[0], teacher)


@pytest.mark.parametrize("in_place", [True, False])
def test_kl_of_powers_overwrites_what_it_says(in_place: bool) -> None:
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


@pytest.mark.parametrize("innermost", [True, False])
def test_channel_norms(innermost: bool) -> None:
    maps = draw(2, 6, 5).mT if innermost else draw(2, 5, 6)
    torch.testing.assert_close(channel_norms(maps), maps.norm(dim=1, keepdim=True))


def test_several_sums_are_each_what_it_would_be_alone(monkeypatch):
    """Values, and gradients under different scales, of all tensors; a sum that goes unused has no part in them."""
    monkeypatch.setattr(chunked, "PART", 12)
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


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("layout", ["points last", "classes last"])
def test_points_without_weight_are_left_out_and_nothing_else_changes(share: float, layout: str) -> None:
    student, teacher = (draw(3, 40, 8, seed=i) for i in (0, 1))
    if layout == "points last":  # as a head's raw outputs lie in memory
        student, teacher = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (student, teacher))
    student.requires_grad_()
    weights = draw(3, 40, seed=2).abs()
    weights[torch.rand(3, 40, generator=torch.Generator().manual_seed(3)) >= share] = 0
    both(
        weighted_binary_kl(student, teacher, weights),
        (binary_kl(student, teacher).sum(-1) * weights).sum(),
        student,
    )
    bins = [x.unflatten(-1, (4, 2)) for x in (student, teacher)]
    plain = (categorical_kl(*bins).mean(-1) * weights).sum()
    both(weighted_bins_kl(student, teacher, weights, 2), plain, student)
    count = int(weights.count_nonzero())
    chosen = points_that_count(student, teacher, weights)
    assert chosen[2].shape == ((1, count) if count <= 60 else (3, 40))
    if count <= 60:  # row by row, as the native loss's gradient lies to which it is added
        (gradient,) = torch.autograd.grad(chosen[0].sum(), student)
        assert gradient.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_others_reach_the_function_as_the_first_lies_in_memory(dtype: torch.dtype) -> None:
    maps, weights = draw(4, 3, 5, 2).to(dtype), draw(4, 5, 2)
    other = draw(4, 3, 5, 2, seed=1).to(dtype).contiguous(memory_format=torch.channels_last)

    def function(s: Tensor, t: Tensor, w: Tensor) -> Tensor:
        assert s.stride() == t.stride()
        assert s.dtype == t.dtype == torch.promote_types(dtype, torch.float32)
        return ((s - t).square().sum(1) * w).sum()

    expected = ((maps.double() - other.double()).square().sum(1) * weights).sum()
    for mine, theirs in ((maps, other), (other, maps)):
        found = sum_in_parts(function, mine.clone().requires_grad_(), theirs, weights)
        torch.testing.assert_close(found, expected)


def test_gradients_that_float16_cannot_hold_survive_until_they_are_scaled() -> None:
    student, teacher = draw(3, 5, 4).half().requires_grad_(), draw(3, 5, 4, seed=1)
    tiny, loss_scale = 1e-9, 2.0**16

    def function(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        assert s.dtype == torch.float32
        return tiny * (s - t).square().sum(), 2 * tiny * (s.detach() - t)

    (sum_in_parts(function, student, teacher.float()) * loss_scale).backward()
    expected = 2 * tiny * loss_scale * (student.detach().float() - teacher.float())
    assert student.grad.dtype == torch.float16
    torch.testing.assert_close(student.grad.float(), expected, rtol=1e-2, atol=1e-7)
    assert (student.grad != 0).sum() > 50


@pytest.mark.parametrize("channels_last", [False, True])
def test_sums_over_cells(channels_last: bool) -> None:
    maps, weights = draw(2, 5, 6).requires_grad_(), draw(2, 6, seed=1).requires_grad_()
    lain = maps.mT.contiguous().mT if channels_last else maps
    found, expected = sum_cells(lain, weights), (maps * weights[:, None]).sum(2)
    torch.testing.assert_close(found, expected)
    for ours, plain in zip(
        *(torch.autograd.grad(x.square().sum(), (maps, weights)) for x in (found, expected)), strict=True
    ):
        torch.testing.assert_close(ours, plain)
