"""Objectness-scaled logit distillation for anchor-free heads (Mehta & Öztürk, 2018)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from yolo_kd.losses.base import AtLeastZero, Loss
from yolo_kd.losses.kernels.ops import (
    EPS,
    distance_giou,
    expected_distance,
    feature_map_nms,
    same_shape,
    weighted_mean,
)
from yolo_kd.losses.kernels.points import weighted_binary_kl, weighted_bins_kl
from yolo_kd.structures import LossInputs

# The class gain is the gain of Ultralytics' class loss. With both gains the gradient into the neck is half of the task
# loss's, like that of Ultralytics' distillation (table and command in docs/losses.md).
CLS_GAIN = 0.5
BOX_GAIN = 1.0


def objectness_class(student: Tensor, teacher: Tensor, objectness: Tensor) -> Tensor:
    """Class distillation in which each point is weighted by the teacher's objectness.

    L = Σ_i o_i Σ_c KL(σ(t_ic) ‖ σ(s_ic)) / Σ_i o_i

    The paper takes the detector's class loss against the teacher's probabilities and scales it by the teacher's
    objectness (equation 7). For heads of independent sigmoids that is binary cross-entropy. This function subtracts the
    teacher's entropy, which does not change the gradient and makes the loss zero at agreement. It also divides by the
    sum of weights, which keeps the strength independent of image size, batch size and number of objects.

    Args:
        student: (B, A, nc) raw class logits.
        teacher: (B, A, nc) raw class logits.
        objectness: (B, A) weights in [0, 1], zero for points that are left out.

    Returns:
        Scalar, at least 0.

    Raises:
        ValueError: If shapes differ.
    """
    same_shape(student=student, teacher=teacher)
    return weighted_binary_kl(student, teacher, objectness) / (objectness.sum() + EPS)


def objectness_box(
    student: Tensor, teacher: Tensor, objectness: Tensor, student_reg_max: int, teacher_reg_max: int
) -> Tensor:
    """Box distillation in which each point is weighted by the teacher's objectness.

    If both heads predict distance distributions with the same number of bins, it is KL(teacher ‖ student) over the
    bins, averaged over the four sides. Otherwise it decodes both boxes and takes 1 − GIoU, which needs no bins.

    Args:
        student: (B, A, 4 * student_reg_max) raw box outputs.
        teacher: (B, A, 4 * teacher_reg_max) raw box outputs.
        objectness: (B, A) weights in [0, 1].
        student_reg_max: Bins per side of the student, 1 for plain distances.
        teacher_reg_max: Bins per side of the teacher, 1 for plain distances.

    Returns:
        Scalar, at least 0.

    Raises:
        ValueError: If the number of points differs.
    """
    if student_reg_max == teacher_reg_max > 1:
        same_shape(student=student, teacher=teacher)
        return weighted_bins_kl(student, teacher, objectness, student_reg_max) / (objectness.sum() + EPS)
    decoded = (
        expected_distance(student.float(), student_reg_max),
        expected_distance(teacher.float(), teacher_reg_max).detach(),
    )
    same_shape(student_distances=decoded[0], teacher_distances=decoded[1])
    return weighted_mean(1 - distance_giou(*decoded), objectness)


def objectness_weights(
    teacher_scores: Tensor, objectness: Tensor, shapes: Sequence[tuple[int, int]], fm_nms: bool
) -> Tensor:
    """Return the weight of each point, (B, A): the teacher's objectness, or zero for suppressed points.

    Args:
        teacher_scores: (B, A, nc) raw class logits.
        objectness: (B, A) in [0, 1].
        shapes: Height and width of each level.
        fm_nms: Apply the paper's feature-map NMS.
    """
    return objectness * feature_map_nms(teacher_scores, shapes) if fm_nms else objectness


class Objectness(Loss):
    """Objectness-scaled distillation of classes and boxes.

    Mehta & Öztürk, "Object detection at 200 Frames Per Second", 2018, arXiv 1805.06361, sections 3.2 and 3.3.
    Departures:

    - Heads since YOLOv8 have no objectness output, so that the teacher's largest class probability takes its place.
      The paper's third term, on objectness itself, is therefore left out.
    - The terms are divided by the sum of weights.

    Args:
        lam_cls: Strength of the class term (the paper's λ_D), at least 0.
        lam_box: Strength of the box term, at least 0.
        fm_nms: Distil only the strongest of neighbouring predictions of the same class (feature-map NMS).
    """

    name = "objectness"
    columns = ("kcls_loss", "kbox_loss")
    reads = frozenset({"scores", "boxes"})
    teaches_classes = True
    paper = "Mehta & Öztürk 2018, arXiv 1805.06361"

    lam_cls: AtLeastZero = 1.0
    lam_box: AtLeastZero = 1.0
    fm_nms: bool = True

    def forward(self, inputs: LossInputs) -> dict[str, Tensor]:
        """Return the class and the box term."""
        s, t = inputs.student, inputs.teacher
        weights = inputs.once(
            ("objectness", self.fm_nms), lambda: objectness_weights(t.scores, t.objectness, t.shapes, self.fm_nms)
        )
        cls = objectness_class(s.scores, t.scores, weights)
        box = objectness_box(s.boxes, t.boxes, weights, s.reg_max, t.reg_max)
        return {"kcls_loss": CLS_GAIN * self.lam_cls * cls, "kbox_loss": BOX_GAIN * self.lam_box * box}
