"""Cross-head distillation: the teacher's head runs on features of the student's head (CrossKD, 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from yolo_kd.errors import PairError
from yolo_kd.losses.base import AboveZero, AtLeastZero, Loss
from yolo_kd.losses.kernels.channel_stats import deviations, rescaling
from yolo_kd.losses.kernels.ops import EPS, corners, giou_distance, same_shape, target_score_sum, weighted_mean
from yolo_kd.losses.kernels.points import gap_cross_entropy_sum, weighted_bins_kl
from yolo_kd.structures import LossInputs, PairSpec

# weight 1.0: the gradient into the neck is about a third of the task loss's (table and command in docs/losses.md)
CLS_STRENGTH = 0.15
BOX_STRENGTH = 0.15

BRANCHES = ("cls", "box")

V = TypeVar("V")


class TeacherTails(tuple[tuple[nn.Module, nn.Module], ...]):
    """The last layers of the teacher's head for each level: (class, box). No module owns them; copies share them."""

    def __deepcopy__(self, memo: dict) -> TeacherTails:
        return self


def align_scale(student: Tensor, teacher: Tensor, eps: float = 1e-6, dtype: torch.dtype | None = None) -> Tensor:
    """Rescale each channel of the student's features to the mean and standard deviation of the teacher's channel.

    (s - mean(s)) / (std(s) + ε) · std(t) + mean(t), per channel over batch and cells, as in the published code. The
    gradient flows through the student's statistics too.

    Args:
        student: (B, C, H, W) features before the activation, with gradient.
        teacher: (B, C, H, W) features before the activation; detached here.
        eps: ε.
        dtype: Precision of the result, that of `student` by default; the arithmetic is in float32 or better.

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: If shapes differ.
    """
    same_shape(student=student, teacher=teacher)
    divisor = max(student[:, 0].numel() - 1, 1)
    mean, deviation = deviations(teacher, divisor)
    dtype = dtype or student.dtype
    student = student.to(torch.promote_types(student.dtype, dtype))
    return rescaling(student, deviation, mean, eps=eps, divisor=divisor)(student).to(dtype)


def crosskd_cls(reused: Tensor, teacher: Tensor, divisor: Tensor | float, beta: float = 1.0) -> Tensor:
    """Class term: Σ_points Σ_c |σ(r) - q|^β · BCE(σ(r), q) / divisor with q = σ(teacher).

    Args:
        reused: (..., nc) logits of the teacher's head on the student's features, with gradient.
        teacher: (..., nc) logits; detached here.
        divisor: In the published code, the number of positives.
        beta: Exponent, at least 1.

    Returns:
        Scalar, at least 0.
    """
    return gap_cross_entropy_sum(reused, teacher, beta) / divisor


def crosskd_box(reused: Tensor, teacher: Tensor, weight: Tensor, reg_max: int, temperature: float = 1.0) -> Tensor:
    """Box term, weighted by the teacher's confidence and divided by the sum of weights.

    If the teacher predicts distributions, it is KL over the bins, averaged over the sides. If the teacher predicts
    distances, it is 1 - GIoU of the decoded boxes, as in the published code for detectors without distributions.

    Args:
        reused: (B, A, 4 * reg_max) box outputs of the teacher's head on the student's features, with gradient.
        teacher: (B, A, 4 * reg_max) box outputs of the teacher; detached here.
        weight: (B, A) in [0, 1].
        reg_max: Bins per side of the teacher, 1 for plain distances.
        temperature: T of both softmaxes, above zero; unused without bins.

    Returns:
        Scalar, at least 0.

    Raises:
        ValueError: If shapes differ.
    """
    same_shape(reused=reused, teacher=teacher)
    same_shape(weight=weight, points=teacher[..., 0])
    if reg_max == 1:
        return weighted_mean(giou_distance(corners(reused.float(), 1), corners(teacher.float(), 1)), weight)
    return weighted_bins_kl(reused, teacher, weight, reg_max, temperature) / (weight.sum() + EPS)


class CrossKD(Loss):
    """Cross-head knowledge distillation.

    Wang et al., "CrossKD: Cross-Head Knowledge Distillation for Object Detection", CVPR 2024, arXiv 2306.11369.
    The loss takes features of the student's head after the second convolution of each branch and before its activation,
    and rescales them to the teacher's statistics. They pass the activation and the rest of the frozen teacher head, and
    the result is compared with the teacher's predictions. The student's predictions are compared only with the labels.

    Departures:

    - If widths differ, a trained 1x1 convolution brings a branch to the teacher's width; in the paper they are equal.
    - The class term is divided by the sum of target scores, at least one per image, instead of the number of positives.
    - The box term is defined where all weights are zero.
    - SiLU replaces ReLU, as in the heads themselves.

    The student's bins do not matter, because both predictions come from the teacher's head.

    In addition to scores, boxes and assignment, the loss needs the following, where i is the index of the level:

    - `pair.student_layer_channels` and `pair.teacher_layer_channels` hold `cls<i>` and `box<i>`.
    - `attach_teacher_head` is called once, after `build`.
    - `inputs.student.layers` and `inputs.teacher.layers` hold `cls<i>` and `box<i>`, each (B, C, H, W).

    Args:
        lam_cls: Strength of the class term, at least 0; 1 in the paper.
        lam_box: Strength of the box term, at least 0; 4 in the paper.
        beta: Exponent of the probability gap in the class term, at least 1.
        temperature: T of the box distributions, above 0.
    """

    name = "crosskd"
    columns = ("xcls_loss", "xbox_loss")
    reads = frozenset({"scores", "boxes", "assignment"})
    teaches_classes = True
    paper = "Wang et al. 2024, arXiv 2306.11369"
    head_split = True
    tails = TeacherTails()

    lam_cls: AtLeastZero = 1.0
    lam_box: AtLeastZero = 4.0
    beta: Annotated[float, Field(ge=1)] = 1.0
    temperature: AboveZero = 1.0

    def build(self, pair: PairSpec) -> None:
        """Make a 1x1 convolution for each branch whose widths differ.

        Raises:
            PairError: If the pair lacks the widths of the heads.
        """
        super().build(pair)
        self.adapters = nn.ModuleDict()
        for name in (f"{branch}{i}" for i in range(len(pair.strides)) for branch in BRANCHES):
            student = _entry(pair.student_layer_channels, name, "the student's layer channels")
            teacher = _entry(pair.teacher_layer_channels, name, "the teacher's layer channels")
            if student != teacher:
                self.adapters[name] = nn.Conv2d(student, teacher, 1)

    def attach_teacher_head(self, tails: Sequence[tuple[nn.Module, nn.Module]]) -> None:
        """Receive the tails of the teacher's head: the activation of the second convolution and everything after it.

        The tails stay the teacher's. They are neither parameters nor state of this loss, `to` does not move them, and
        copies of the loss share them.

        Args:
            tails: For each level the class and the box tail, frozen and in eval mode, on the training device. Their
                outputs, (B, nc, H, W) and (B, 4 * reg_max, H, W), have the columns of the teacher's outputs.

        Raises:
            PairError: If a tail could be trained.
        """
        for i, pair in enumerate(tails):
            for branch, tail in zip(BRANCHES, pair, strict=True):
                if tail.training or any(p.requires_grad for p in tail.parameters()):
                    raise PairError(f"tail '{branch}{i}' of the teacher's head must be frozen and in eval mode")
        self.tails = TeacherTails((cls, box) for cls, box in tails)

    def forward(self, inputs: LossInputs) -> dict[str, Tensor]:
        """Return the class and the box term.

        Raises:
            PairError: If the teacher's head was not attached or a layer is missing.
        """
        t = inputs.teacher
        if len(self.tails) != len(t.features):
            raise PairError(
                f"loss '{self.name}' needs the teacher's head for {len(t.features)} levels, but {len(self.tails)} were "
                "attached"
            )
        divisor = inputs.once("target score sum", lambda: target_score_sum(inputs))
        cls = crosskd_cls(self._reuse(inputs, 0), t.scores, divisor, self.beta)
        box = crosskd_box(self._reuse(inputs, 1), t.boxes, t.objectness, t.reg_max, self.temperature)
        return {
            "xcls_loss": CLS_STRENGTH * self.lam_cls * cls,
            "xbox_loss": BOX_STRENGTH * self.lam_box * box,
        }

    def _reuse(self, inputs: LossInputs, branch: int) -> Tensor:
        """Return the outputs of one branch of the teacher's head for the student's features, (B, A, columns)."""
        outputs = []
        for i, tails in enumerate(self.tails):
            name, tail = f"{BRANCHES[branch]}{i}", tails[branch]
            feature = _entry(inputs.student.layers, name, "the student's layers")
            if name in self.adapters:
                feature = inputs.layer(self.adapters[name], feature, as_is=True)
            teacher = _entry(inputs.teacher.layers, name, "the teacher's layers")
            dtype = next(tail.parameters(), teacher).dtype  # a fast teacher may be in half precision
            outputs.append(tail(align_scale(feature, teacher, dtype=dtype)).flatten(2))
        return torch.cat(outputs, 2).transpose(1, 2)


def _entry(where: Mapping[str, V], name: str, what: str) -> V:
    """Return one entry.

    Raises:
        PairError: If it is missing; the message lists the entries.
    """
    if name not in where:
        raise PairError(f"loss 'crosskd' needs '{name}' among {what}, which hold {sorted(where) or 'nothing'}")
    return where[name]
