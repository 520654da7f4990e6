"""The loss that Ultralytics builds in as `distill_model=`: score-weighted squared error of neck features."""

from __future__ import annotations

from torch import Tensor

from yolo_kd.losses.base import AtLeastZero, LevelNames, Loss, check_levels, check_range
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


class Ultralytics(Loss):
    """Upstream's own distillation loss, so that it can be the reference arm of every comparison.

    Ultralytics 8.4, `distill_model=` with its default `dis=6.0`: the student's features pass a projector (1x1
    convolution, ReLU, 1x1 convolution) and are compared with the teacher's, each cell weighted by the teacher's largest
    class probability; for end-to-end heads of the mean of both branches' logits. No departure: with equal seed,
    teacher and precision the loss curve is upstream's.

    Args:
        dis: Upstream's gain, the same for all levels, at least 0.
        levels: Levels to use, all by default.
    """

    name = "ultralytics"
    columns = ("dis_loss",)
    reads = frozenset({"features", "scores", "one2one"})
    adapter = "mlp"
    paper = "Ultralytics 8.4, distill_model="

    def __init__(self, *, dis: AtLeastZero = 6.0, levels: LevelNames | None = None):
        super().__init__()
        self.dis = check_range("dis", dis, 0)
        self.level_names = check_levels(levels)

    def forward(self, step: LossInputs) -> dict[str, Tensor]:
        """Return the one term, summed over levels."""
        t = step.teacher
        logits = t.scores if t.one2one_scores is None else (t.scores + t.one2one_scores) / 2
        score = t.per_level(logits.detach().sigmoid().amax(-1, keepdim=True).float())
        terms = []
        for i in self.levels:
            weight = score[i].transpose(1, 2).unflatten(-1, t.shapes[i])
            maps = step.aligned("mlp", i, as_is=True), step.teacher_feature(i, as_is=True)
            terms.append(score_weighted_l2(*maps, weight) * self.dis)
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return {"dis_loss": total}
