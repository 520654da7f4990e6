"""The loss that Ultralytics has built in as `distill_model=`: score-weighted squared error of neck features."""

from __future__ import annotations

from torch import Tensor

from yolo_kd.losses.base import AtLeastZero, FeatureLoss
from yolo_kd.losses.kernels.ops import EPS, same_shape
from yolo_kd.losses.kernels.squared_error import squared_error_sum
from yolo_kd.structures import LossInputs


def score_weighted_l2(student: Tensor, teacher: Tensor, score: Tensor) -> Tensor:
    """Squared error per cell, weighted by the teacher's largest class probability there.

    L = Σ_{b,hw} w Σ_c (s − t)² / (C Σ_{b,hw} w + 1e-9)

    Args:
        student: (B, C, H, W), already at the teacher's width.
        teacher: (B, C, H, W).
        score: (B, 1, H, W) weights in [0, 1].

    Returns:
        Scalar, at least 0.

    Raises:
        ValueError: If shapes differ.
    """
    same_shape(student=student, teacher=teacher)
    same_shape(score=score, cells=teacher[:, :1])
    return squared_error_sum(student, teacher, score[:, 0]) / (score.sum() * student.shape[1] + EPS)


class Ultralytics(FeatureLoss):
    """The distillation loss of Ultralytics itself, the reference arm of every comparison.

    Ultralytics 8.4, `distill_model=` with its default `dis=6.0`. The student's features pass a projector (1x1
    convolution, ReLU, 1x1 convolution) and are compared with the teacher's. Each cell is weighted by the teacher's
    largest class probability; end-to-end heads take it from the mean of both branches' logits. No departure: with equal
    seed, teacher and precision the loss curve is Ultralytics'.

    Args:
        dis: Ultralytics' gain, the same for all levels, at least 0.
        levels: Levels to use, all by default.
    """

    name = "ultralytics"
    columns = ("dis_loss",)
    reads = frozenset({"features", "scores", "one2one"})
    adapter = "mlp"
    paper = "Ultralytics 8.4, distill_model="

    dis: AtLeastZero = 6.0

    def forward(self, inputs: LossInputs) -> dict[str, Tensor]:
        """Return the only term, summed over levels in Ultralytics' order of additions."""
        t = inputs.teacher
        logits = t.scores if t.one2one_scores is None else (t.scores + t.one2one_scores) / 2
        score = t.per_level(logits.detach().sigmoid().amax(-1, keepdim=True).float())
        terms = []
        for i in self.level_indices:
            weight = score[i].transpose(1, 2).unflatten(-1, t.shapes[i])
            terms.append(score_weighted_l2(*self.maps(inputs, i), weight) * self.dis)
        return {"dis_loss": sum(terms[1:], terms[0])}
