"""Arithmetic that several losses share. Every function computes in the dtype of its arguments."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from yolo_kd.structures import Assignment, LossInputs

EPS = 1e-9


def same_shape(**tensors: Tensor) -> None:
    """Check that all tensors have the same shape.

    Raises:
        ValueError: If they do not; the message names each tensor with its shape.
    """
    if len({t.shape for t in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items())
        raise ValueError(f"shapes must agree, received {shapes}")


def binary_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Kullback-Leibler divergence of Bernoulli distributions given by logits, elementwise, in nats.

    It equals the binary cross-entropy against the teacher's probability less the teacher's entropy. It has the same
    gradient as the cross-entropy, is zero where both agree, and is finite for any finite logits.

    Args:
        student_logits: Any shape, with gradient.
        teacher_logits: The same shape; detached here.
    """
    same_shape(student_logits=student_logits, teacher_logits=teacher_logits)
    teacher_logits = teacher_logits.detach()
    p = teacher_logits.sigmoid()
    # p * log(p / q) + (1 - p) * log((1 - p) / (1 - q)) with log(sigmoid(x)) = -softplus(-x)
    return (p * (teacher_logits - student_logits) + F.softplus(student_logits) - F.softplus(teacher_logits)).clamp(
        min=0
    )


def categorical_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, dim: int = -1) -> Tensor:
    """Return T^2 * KL(softmax(teacher / T) || softmax(student / T)), summed over `dim`.

    Args:
        student_logits: Any shape, with gradient.
        teacher_logits: The same shape; detached here.
        temperature: T, above zero.
        dim: The dimension of the distribution.
    """
    same_shape(student_logits=student_logits, teacher_logits=teacher_logits)
    log_q = F.log_softmax(student_logits / temperature, dim=dim)
    log_p = F.log_softmax(teacher_logits.detach() / temperature, dim=dim)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(dim)


def expected_distance(boxes: Tensor, reg_max: int) -> Tensor:
    """Decode raw box outputs to distances from the point to left, top, right and bottom.

    Args:
        boxes: (B, A, 4 * reg_max) raw outputs.
        reg_max: Bins per side; 1 means that the outputs are the distances already.

    Returns:
        (B, A, 4) distances in units of the stride.
    """
    if reg_max == 1:
        return boxes
    b, a, _ = boxes.shape
    bins = torch.arange(reg_max, device=boxes.device, dtype=boxes.dtype)
    return boxes.view(b, a, 4, reg_max).softmax(-1) @ bins


def distance_giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU of two boxes given by distances from the same point.

    Args:
        a: (..., 4) distances to left, top, right, bottom; negative where the point lies outside on that side.
        b: (..., 4), like `a`.

    Returns:
        (...) in [-1, 1].
    """

    def area(d: Tensor) -> Tensor:
        width, height = (d[..., :2] + d[..., 2:]).clamp(min=0).unbind(-1)
        return width * height

    overlap, hull, area_a, area_b = area(torch.minimum(a, b)), area(torch.maximum(a, b)), area(a), area(b)
    union = area_a + area_b - overlap
    return overlap / (union + EPS) - (hull - union) / (hull + EPS)


def weighted_mean(terms: Tensor, weights: Tensor) -> Tensor:
    """Return sum(weights * terms) / sum(weights), and zero with gradient zero if all weights are zero."""
    return (terms * weights).sum() / (weights.sum() + EPS)


def feature_map_nms(scores: Tensor, shapes: Sequence[tuple[int, int]], kernel: int = 3) -> Tensor:
    """Mark the points that survive feature-map non-maximum suppression (Mehta & Öztürk, section 3.3).

    Each point predicts its most probable class. It survives if no neighbouring cell of its level predicts the same
    class with a higher probability.

    Args:
        scores: (B, A, nc) class probabilities or logits; only their order matters.
        shapes: Height and width of each level.
        kernel: Side of the neighbourhood in cells, odd.

    Returns:
        (B, A) bool.
    """
    kept = []
    reach = kernel // 2
    best, label = scores.detach().max(-1)  # (B, A)
    sizes = [h * w for h, w in shapes]
    for scores_of, labels, (h, w) in zip(best.split(sizes, 1), label.split(sizes, 1), shapes, strict=True):
        padded = [F.pad(x.unflatten(1, (h, w)), [reach] * 4, value=-1) for x in (scores_of, labels)]
        score, chosen = (x[:, reach : reach + h, reach : reach + w] for x in padded)
        survives = torch.ones_like(score, dtype=torch.bool)
        for dy, dx in product(range(kernel), repeat=2):
            neighbour, other = (x[:, dy : dy + h, dx : dx + w] for x in padded)
            survives &= (neighbour <= score) | (other != chosen)  # outside the map the class is -1
        kept.append(survives.flatten(1))
    return torch.cat(kept, dim=1)


def attention(strength: Tensor, temperature: float) -> Tensor:
    """Attention weights N * softmax(strength / T) over the last dimension of length N; their mean is 1.

    Args:
        strength: (..., N).
        temperature: T, above zero; a smaller one is more peaked.

    Returns:
        (..., N), at least 0.
    """
    return strength.shape[-1] * (strength / temperature).softmax(-1)


def averaging(cells: int, bins: int, like: Tensor) -> Tensor:
    """Return the matrix that resizes a row of cells as adaptive average pooling does: it averages or repeats cells.

    A product with one such matrix for rows and one for columns equals the pooling and is many times faster on a CPU.

    Args:
        cells: Cells along a side of the map.
        bins: Cells along a side of the result.
        like: Tensor with the device and dtype of the result.

    Returns:
        (bins, cells); each row adds up to 1.
    """
    index, cell = (torch.arange(n, device=like.device) for n in (bins, cells))
    first, end = index * cells // bins, ((index + 1) * cells + bins - 1) // bins
    covered = ((cell >= first[:, None]) & (cell < end[:, None])).to(like.dtype)
    return covered / (end - first)[:, None]


def assigned(inputs: LossInputs) -> Assignment:
    """Return the task loss's label assignment.

    Raises:
        ValueError: If the inputs have none.
    """
    if inputs.targets is None or inputs.targets.assignment is None:
        raise ValueError("this loss reads the task loss's label assignment, but its inputs have none")
    return inputs.targets.assignment


def box_distributions(inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """Return the student's and the teacher's logits of the distance distributions, (B, A, 4, reg_max) float32 each.

    Raises:
        ValueError: If shapes differ.
    """
    s, t = inputs.student, inputs.teacher
    same_shape(student_boxes=s.boxes, teacher_boxes=t.boxes)
    student, teacher = (outputs.boxes.float().unflatten(-1, (4, s.reg_max)) for outputs in (s, t))
    return student, teacher


def gap_cross_entropy(student: Tensor, teacher: Tensor, beta: float = 1.0) -> Tensor:
    """Binary cross-entropy against the teacher's probabilities, scaled by the gap between student and teacher.

    L_i = Σ_c |σ(t_ic) - σ(s_ic)|^β · BCE(σ(s_ic), σ(t_ic))   (the class term of BCKD and of CrossKD)

    As in both published implementations, the scale has a gradient too. It is zero where both agree.

    Args:
        student: (..., nc) raw class logits, with gradient.
        teacher: (..., nc) raw class logits; detached here.
        beta: Exponent of the scale, at least 1. Below 1 the gradient is infinite where both agree.

    Returns:
        (...), at least 0.

    Raises:
        ValueError: If shapes differ.
    """
    same_shape(student=student, teacher=teacher)
    target = teacher.detach().sigmoid()
    entropy = F.binary_cross_entropy_with_logits(student, target, reduction="none")
    return (entropy * (target - student.sigmoid()).abs().pow(beta)).sum(-1)


def box_giou(a: Tensor, b: Tensor, eps: float = 1e-7) -> Tensor:
    """Generalised IoU of pairs of boxes, within bounds also for boxes without area and for swapped corners.

    Heads without bins can predict such boxes. As in the published code, a box that is negative along one axis has a
    negative area, and while the other box is larger the gradient turns it the right way round. In that code a box that
    is negative along both axes has a large positive area, which a student could grow to lower its loss; here its area
    is zero.

    Args:
        a: (..., 4) corners x1, y1, x2, y2 in any unit.
        b: (..., 4) in the same unit.
        eps: Lower bound of the union and the hull, which are divisors.

    Returns:
        (...) in [-1, 1].

    Raises:
        ValueError: If shapes differ.
    """
    same_shape(a=a, b=b)
    area_a, area_b = _area(a), _area(b)
    near, far = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    overlap = _product((far - near).clamp(min=0))
    union = (area_a + area_b - overlap).clamp(min=eps)
    corner, opposite = torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])
    hull = _product((opposite - corner).clamp(min=0)).clamp(min=eps)
    return overlap / union - (hull - union) / hull


def _area(boxes: Tensor) -> Tensor:
    """Return width times height, and zero where both are negative."""
    size = boxes[..., 2:] - boxes[..., :2]
    return _product(size) * (size > 0).any(-1)


def _product(size: Tensor) -> Tensor:
    """Return width times height. `Tensor.prod` would make its gradient wait for the device."""
    return size[..., 0] * size[..., 1]


def giou_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return 1 - GIoU of the student's and the teacher's boxes; the teacher's are detached.

    Args:
        student: (..., 4) corners x1, y1, x2, y2, with gradient.
        teacher: (..., 4) corners in the same unit.

    Returns:
        (...) in [0, 2].
    """
    return 1 - box_giou(student, teacher.detach())


def corners(boxes: Tensor, reg_max: int) -> Tensor:
    """Decode raw box outputs to corners relative to their point, in units of the stride.

    GIoU does not change when both boxes move or scale together, so that two boxes of one point can be compared without
    its coordinates.

    Args:
        boxes: (B, A, 4 * reg_max) raw outputs.
        reg_max: Bins per side, 1 for plain distances.

    Returns:
        (B, A, 4) x1, y1, x2, y2.
    """
    near, far = expected_distance(boxes, reg_max).chunk(2, -1)
    return torch.cat((-near, far), -1)


def target_score_sum(inputs: LossInputs) -> Tensor:
    """Return the sum of the batch's target scores, at least one per image: the divisor of BCKD's and CrossKD's terms.

    The task loss divides by the same sum with a lower bound of one per batch. A bound per image keeps the strength
    when a batch without objects grows.
    """
    scores = assigned(inputs).scores
    return scores.float().sum().clamp(min=float(scores.shape[0]))
