"""Random tensors in float64, and comparisons with plain formulas."""

from __future__ import annotations

import torch
from torch import Tensor


def draw(*shape: int, seed: int = 0, spread: float = 3.0) -> Tensor:
    return spread * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def both(ours: Tensor, plain: Tensor, student: Tensor) -> None:
    """Compare values and gradients."""
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10)
    found, expected = (torch.autograd.grad(v * 0.3, student, retain_graph=True)[0] for v in (ours, plain))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-9)
