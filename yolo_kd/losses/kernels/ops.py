"""Arithmetic that several losses share; all of it in the dtype it is given."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from yolo_kd.structures import Assignment, LossInputs

EPS = 1e-9


def same_shape(**tensors: Tensor) -> None:
    """Check that all tensors have one shape.

    Raises:
        ValueError: Naming each tensor with its shape.
    """
    if len({t.shape for t in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items())
        raise ValueError(f"shapes must agree, received {shapes}")


def binary_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Kullback-Leibler divergence between two Bernoulli distributions given by logits, elementwise, in nats.

    It equals binary cross-entropy against the teacher's probability less the teacher's entropy: the same gradient, and
    zero where both agree. Finite for any finite logits.

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
    """Generalised IoU of two boxes that are given by distances from one and the same point.

    Args:
        a: (..., 4) distances to left, top, right, bottom; negative where the point lies outside on that side.
        b: (..., 4) likewise.

    Returns:
        (...) in [-1, 1].
    """

    def area(d: Tensor) -> Tensor:
        width, height = (d[..., :2] + d[..., 2:]).clamp(min=0).unbind(-1)
        return width * height

    overlap, hull, area_a, area_b = area(torch.minimum(a, b)), area(torch.maximum(a, b)), area(a), area(b)
    union = area_a + area_b - overlap
    return overlap / (union + EPS) - (hull - union) / (hull + EPS)


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Return sum(weights * values) / sum(weights), and zero with gradient zero when all weights are zero."""
    return (values * weights).sum() / (weights.sum() + EPS)


def feature_map_nms(scores: Tensor, shapes: Sequence[tuple[int, int]], kernel: int = 3) -> Tensor:
    """Mark the points that survive feature-map non-maximum suppression (Mehta & Öztürk, section 3.3).

    Each point predicts its most probable class. It survives when no cell around it on the same level predicts the same
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
    for values, labels, (h, w) in zip(best.split(sizes, 1), label.split(sizes, 1), shapes, strict=True):
        values, labels = (F.pad(x.unflatten(1, (h, w)), [reach] * 4, value=-1) for x in (values, labels))
        own, mine = (x[:, reach : reach + h, reach : reach + w] for x in (values, labels))
        survives = torch.ones_like(own, dtype=torch.bool)
        for dy, dx in product(range(kernel), repeat=2):
            value, other = (x[:, dy : dy + h, dx : dx + w] for x in (values, labels))
            survives &= (value <= own) | (other != mine)  # outside the map the class is -1
        kept.append(survives.flatten(1))
    return torch.cat(kept, dim=1)


def attention(strength: Tensor, temperature: float) -> Tensor:
    """Where something is strong: N * softmax(strength / T) over the last dimension of length N; 1 on average.

    Args:
        strength: (..., N).
        temperature: T, above zero; smaller is more peaked.

    Returns:
        (..., N), at least 0.
    """
    return strength.shape[-1] * (strength / temperature).softmax(-1)


def averaging(cells: int, parts: int, like: Tensor) -> Tensor:
    """Return the matrix that averages or repeats a row of cells, as adaptive average pooling does.

    Products with one such matrix for rows and one for columns do what the pooling does, many times faster on a CPU.

    Args:
        cells: Cells along a side.
        parts: Cells that are to be left of them, or made of them.
        like: Gives device and dtype.

    Returns:
        (parts, cells), whose rows add up to 1.
    """
    part, cell = (torch.arange(n, device=like.device) for n in (parts, cells))
    first, end = part * cells // parts, ((part + 1) * cells + parts - 1) // parts
    covered = ((cell >= first[:, None]) & (cell < end[:, None])).to(like.dtype)
    return covered / (end - first)[:, None]


def assigned(step: LossInputs) -> Assignment:
    """Return the native loss's label assignment.

    Raises:
        ValueError: If the step has none.
    """
    if step.targets is None or step.targets.assignment is None:
        raise ValueError("this loss reads the native label assignment, but the step carries none")
    return step.targets.assignment


def gap_cross_entropy(student: Tensor, teacher: Tensor, beta: float = 1.0) -> Tensor:
    """Binary cross-entropy against the teacher's probabilities, scaled by how far the student is from them.

    L_i = Σ_c |σ(t_ic) - σ(s_ic)|^β · BCE(σ(s_ic), σ(t_ic))   (BCKD's class term, and CrossKD's)

    As in both published implementations the scale takes part in the gradient. Zero where both agree.

    Args:
        student: (..., nc) raw class logits, with gradient.
        teacher: (..., nc) raw class logits; detached here.
        beta: Exponent of the scale, at least 1 (below, the gradient has a pole where both agree).

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
    """Generalised IoU of pairs of boxes, in bounds also for boxes of no area and for corners in the wrong order.

    Heads without bins can predict such boxes. As in the published code a box that is negative along one axis has a
    negative area, whose gradient unfolds it while the other box is larger. One that is negative along both would have
    a large positive area there, which a student could grow for reward; here it has none.

    Args:
        a: (..., 4) corners x1, y1, x2, y2 in any one unit.
        b: (..., 4) likewise.
        eps: Smallest union and hull that is divided by.

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
    """Width times height, and zero where both are negative."""
    size = boxes[..., 2:] - boxes[..., :2]
    return _product(size) * (size > 0).any(-1)


def _product(size: Tensor) -> Tensor:
    """Width times height; the gradient of `Tensor.prod` would wait for the device."""
    return size[..., 0] * size[..., 1]


def giou_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return 1 - GIoU of the student's and the teacher's boxes, the teacher's detached.

    Args:
        student: (..., 4) corners x1, y1, x2, y2, with gradient.
        teacher: (..., 4) corners in the same unit.

    Returns:
        (...) in [0, 2].
    """
    return 1 - box_giou(student, teacher.detach())


def corners(boxes: Tensor, reg_max: int) -> Tensor:
    """Decode raw box outputs to corners relative to their point, in units of the stride.

    GIoU does not change when both boxes move or scale together, so two boxes of one point can be compared without the
    point's position.

    Args:
        boxes: (B, A, 4 * reg_max) raw outputs.
        reg_max: Bins per side, 1 for plain distances.

    Returns:
        (B, A, 4) x1, y1, x2, y2.
    """
    near, far = expected_distance(boxes, reg_max).chunk(2, -1)
    return torch.cat((-near, far), -1)


def target_score_sum(step: LossInputs) -> Tensor:
    """Return the sum of the batch's target scores, at least one per image: what both terms are divided by.

    The native loss divides by the same sum with a floor of one per batch; a floor per image keeps the strength when a
    batch without objects grows.
    """
    scores = assigned(step).scores
    return scores.float().sum().clamp(min=float(scores.shape[0]))
