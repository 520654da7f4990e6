"""Channels rescaled to another mean and standard deviation over batch and cells.

It uses the kernels of batch normalisation, which read maps in their memory format and precision and add up in float32
or better.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

WITH_STATISTICS = ("cpu", "cuda")  # devices that have a kernel for statistics alone; others convert maps to float32


def standardise(maps: Tensor, eps: float = 1e-5) -> Tensor:
    """Give each channel mean 0 and variance 1 over batch and space: batch normalisation without learned scale.

    The gradient flows through mean and variance too. A channel with a single number becomes 0.

    Args:
        maps: (B, C, H, W).
        eps: Added to the variance, which is divided by the count, not by the count less one.
    """
    if maps.numel() == maps.shape[1]:
        return maps - maps
    return standardising(maps, eps)(maps)


@dataclass(frozen=True)
class Rescaling:
    """y = (x - mean) k + shift for each channel, where k depends on the standard deviation of x.

    Attributes:
        mean: m, (C,), float32 or better, like the other tensors.
        factor: k, (C,).
        inverse: r, (C,), such that the gradient is k (g - mean(g)) - k r² (x - m) mean(g (x - m)). Batch
            normalisation's gradient has this form, with r for one over its standard deviation and k / r for its weight.
        shift: (C,).
    """

    mean: Tensor
    factor: Tensor
    inverse: Tensor
    shift: Tensor

    def through(self, maps: Tensor) -> Tensor:
        """Return (B, C, H, W) maps unchanged; their gradient is taken as that of y and turned into that of x."""
        return _Through.apply(maps, self)

    def of(self, images: Tensor) -> Tensor:
        """Return y of some of the images, detached: (B, C, H, W) in the precision of the statistics."""
        factor, shift = self._line
        return torch.addcmul(shift[:, None, None], images.detach(), factor[:, None, None])

    def __call__(self, maps: Tensor) -> Tensor:
        """Return y of the maps that the statistics were taken from, in the precision of the maps, with gradient."""
        return _Rescaled.apply(maps, self)

    @cached_property
    def _line(self) -> tuple[Tensor, Tensor]:
        """Factor and summand of x. A channel whose cells are all equal becomes exactly `shift`."""
        factor = torch.where(self.inverse == 0, 0.0, self.factor)
        return factor, self.shift - self.mean * factor


def standardising(maps: Tensor, eps: float = 1e-5) -> Rescaling:
    """Return the rescaling that `standardise` applies, for losses that work on chunks of images.

    Args:
        maps: (B, C, H, W).
        eps: As in `standardise`.
    """
    mean, variance = _moments(maps)
    factor = (variance + eps).rsqrt_()
    return Rescaling(mean, factor, factor, torch.zeros_like(mean))


def rescaling(
    maps: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, *, eps: float, divisor: int
) -> Rescaling:
    """Return (x - mean(x)) / (std(x) + ε) · scale + shift for each channel, over batch and cells.

    Args:
        maps: (B, C, H, W).
        scale: (C,), 1 by default.
        shift: (C,), 0 by default.
        eps: ε, added to the standard deviation.
        divisor: Divisor of the sums of squares: B H W, or one less. Zero makes everything nan.
    """
    mean, std = deviations(maps, divisor)
    factor = (1 if scale is None else scale) / (std + eps)
    inverse = (maps[:, 0].numel() / max(divisor, 1) / (std * (std + eps))).sqrt_()
    # A channel whose cells are all equal has no deviation for a gradient to flow through, and x - m is 0 there.
    inverse = torch.where(std == 0, 0.0, inverse)
    return Rescaling(mean, factor, inverse, torch.zeros_like(mean) if shift is None else shift)


def deviations(maps: Tensor, divisor: int) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel over batch and cells, (C,) each, in float32 or better.

    Args:
        maps: (B, C, H, W).
        divisor: Divisor of the sums of squares: B H W, or one less.
    """
    mean, variance = _moments(maps)
    return mean, (variance * maps[:, 0].numel() / divisor).sqrt_()


def _moments(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of each channel over batch and cells."""
    dtype = torch.promote_types(maps.dtype, torch.float32)
    if maps.device.type not in WITH_STATISTICS:
        variance, mean = torch.var_mean(maps.detach().to(dtype), (0, 2, 3), correction=0)
        return mean, variance
    # The running statistics, which nobody reads, set the precision. Without them, half precision would be rounded.
    ignored, too = (maps.new_zeros(maps.shape[1], dtype=dtype) for _ in range(2))
    return torch.batch_norm_update_stats(maps.detach(), ignored, too, 0.0)


class _Through(torch.autograd.Function):
    """The gradient of a rescaling."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, rescaling: Rescaling) -> Tensor:
        """Return the maps themselves."""
        ctx.save_for_backward(maps, rescaling.mean, rescaling.factor, rescaling.inverse)
        return maps.view_as(maps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        """Return the gradient, also through mean and deviation, in the memory format of the maps."""
        maps, mean, factor, inverse = ctx.saved_tensors
        inverse = torch.where(inverse == 0, 1.0, inverse)
        layout = torch.contiguous_format if maps.is_contiguous() else torch.channels_last
        slope = slope.contiguous(memory_format=layout)
        gradient, _, _ = torch.ops.aten.native_batch_norm_backward(
            slope, maps, factor / inverse, None, None, mean, inverse, True, 0.0, [True, False, False]
        )
        return gradient, None


class _Rescaled(_Through):
    """A rescaling with its gradient."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, rescaling: Rescaling) -> Tensor:
        """Return y."""
        _Through.forward(ctx, maps, rescaling)
        factor, shift = rescaling._line
        one = torch.ones_like(factor)
        return F.batch_norm(maps, torch.zeros_like(one), one, factor, shift, eps=0.0)
