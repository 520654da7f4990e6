"""Masked generative feature distillation (Yang et al., 2022)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from yolo_kd.losses.base import FeatureLoss
from yolo_kd.losses.kernels.channel_stats import standardise
from yolo_kd.losses.kernels.ops import same_shape
from yolo_kd.losses.kernels.squared_error import squared_error_sum
from yolo_kd.structures import LossInputs, PairSpec


def generator(channels: int) -> nn.Sequential:
    """Return two 3x3 convolutions with a ReLU between them, which restore the teacher's map."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels, channels, 3, padding=1),
    )


def keep_mask(uniform: Tensor, lam: float, mask: str = "spatial") -> Tensor:
    """Return 1 where the student's map is kept and 0 where it is hidden, in the shape of `uniform`.

    The two published forms draw opposite ends of the interval: they hide cells above 1 - λ, but channels below λ.

    Args:
        uniform: Draws in [0, 1): (B, 1, H, W) to hide cells, (B, C, 1, 1) to hide channels.
        lam: Share that is hidden on average, in [0, 1].
        mask: `spatial` or `channel`.
    """
    return (uniform <= 1 - lam if mask == "spatial" else uniform >= lam).to(uniform)


def mgd_sum(student: Tensor, teacher: Tensor, keep: Tensor, generate: Callable[[Tensor], Tensor]) -> Tensor:
    """Return 1/N Σ (G(S · keep) - T)² of one level, the published loss before its factor alpha (equation 5).

    Unlike in dropout, the part that is kept is not scaled up by 1 / (1 - λ).

    Args:
        student: (B, C, H, W), already at the teacher's width, with gradient.
        teacher: (B, C, H, W); detached here.
        keep: From `keep_mask`, (B, 1, H, W) or (B, C, 1, 1).
        generate: G, which keeps the shape.

    Returns:
        Scalar, at least 0.

    Raises:
        ValueError: If shapes differ.
    """
    same_shape(student=student, teacher=teacher)
    return squared_error_sum(generate(student * keep).float(), teacher) / student.shape[0]


class MGD(FeatureLoss):
    """Masked generative distillation of neck features.

    Yang et al., "Masked Generative Distillation", ECCV 2022, arXiv 2205.01529, section 3. Each step hides another part
    of the student's map, and a small generator must restore the teacher's whole map from the rest.

    The published sum over channels and cells is divided by both. That leaves the mean squared error per level, which is
    independent of image size, batch size and width. At 256 channels and 2800 cells (P3 to P5 at 640 px) the published
    alpha of one-stage detectors, 2e-5, makes the loss 14.3 times that mean (alpha C H W), several times the task loss
    of a YOLO head; `strength` replaces it. Levels are added, as published.

    Other departures:

    - Both maps are standardised per channel by default (`standardise`), as in DAMO-YOLO, because the scales of YOLO
      necks differ by layer.
    - The 1x1 adapter is present for equal widths too.
    - In eval mode nothing is hidden, so that a validation loss is repeatable.
    - The generators are trained with the student, while the optimiser of DAMO-YOLO's code does not reach them. They run
      in the precision of the student's layers.
    - The paper hides cells. The authors' classification code hides whole channels and names a λ of 0.5 that it sets to
      0.15. Both kinds are available.

    The minimum 0 is reached where the generator restores the teacher's map, not where student and teacher agree.

    Args:
        lam: Share that is hidden (the paper's λ), in [0, 1): 0.65 one-stage, 0.45 two-stage, 0.75 segmentation, 0.15
            for channels in classification.
        mask: `spatial` hides cells, the same in all channels; `channel` hides channels, the same in all cells.
        standardise: Rescale each channel of both maps to mean 0 and variance 1 over the batch first.
        levels: Levels to use, all by default.
    """

    name = "mgd"
    columns = ("mgd_loss",)
    reads = frozenset({"features"})
    adapter = "conv1x1"
    paper = "Yang et al. 2022, arXiv 2205.01529"
    strength = 0.7

    lam: Annotated[float, Field(ge=0, lt=1)] = 0.65
    mask: Literal["spatial", "channel"] = "spatial"
    standardise: bool = True

    def build(self, pair: PairSpec) -> None:
        """Make a generator for each level."""
        super().build(pair)
        self.generators = nn.ModuleList(generator(pair.teacher_channels[i]) for i in self.level_indices)

    def level_loss(self, inputs: LossInputs, level: int) -> Tensor:
        """Return the mean squared error of the restored map of one level."""
        student, teacher = self.maps(inputs, level, as_is=False)
        if self.standardise:
            student, teacher = standardise(student), standardise(teacher)
        restore = partial(inputs.layer, self.of_level(self.generators, level))
        return mgd_sum(student, teacher, self._keep(student), restore) / teacher[0].numel()

    def _keep(self, student: Tensor) -> Tensor:
        """Draw the mask of the student's map; in eval mode it keeps everything."""
        b, c, h, w = student.shape
        size = (b, 1, h, w) if self.mask == "spatial" else (b, c, 1, 1)
        if not self.training:
            return student.new_ones(size)
        return keep_mask(torch.rand(size, device=student.device, dtype=student.dtype), self.lam, self.mask)
