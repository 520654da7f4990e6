"""Distillation of the distance distributions at the student's positives (YOLOv6, 2022)."""

from __future__ import annotations

from torch import Tensor

from yolo_kd.losses.base import AboveZero, Loss
from yolo_kd.losses.kernels.ops import assigned, box_distributions, categorical_kl, same_shape, weighted_mean
from yolo_kd.structures import LossInputs

# weight 1.0: the gradient into the neck is about a third of the task loss's (table and command in docs/losses.md)
STRENGTH = 0.35


def distribution_kl(student: Tensor, teacher: Tensor, positive: Tensor, temperature: float = 20.0) -> Tensor:
    """Divergence of distance distributions, averaged over the positives and their four sides.

    L = T² / (4 P) Σ_positives Σ_sides KL(softmax(t / T) ‖ softmax(s / T))

    Args:
        student: (..., 4, bins) logits, with gradient.
        teacher: (..., 4, bins) logits; detached here.
        positive: (...) weights, 1 at positives and 0 elsewhere.
        temperature: T, above zero.

    Returns:
        Scalar, at least 0; zero if nothing is positive.

    Raises:
        ValueError: If shapes differ.
    """
    same_shape(positive=positive, points=student[..., 0, 0])
    return weighted_mean(categorical_kl(student, teacher, temperature).mean(-1), positive)


class DFL(Loss):
    """YOLOv6's distillation of the box distributions.

    Li et al., "YOLOv6: A Single-Stage Object Detection Framework for Industrial Applications", 2022, arXiv 2209.02976,
    the section on self-distillation, and the project's code. In YOLOv6 the term fades during the training; here the
    recipe does that with `schedule: {kind: cosine, start: 1.0, end: 0.01}`.

    One departure: YOLOv6's class term is left out. It takes a softmax of probabilities that are already sigmoids, which
    is nearly uniform, and sums over all points of the batch, so that it teaches little and grows with the image. The
    code also multiplies by target scores and divides by their sum, which cancels out; the mean is unweighted there and
    here. A batch without positives gives zero.

    Args:
        temperature: T of both softmaxes, above 0.
    """

    name = "dfl"
    columns = ("kdfl_loss",)
    reads = frozenset({"boxes", "assignment"})
    paper = "Li et al. 2022 (YOLOv6), arXiv 2209.02976"
    needs_bins = True
    instead = "bckd"

    temperature: AboveZero = 20.0

    def forward(self, inputs: LossInputs) -> dict[str, Tensor]:
        """Return the only term."""
        positive = assigned(inputs).foreground.float()
        return {"kdfl_loss": STRENGTH * distribution_kl(*box_distributions(inputs), positive, self.temperature)}
