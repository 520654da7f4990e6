"""The task loss of Ultralytics: its targets and raw predictions, and how to leave scores out or weight objects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from ultralytics.utils.ops import xywh2xyxy

from yolo_kd.patches import replaced
from yolo_kd.structures import Assignment, Targets

ABSENT = -1e4  # a logit whose loss as background and whose sigmoid are exactly zero, also in half precision


def targets_of(batch: Mapping[str, Any], assignment: Assignment | None = None) -> Targets:
    """Convert the labels of a batch of Ultralytics' loader: normalised xywh boxes become xyxy in pixels."""
    size = batch["img"].shape[-2:]
    boxes = batch["bboxes"].view(-1, 4).float()
    scale = boxes.new_tensor([size[1], size[0], size[1], size[0]])
    return Targets(
        boxes=xywh2xyxy(boxes) * scale,
        labels=batch["cls"].view(-1).long(),
        image_index=batch["batch_idx"].view(-1).long(),
        image_size=(int(size[0]), int(size[1])),
        batch_size=int(batch["img"].shape[0]),
        assignment=assignment,
    )


def part_of(predictions: Any, images: slice) -> Any:
    """Return the raw training outputs of some images of a batch, as slices without copies."""
    if isinstance(predictions, Mapping):
        return {name: part_of(value, images) for name, value in predictions.items()}
    if isinstance(predictions, list | tuple):
        return [part_of(value, images) for value in predictions]
    return predictions[images] if isinstance(predictions, Tensor) else predictions


def cut(predictions: Any, images: int) -> tuple[Any, Any]:
    """Return the raw training outputs of the first images of a batch, and those of the other images.

    The backward pass through both halves is one operation. With slices, each would fill a whole batch with zeros.
    """
    if isinstance(predictions, Mapping):
        pairs = {name: cut(value, images) for name, value in predictions.items()}
        return {k: first for k, (first, _) in pairs.items()}, {k: second for k, (_, second) in pairs.items()}
    if isinstance(predictions, list | tuple):
        both = [cut(value, images) for value in predictions]
        return [first for first, _ in both], [second for _, second in both]
    if isinstance(predictions, Tensor):
        return predictions.split([images, len(predictions) - images])
    return predictions, predictions


def branches_of(task_loss: Any) -> list[Any]:
    """Return the losses inside a task loss that assign labels: one, or two for an end-to-end head."""
    return [task_loss.one2many, task_loss.one2one] if hasattr(task_loss, "one2many") else [task_loss]


def loss_names_of(task_loss: Any) -> tuple[str, ...]:
    """Return the names of the items that a task loss logs."""
    return tuple(branches_of(task_loss)[-1].loss_names)


def without_classes(predictions: Any, mask: Tensor) -> Any:
    """Leave scores of some classes at some points out of the task loss.

    Their logits are replaced by `ABSENT`. As a negative such a logit costs log(1 + e^-10000) = 0 and gets no gradient,
    and its alignment with any object, p^alpha * IoU^beta, is 0.

    Args:
        predictions: The head's return value: raw outputs, a dictionary of those of each branch, or in eval mode a tuple
            that holds one of these.
        mask: True where a score is left out, (B, nc, A).

    Returns:
        The predictions in the same structure.
    """
    if isinstance(predictions, tuple):
        return (*predictions[:1], without_classes(predictions[1], mask), *predictions[2:])
    if "scores" in predictions:
        return {**predictions, "scores": predictions["scores"].masked_fill(mask, ABSENT)}
    return {name: without_classes(branch, mask) for name, branch in predictions.items()}


@contextmanager
def weighted_by(task_loss: Any, confidence: Tensor) -> Iterator[None]:
    """Weight the objects of a task loss by the confidence of their labels, for the duration.

    The assigner gives point a the target score t_a for the object that it assigns to a. With the confidence c_a of that
    object, the score becomes c_a * t_a, both as the target of the class loss and as the weight of the box losses. The
    task loss divides by N' = max(1, sum of c_a * t_a). The result is multiplied by N' / N with N = max(1, sum of t_a),
    so that the weights do not cancel where all confidences are equally low. Each branch of an end-to-end head has its
    own N.

    Args:
        task_loss: The task loss.
        confidence: Confidence of each object, (B, N), in the order of the labels of an image.
    """
    with ExitStack() as stack:
        for branch in branches_of(task_loss):
            stack.enter_context(_weighted(branch, confidence))
        yield


@contextmanager
def _weighted(branch: Any, confidence: Tensor) -> Iterator[None]:
    ratio = confidence.new_ones(())
    unweighted = branch.loss

    def weigh(_module: nn.Module, _inputs: Any, output: Sequence[Tensor]) -> Sequence[Tensor]:
        nonlocal ratio
        if not confidence.shape[1]:
            return output
        labels, boxes, scores, foreground, index = output
        sure = confidence.gather(1, index.long().clamp(max=confidence.shape[1] - 1))
        weighted = scores * sure[..., None].to(scores.dtype)
        ratio = weighted.sum().clamp(min=1) / scores.sum().clamp(min=1)
        return labels, boxes, weighted, foreground, index

    def loss(predictions: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        vector, items = unweighted(predictions, batch)
        return vector * ratio, {name: value * ratio for name, value in items.items()}

    handle = branch.assigner.register_forward_hook(weigh)
    try:
        with replaced(branch, "loss", loss):
            yield
    finally:
        handle.remove()
