"""Channels at another scale against numpy and plain autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from yolo_kd.losses.kernels import channel_stats
from yolo_kd.losses.kernels.channel_stats import deviations, rescaling, standardise, standardising

LAYOUTS = [torch.contiguous_format, torch.channels_last]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 7


def rows(maps: Tensor) -> np.ndarray:
    return maps.detach().transpose(0, 1).flatten(1).numpy()


def plain(maps: Tensor, scale: Tensor, shift: Tensor, eps: float, divisor: int) -> Tensor:
    """Return what a `rescaling` does, step by step."""
    centred = maps - maps.mean((0, 2, 3), keepdim=True)
    std = (centred.square().sum((0, 2, 3), keepdim=True) / divisor).sqrt()
    return centred / (std + eps) * scale[:, None, None] + shift[:, None, None]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_standardise_is_batch_normalisation(layout: torch.memory_format) -> None:
    x, slope = draw(2, 4, 3, 5).to(memory_format=layout), draw(2, 4, 3, 5, seed=1)
    flat = rows(x)
    expected = (flat - flat.mean(1, keepdims=True)) / np.sqrt(flat.var(1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(rows(standardise(x)), expected, rtol=1e-7)
    found, theirs = (x.clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2))
    standardise(found).backward(slope)
    F.batch_norm(theirs, None, None, training=True).backward(slope)
    torch.testing.assert_close(found.grad, theirs.grad)


def test_standardise_of_a_single_value_is_zero_in_the_graph() -> None:
    x = torch.ones(1, 3, 1, 1, requires_grad=True)
    out = standardise(x)
    assert not out.any()
    out.sum().backward()
    assert not x.grad.any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_of_half_precision_are_not_rounded_to_it(dtype: torch.dtype, layout: torch.memory_format) -> None:
    """A mean of 30 deviations, which bfloat16 knows to an eighth of one."""
    x = (draw(4, 6, 8, 8) / 30 + 3).to(dtype).to(memory_format=layout)
    torch.testing.assert_close(standardising(x).of(x.float()).double(), standardise(x.double()), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(standardise(x).double(), standardise(x.double()), atol=0.02, rtol=0)
    scaled = rescaling(x, eps=0, divisor=256)(x)
    assert scaled.dtype == dtype
    torch.testing.assert_close(
        scaled.double(), rescaling(x.double(), eps=0, divisor=256)(x.double()), atol=0.02, rtol=0
    )
    mean, std = deviations(x, 255)
    assert mean.dtype == std.dtype == torch.float32
    torch.testing.assert_close(mean.double(), x.double().mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(std.double(), x.double().std((0, 2, 3)), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("slope_layout", LAYOUTS)
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_a_rescaling_and_its_gradient(
    layout: torch.memory_format, slope_layout: torch.memory_format, unbiased: bool, eps: float
) -> None:
    maps, scale, shift = draw(3, 5, 4, 2).to(memory_format=layout), draw(5, seed=1), draw(5, seed=2)
    slope = draw(3, 5, 4, 2, seed=3).to(memory_format=slope_layout)
    found, again, expected = (maps.clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(3))
    theirs = plain(expected, scale, shift, eps, 24 - unbiased)
    theirs.backward(slope)
    change = rescaling(found, scale, shift, eps=eps, divisor=24 - unbiased)
    ours = change(found)
    ours.backward(slope)
    assert torch.equal(change.through(again), again)
    change.through(again).backward(slope)
    for y in (ours, change.of(maps)):
        torch.testing.assert_close(y, theirs, rtol=1e-10, atol=1e-10)
    for x in (found, again):
        torch.testing.assert_close(x.grad, expected.grad, rtol=1e-9, atol=1e-9)
        assert x.grad.is_contiguous(memory_format=layout)
    _, std = deviations(maps, 24 - unbiased)
    np.testing.assert_allclose(std, rows(maps).std(1, ddof=int(unbiased)), rtol=1e-10)


@pytest.mark.parametrize("shape", [(3, 5, 4, 2), (1, 5, 1, 1), (2, 1, 1, 3)])
def test_standardising_is_standardise(shape: tuple[int, ...]) -> None:
    maps, slope = draw(*shape), draw(*shape, seed=1)
    found, expected = (maps.clone().requires_grad_() for _ in range(2))
    theirs = standardise(expected)
    theirs.backward(slope)
    change = standardising(found)
    change.through(found).backward(slope)
    torch.testing.assert_close(change.of(maps), theirs, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("value", [2.5, 2.7])  # the mean of the latter is another number
def test_a_channel_of_one_value_becomes_its_shift(value: float) -> None:
    """And its gradient is what goes through the mean alone."""
    maps = draw(2, 3, 4, 4)
    maps[:, 1] = value
    maps.requires_grad_()
    slope = draw(2, 3, 4, 4, seed=1)
    change = rescaling(maps, torch.full((3,), 2.0).double(), torch.arange(3).double(), eps=1e-6, divisor=31)
    out = change(maps)
    out.backward(slope)
    for y in (out, change.of(maps)):
        torch.testing.assert_close(y[:, 1], torch.ones(2, 4, 4).double(), rtol=0, atol=1e-8)
    expected = 2.0 / 1e-6 * (slope[:, 1] - slope[:, 1].mean())
    torch.testing.assert_close(maps.grad[:, 1], expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_devices_without_a_kernel_for_statistics_have_the_same(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps = draw(3, 5, 4, 2).to(dtype)
    expected = deviations(maps, 23)
    monkeypatch.setattr(channel_stats, "WITH_STATISTICS", ())
    for ours, theirs in zip(deviations(maps, 23), expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs)


def test_a_divisor_of_zero_is_nan() -> None:
    maps = torch.ones(1, 3, 1, 1)
    assert rescaling(maps, eps=1e-6, divisor=0).of(maps).isnan().all()
