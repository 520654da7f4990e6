"""Binary classification and IoU-based localisation distillation, in the form of a dense detector's loss (ICCV 2023)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from yolo_kd.losses.base import AtLeastZero, Loss
from yolo_kd.losses.kernels.ops import corners, giou_distance, same_shape, target_score_sum
from yolo_kd.losses.kernels.points import gap_cross_entropy_sum
from yolo_kd.structures import LossInputs

# weight 1.0: the gradient into the neck is about a third of the task loss's (table and command in docs/losses.md)
CLS_STRENGTH = 0.1
LOC_STRENGTH = 0.4


def probability_gap(student: Tensor, teacher: Tensor) -> Tensor:
    """Return max_c |σ(t) - σ(s)| without gradient, the weight of a point in the localisation term.

    Args:
        student: (..., nc) raw class logits.
        teacher: (..., nc) raw class logits.

    Returns:
        (...) in [0, 1].
    """
    same_shape(student=student, teacher=teacher)
    return (teacher.detach().sigmoid() - student.detach().sigmoid()).abs().amax(-1)


class BCKD(Loss):
    """Binary classification distillation and IoU-based localisation distillation.

    Yang et al., "Bridging Cross-task Protocol Inconsistency for Distillation in Dense Object Detection", ICCV 2023,
    arXiv 2308.14286, the sections on its two losses. It needs no distance distributions, so that it serves every pair
    of heads, including pairs in which only one has distributions.

    Both terms act on all points. Points on which both models agree, nearly all of the background, weigh nothing.
    Departures:

    - The published code divides by the number of positive anchors. Here the divisor is the sum of the target scores
      that the task loss assigns to its positives, which is also the divisor of Ultralytics' own terms.
    - Levels without a positive are kept, so that the strength does not jump.

    Args:
        lam_cls: Strength of the class term, at least 0; 1 in the paper.
        lam_loc: Strength of the localisation term, at least 0; 4 in the paper.
        beta: Exponent of the probability gap in the class term, at least 1.
    """

    name = "bckd"
    columns = ("kbcls_loss", "kbloc_loss")
    reads = frozenset({"scores", "boxes", "assignment"})
    teaches_classes = True
    paper = "Yang et al. 2023, arXiv 2308.14286"

    lam_cls: AtLeastZero = 1.0
    lam_loc: AtLeastZero = 4.0
    beta: Annotated[float, Field(ge=1)] = 1.0

    def forward(self, inputs: LossInputs) -> dict[str, Tensor]:
        """Return the class and the localisation term."""
        s, t = inputs.student, inputs.teacher
        divisor = inputs.once("target score sum", lambda: target_score_sum(inputs))
        cls = gap_cross_entropy_sum(s.scores, t.scores, self.beta) / divisor
        distance = giou_distance(corners(s.boxes.float(), s.reg_max), corners(t.boxes.float(), t.reg_max))
        loc = (distance * probability_gap(s.scores, t.scores)).sum() / divisor
        return {
            "kbcls_loss": CLS_STRENGTH * self.lam_cls * cls,
            "kbloc_loss": LOC_STRENGTH * self.lam_loc * loc,
        }
