"""The raw-logit form of objectness-scaled distillation that YOLOv2/v3 reimplementations use."""

from __future__ import annotations

import torch
from torch import Tensor

from yolo_kd.losses.base import AtLeastZero, Loss, check_range
from yolo_kd.losses.kernels.ops import expected_distance, same_shape
from yolo_kd.structures import DetectorOutputs, LossInputs

PUBLISHED_LAMBDA = 10.0
# With the published λ the raw form pulls three to eleven times as hard as the task loss on heads of today, whose bins
# are logits too; weight 1.0 brings it to about a third (table and command in docs/losses.md).
STRENGTH = 0.05

Outputs = tuple[Tensor, Tensor, Tensor]


def objectness_logit_l2(student: list[Outputs], teacher: list[Outputs], lam: float = PUBLISHED_LAMBDA) -> Tensor:
    """Squared error of raw outputs, scaled by the teacher's objectness, mean over each map, summed over maps.

    L = λ Σ_maps [mean(σ(o_T)(b_S − b_T)²) + mean(σ(o_T)(o_S − o_T)²) + mean(σ(o_T)(c_S − c_T)²)]

    Equal to the widespread implementation for anchor-based heads (golden vectors `objscaled_seed`), except that the
    teacher is detached. Unlike the paper, the objectness term is scaled by objectness too, so background is never
    suppressed by it; and there is no feature-map NMS.

    Args:
        student: For each map the raw boxes (..., k), raw objectness (..., 1) and raw class logits (..., nc).
        teacher: The same shapes.
        lam: λ, at least 0.

    Returns:
        Scalar, at least 0.

    Raises:
        ValueError: If shapes differ.
    """
    total = student[0][0].new_zeros(())
    for s_map, t_map in zip(student, teacher, strict=True):
        scale = t_map[1].detach().sigmoid()
        for s, t in zip(s_map, t_map, strict=True):
            same_shape(student=s, teacher=t)
            total = total + (scale * (s - t.detach()).square()).mean()
    return lam * total


class ObjectnessL2(Loss):
    """Raw-logit objectness-scaled distillation, adapted to heads without an objectness output.

    The objectness logit is the largest class logit of the point. Boxes are the raw bins where both heads have equally
    many, otherwise distances decoded to units of the stride. It is here for comparison with published results of the
    anchor-based form; `objectness` follows the paper and is the better start. The class multiplies the published value
    by a constant of ours, since raw bins make it far stronger here than on the heads it was written for.

    Args:
        lam: λ of the published form, at least 0.
    """

    name = "objectness_l2"
    columns = ("kobj2_loss",)
    reads = frozenset({"scores", "boxes"})
    teaches_classes = True
    paper = "Mehta & Öztürk 2018, arXiv 1805.06361, as reimplemented with raw logits"

    def __init__(self, *, lam: AtLeastZero = PUBLISHED_LAMBDA):
        super().__init__()
        self.lam = check_range("lam", lam, 0)

    def forward(self, step: LossInputs) -> dict[str, Tensor]:
        """Return the one term."""
        same_bins = step.student.reg_max == step.teacher.reg_max
        student, teacher = (self._maps(view, decode=not same_bins) for view in (step.student, step.teacher))
        return {"kobj2_loss": STRENGTH * objectness_logit_l2(student, teacher, self.lam)}

    @staticmethod
    def _maps(view: DetectorOutputs, decode: bool) -> list[Outputs]:
        """Return boxes, objectness and class logits of each level, (B, H * W, ...) each."""
        scores, boxes = view.scores.float(), view.boxes.float()
        if decode:
            boxes = expected_distance(boxes, view.reg_max)
        objectness: Tensor = torch.amax(scores, dim=-1, keepdim=True)
        return list(zip(*(view.per_level(x) for x in (boxes, objectness, scores)), strict=True))
