"""Automatic weights, which follow the gradients: arithmetic and state of `weight: auto`."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, distributed, nn

LOWEST, HIGHEST = 1e-4, 100.0
"""Bounds of an automatic weight, so that a vanishing gradient does not make a term explode."""
FRESH = 0.5
"""Share of a new measurement in the mean. Batches differ by a sixth, the first ten steps by up to a factor of 30."""
EARLY = 10
"""First steps, all of which are measured: random adapters and generators have weak gradients at first."""
EVERY = 20
"""Steps between two measurements afterwards."""


def is_measured(step: int) -> bool:
    """Return whether gradients are measured in a step: in each early step, then in one of `EVERY`."""
    return step < EARLY or step % EVERY == 0


def balance(log_weight: Tensor, count: Tensor, ratio: Tensor, task: Tensor, term: Tensor) -> tuple[Tensor, Tensor]:
    """Update the running mean of the weights at which terms have their target ratio.

    The mean is of logarithms, so that twice too strong and twice too weak cancel. It is exponential: the newest
    measurement has the share `FRESH`, the first measurement all of it. A measurement changes nothing unless both
    gradients are positive and finite, which they are not on a batch without objects.

    Args:
        log_weight: Logarithm of the current weights, (T,).
        count: Number of measurements of each term, (T,).
        ratio: Target ratio of each term's gradient to that of the task loss, (T,).
        task: Norm of the task loss's gradient where each term was measured, (T,).
        term: Norm of each unweighted term's gradient, (T,).

    Returns:
        The new logarithms and counts, (T,) each; weights stay within `LOWEST` and `HIGHEST`.
    """
    valid = torch.isfinite(task) & torch.isfinite(term) & (task > 0) & (term > 0)
    wanted = (ratio * task / term).log().clamp(math.log(LOWEST), math.log(HIGHEST))
    share = torch.where(count == 0, 1.0, FRESH)
    return torch.where(valid, log_weight + share * (wanted - log_weight), log_weight), count + valid


class AutoWeights(nn.Module):
    """The automatic weights of terms, equal on all ranks and part of the state dict.

    Reading and updating them does not wait for the device.

    Args:
        ratios: Target ratio by name of the term.
    """

    ratios: Tensor
    log_weight: Tensor
    count: Tensor

    def __init__(self, ratios: Mapping[str, float]):
        super().__init__()
        self.names = tuple(ratios)
        self.steps = 0
        self.register_buffer("ratios", torch.tensor([*ratios.values()]), persistent=False)
        self.register_buffer("log_weight", torch.zeros(len(ratios)))
        self.register_buffer("count", torch.zeros(len(ratios)))

    def weight(self, name: str) -> Tensor:
        """Return the current weight of a term, a scalar on the device."""
        return self.log_weight[self.names.index(name)].exp()

    def tick(self) -> bool:
        """Count a training step, and return whether to measure gradients in it."""
        self.steps += 1
        return is_measured(self.steps - 1)

    def update(self, task: Tensor, term: Tensor) -> None:
        """Update the weights with a measurement, averaged over the ranks that have one.

        Args:
            task: Norm of the task loss's gradient where each term was measured, (T,).
            term: Norm of each unweighted term's gradient, (T,); NaN where it was not measured.
        """
        valid = torch.isfinite(task) & torch.isfinite(term) & (task > 0) & (term > 0)
        sums = torch.stack([task.where(valid, 0), term.where(valid, 0), valid.to(task.dtype)])
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(sums)
        task, term = sums[0] / sums[2], sums[1] / sums[2]
        log_weight, count = balance(self.log_weight, self.count, self.ratios, task, term)
        self.log_weight.copy_(log_weight)
        self.count.copy_(count)

    def get_extra_state(self) -> int:
        """Return the number of steps, for the state dict."""
        return self.steps

    def set_extra_state(self, state: int) -> None:
        """Restore the number of steps."""
        self.steps = int(state)
