"""Sums in chunks against the plain formulas, with autograd's gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.losses.kernels.draws import both, draw
from yolo_kd.losses.kernels import chunked
from yolo_kd.losses.kernels.chunked import sum_in_chunks, sums_in_chunks


@pytest.fixture(autouse=True, params=[7, 2**18], ids=["many chunks", "one chunk"])
def chunk_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CHUNK", request.param)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("by_hand", [True, False])
def test_a_sum_and_its_gradient(dim: int, by_hand: bool) -> None:
    student, teacher, weight = draw(3, 5, 4).requires_grad_(), draw(3, 5, 4, seed=1), draw(3, 5, 1, seed=2)

    def function(s: Tensor, t: Tensor, w: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        value = ((s - t).square() * w).sum()
        return (value, 2 * (s - t) * w) if by_hand else value

    ours = sum_in_chunks(function, student, teacher.requires_grad_(), weight, dim=dim)
    both(ours, ((student - teacher.detach()).square() * weight).sum(), student)
    ours.backward()
    assert teacher.grad is None


def test_student_without_gradient() -> None:
    value = sum_in_chunks(lambda s, t: (s - t).square().sum(), draw(2, 3), draw(2, 3, seed=1))
    assert not value.requires_grad
    assert value.item() == pytest.approx((draw(2, 3) - draw(2, 3, seed=1)).square().sum().item())


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match=r"equally long along dimension 1, received \[3, 4\]"):
        sum_in_chunks(lambda s, t: (s * t).sum(), draw(2, 3), draw(2, 4), dim=1)


@pytest.mark.parametrize("by_hand", [False, True])
def test_shared_tensors_get_the_gradient_of_all_chunks(by_hand, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK", 12)
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
        value = (s * other * w).square().sum() if whole else sum_in_chunks(function, s, other, shared=(w,))
        (3 * value).backward()
        results.append((value.detach(), s.grad, w.grad))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("raw", [True, False])
def test_raw_chunks_arrive_unchanged(raw: bool) -> None:
    student, teacher = draw(3, 4, 5).bfloat16(), draw(3, 5, 4, seed=1).bfloat16().mT
    seen = []

    def function(s: Tensor, t: Tensor) -> list[tuple[Tensor, ...]]:
        seen.append((s.dtype, t.dtype, t.stride() == s.stride()))
        return [((s.detach().float() * t.float()).sum(), t)]

    (value,) = sums_in_chunks(function, student.requires_grad_(), teacher, raw=raw)
    assert set(seen) == {(torch.bfloat16, torch.bfloat16, False) if raw else (torch.float32, torch.float32, True)}
    assert torch.equal(torch.autograd.grad(value, student)[0], teacher)


def test_several_sums_equal_single_sums(monkeypatch):
    """Values and gradients of all tensors agree under different scales; an unused sum changes nothing."""
    monkeypatch.setattr(chunked, "CHUNK", 12)
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
            a, b = plain if whole else sums_in_chunks(function, s, other, shared=(w,))
            (scales[0] * a + scales[1] * b if all(scales) else scales[0] * a if scales[0] else scales[1] * b).backward()
            results.append((a.detach(), b.detach(), s.grad, torch.zeros_like(w) if w.grad is None else w.grad))
        for ours, expected in zip(*results, strict=True):
            torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_others_arrive_in_the_memory_format_of_the_first(dtype: torch.dtype) -> None:
    maps, weights = draw(4, 3, 5, 2).to(dtype), draw(4, 5, 2)
    other = draw(4, 3, 5, 2, seed=1).to(dtype).contiguous(memory_format=torch.channels_last)

    def function(s: Tensor, t: Tensor, w: Tensor) -> Tensor:
        assert s.stride() == t.stride()
        assert s.dtype == t.dtype == torch.promote_types(dtype, torch.float32)
        return ((s - t).square().sum(1) * w).sum()

    expected = ((maps.double() - other.double()).square().sum(1) * weights).sum()
    for mine, theirs in ((maps, other), (other, maps)):
        found = sum_in_chunks(function, mine.clone().requires_grad_(), theirs, weights)
        torch.testing.assert_close(found, expected)


def test_gradients_that_float16_cannot_hold_survive_until_they_are_scaled() -> None:
    student, teacher = draw(3, 5, 4).half().requires_grad_(), draw(3, 5, 4, seed=1)
    tiny, loss_scale = 1e-9, 2.0**16

    def function(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        assert s.dtype == torch.float32
        return tiny * (s - t).square().sum(), 2 * tiny * (s.detach() - t)

    (sum_in_chunks(function, student, teacher.float()) * loss_scale).backward()
    expected = 2 * tiny * loss_scale * (student.detach().float() - teacher.float())
    assert student.grad.dtype == torch.float16
    torch.testing.assert_close(student.grad.float(), expected, rtol=1e-2, atol=1e-7)
    assert (student.grad != 0).sum() > 50
