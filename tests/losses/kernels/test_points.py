"""Sums over points against the plain formulas of `ops`, with autograd's gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.losses.kernels.draws import both, draw
from yolo_kd.losses.kernels import chunked
from yolo_kd.losses.kernels.ops import binary_kl, categorical_kl, gap_cross_entropy
from yolo_kd.losses.kernels.points import gap_cross_entropy_sum, points_that_count, weighted_binary_kl, weighted_bins_kl


@pytest.fixture(autouse=True, params=[7, 2**18], ids=["many chunks", "one chunk"])
def chunk_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CHUNK", request.param)


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "float", lambda self: self)


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


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("layout", ["points last", "classes last"])
def test_points_without_weight_are_left_out_and_nothing_else_changes(share: float, layout: str) -> None:
    student, teacher = (draw(3, 40, 8, seed=i) for i in (0, 1))
    if layout == "points last":  # the memory format of a head's raw outputs
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
    if count <= 60:  # row by row, like the gradient of the task loss, to which it is added
        (gradient,) = torch.autograd.grad(chosen[0].sum(), student)
        assert gradient.is_contiguous()
