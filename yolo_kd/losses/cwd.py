"""Channel-wise distillation: where in the image each channel looks (Shu et al., ICCV 2021)."""

from __future__ import annotations

import torch
from torch import Tensor

from yolo_kd.losses.base import AboveZero, LevelNames, Loss, check_levels, check_range
from yolo_kd.losses.kernels.channel_stats import standardising
from yolo_kd.losses.kernels.chunked import converted, sum_in_chunks
from yolo_kd.losses.kernels.ops import same_shape
from yolo_kd.losses.kernels.softmax_kl import softmax_kl
from yolo_kd.structures import LossInputs

# weight 1.0: the gradient into the neck is about a third of the task loss's (table and command in docs/losses.md)
STRENGTH = 0.35


def cwd(student: Tensor, teacher: Tensor, temperature: float = 1.0, standardised: bool = False) -> Tensor:
    """Divergence between the spatial distributions of each channel.

    L = τ² / (B C) Σ_b Σ_c KL(softmax_hw(t_bc / τ) ‖ softmax_hw(s_bc / τ))

    The paper's loss, τ² included, which lets the gradient keep its size. C is the number of channels that are compared,
    the teacher's. A widespread detection port minimises cross-entropy instead and divides by the student's own width:
    its value does not vanish at agreement and its gradient is larger by C_teacher / C_student.

    Args:
        student: (B, C, H, W), already at the teacher's width.
        teacher: (B, C, H, W); detached here.
        temperature: τ, above zero. Larger ones spread the attention over more cells.
        standardised: Bring each channel of both maps to mean 0 and variance 1 over the batch first.

    Returns:
        Scalar in nats, at least 0, zero where each channel differs by a constant at most.

    Raises:
        ValueError: If shapes differ.
    """
    same_shape(student=student, teacher=teacher)
    count = student.shape[0] * student.shape[1]
    factors = None
    if standardised:
        own, other = standardising(student), standardising(teacher)
        student = own.through(student)
        # a softmax does not ask for the mean, nor for more of the deviation than a factor
        factors = own.factor[:, None, None], other.factor[:, None, None]
    overwrite = converted(student, teacher)

    def part(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:  # of the images
        return softmax_kl(s, t, temperature, (2, 3), overwrite, factors)

    return sum_in_chunks(part, student, teacher) / count


class CWD(Loss):
    """Channel-wise distillation of the head's input features, summed over levels.

    Shu, Liu, Gao, Yan and Shen, "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021, arXiv
    2011.13256, the section on channel-wise distillation. Where we depart: both maps may be standardised first, as
    DAMO-YOLO does for its necks, because the size of the activations sets how sharp a softmax over raw values is, and
    it differs from layer to layer. That also makes τ mean the same everywhere.

    The published form is a mean over images and channels of a divergence between distributions, so it grows with
    neither batch, width nor image size; weight 1.0 multiplies it by `STRENGTH` only.

    Args:
        temperature: τ, above 0. The paper uses 4 for segmentation, detection ports use 1.
        standardise: Bring each channel of both maps to mean 0 and variance 1 over the batch first. False is the
            published form; its strength depends on the teacher's activations, and under a COCO-trained YOLOv8s it is
            about 35 times weaker.
        levels: Levels to use, all by default.
    """

    name = "cwd"
    columns = ("cwd_loss",)
    reads = frozenset({"features"})
    adapter = "conv1x1"
    paper = "Shu et al. 2021, arXiv 2011.13256"

    def __init__(self, *, temperature: AboveZero = 1.0, standardise: bool = True, levels: LevelNames | None = None):
        super().__init__()
        self.temperature = check_range("temperature", temperature, 0, above=True)
        self.standardise = standardise
        self.level_names = check_levels(levels)

    def forward(self, step: LossInputs) -> dict[str, Tensor]:
        """Return the one term."""
        terms = [
            cwd(
                step.aligned("conv1x1", i, as_is=True),
                step.teacher_feature(i, as_is=True),
                self.temperature,
                self.standardise,
            )
            for i in self.levels
        ]
        return {"cwd_loss": STRENGTH * torch.stack(terms).sum()}
