"""Objectness-scaled distillation of raw logits, the form of YOLOv2 and YOLOv3 reimplementations."""

from __future__ import annotations

import torch
from torch import Tensor

from yolo_kd.losses.base import AtLeastZero, Loss
from yolo_kd.losses.kernels.ops import expected_distance, same_shape
from yolo_kd.structures import DetectorOutputs, LossInputs

PUBLISHED_LAMBDA = 10.0
# With the published λ the gradient of the raw form is three to eleven times that of the task loss on today's heads,
# whose bins are logits too. Weight 1.0 brings it to about a third (table and command in docs/losses.md).
STRENGTH = 0.05

Outputs = tuple[Tensor, Tensor, Tensor]


def objectness_logit_l2(student: list[Outputs], teacher: list[Outputs], lam: float = PUBLISHED_LAMBDA) -> Tensor:
    """Squared error of raw outputs, scaled by the teacher's objectness, averaged over each map and summed over maps.

    L = λ Σ_maps [mean(σ(o_T)(b_S − b_T)²) + mean(σ(o_T)(o_S − o_T)²) + mean(σ(o_T)(c_S − c_T)²)]

    It equals the widespread implementation for anchor-based heads (golden vectors `objscaled_seed`), except that the
    teacher is detached. Unlike in the paper, the objectness term is scaled by objectness too, so that it never
    suppresses background, and there is no feature-map NMS.

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

    The objectness logit is the largest class logit of the point. Boxes are the raw bins if both heads have the same
    number of them, otherwise distances decoded to units of the stride. This loss is for comparison with published
    results of the anchor-based form; `objectness` follows the paper and is the better choice. One departure: the
    published loss is multiplied by a constant, because raw bins make it far stronger than on the heads it was written
    for.

    Args:
        lam: λ of the published form, at least 0.
    """

    name = "objectness_l2"
    columns = ("kobj2_loss",)
    reads = frozenset({"scores", "boxes"})
    teaches_classes = True
    paper = "Mehta & Öztürk 2018, arXiv 1805.06361, as reimplemented with raw logits"

    lam: AtLeastZero = PUBLISHED_LAMBDA

    def forward(self, inputs: LossInputs) -> dict[str, Tensor]:
        """Return the only term."""
        decode = inputs.student.reg_max != inputs.teacher.reg_max
        student, teacher = (self._maps(outputs, decode) for outputs in (inputs.student, inputs.teacher))
        return {"kobj2_loss": STRENGTH * objectness_logit_l2(student, teacher, self.lam)}

    @staticmethod
    def _maps(outputs: DetectorOutputs, decode: bool) -> list[Outputs]:
        """Return boxes, objectness and class logits of each level, (B, H * W, ...) each."""
        scores, boxes = outputs.scores.float(), outputs.boxes.float()
        if decode:
            boxes = expected_distance(boxes, outputs.reg_max)
        objectness: Tensor = torch.amax(scores, dim=-1, keepdim=True)
        return list(zip(*(outputs.per_level(x) for x in (boxes, objectness, scores)), strict=True))
