"""The tensors that losses read: outputs of both models, targets, and facts about the pair."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class DetectorOutputs:
    """The outputs of one detector, teacher or student, on one batch.

    B is the batch size, A the number of points (grid cells of all levels, in stride order, row by row).

    Attributes:
        features: The maps that enter the head, (B, C, H, W) for each level in stride order.
        scores: Raw class logits, (B, A, nc). A teacher's scores and boxes are (B, 0, 0) if no term reads them.
        boxes: Raw boxes, (B, A, 4 * reg_max): for each of the sides left, top, right and bottom, the logits of a
            distribution over distances. With `reg_max == 1`, the four distances in units of the stride.
        strides: Stride of each level in pixels.
        reg_max: Bins of the distance distribution, 1 if the head has none.
        one2one_scores: Raw class logits of the second branch of an end-to-end head, (B, A, nc), otherwise None.
        layers: Outputs of other layers that a recipe reads, by name, (B, C, H, W) each.
    """

    features: tuple[Tensor, ...]
    scores: Tensor
    boxes: Tensor
    strides: tuple[int, ...]
    reg_max: int
    one2one_scores: Tensor | None = None
    layers: Mapping[str, Tensor] = field(default_factory=dict)

    @cached_property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """Height and width of each level, in cells."""
        return tuple((f.shape[-2], f.shape[-1]) for f in self.features)

    @cached_property
    def level_sizes(self) -> tuple[int, ...]:
        """Number of points of each level; their sum is A."""
        return tuple(h * w for h, w in self.shapes)

    @cached_property
    def objectness(self) -> Tensor:
        """Largest class probability at each point, (B, A), in [0, 1], float32 and without gradient.

        Heads since YOLOv8 have no objectness output; the package uses this number instead.
        """
        return self.scores.detach().amax(-1).float().sigmoid()

    def part(self, images: slice) -> DetectorOutputs:
        """Return the outputs for some images of the batch."""
        return replace(
            self,
            features=tuple(f[images] for f in self.features),
            scores=self.scores[images],
            boxes=self.boxes[images],
            one2one_scores=None if self.one2one_scores is None else self.one2one_scores[images],
            layers={name: layer[images] for name, layer in self.layers.items()},
        )

    def per_level(self, points: Tensor) -> tuple[Tensor, ...]:
        """Split a (B, A, ...) tensor into one (B, H * W, ...) tensor per level."""
        return points.split(self.level_sizes, dim=1)


@dataclass(frozen=True)
class Assignment:
    """The label assignment of the student's task loss: the objects that points are trained on.

    Attributes:
        foreground: True at points that have an object, (B, A).
        scores: Soft class targets in [0, 1], zero at background points, (B, A, nc).
        boxes: Target boxes in pixels, xyxy, (B, A, 4); undefined at background points.
    """

    foreground: Tensor
    scores: Tensor
    boxes: Tensor


@dataclass(frozen=True)
class Targets:
    """Ground truth of one batch after augmentation.

    Attributes:
        boxes: Boxes of all images in pixels, xyxy, (M, 4). M may be zero.
        labels: Class of each box, (M,), int64.
        image_index: Image of each box, (M,), int64 in [0, batch_size).
        image_size: Height and width of the images in pixels.
        batch_size: Number of images, including those without a box.
        assignment: The task loss's label assignment, None if no term reads it.
    """

    boxes: Tensor
    labels: Tensor
    image_index: Tensor
    image_size: tuple[int, int]
    batch_size: int
    assignment: Assignment | None = None

    @cached_property
    def clipped_boxes(self) -> Tensor:
        """The boxes clipped to their images, (M, 4), float32 and without gradient."""
        height, width = self.image_size
        boxes = self.boxes.detach().float().clamp(min=0)
        return torch.minimum(boxes, boxes.new_tensor([width, height, width, height]))


@dataclass(frozen=True)
class PairSpec:
    """Facts about a teacher and a student; losses build their modules from them.

    Attributes:
        student_channels: Channels of the student's features per level.
        teacher_channels: Channels of the teacher's features per level.
        strides: Strides of the levels of both models, in pixels.
        nc: Number of matched classes; the scores and labels of a step refer to these.
        student_reg_max: Bins of the student's distance distribution, 1 if it has none.
        teacher_reg_max: Bins of the teacher's distance distribution, 1 if it has none.
        student_layer_channels: Channels of other student layers that the recipe reads, by layer name.
        teacher_layer_channels: Channels of other teacher layers that the recipe reads, by layer name.
        student_layer_strides: Strides of those student layers in pixels.
        teacher_layer_strides: Strides of those teacher layers in pixels.
    """

    student_channels: tuple[int, ...]
    teacher_channels: tuple[int, ...]
    strides: tuple[int, ...]
    nc: int
    student_reg_max: int
    teacher_reg_max: int
    student_layer_channels: Mapping[str, int] = field(default_factory=dict)
    teacher_layer_channels: Mapping[str, int] = field(default_factory=dict)
    student_layer_strides: Mapping[str, int] = field(default_factory=dict)
    teacher_layer_strides: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def level_names(self) -> tuple[str, ...]:
        """Names of the levels: p3 for stride 8, p4 for 16, p5 for 32."""
        return tuple(f"p{stride.bit_length() - 1}" for stride in self.strides)

    @property
    def same_bins(self) -> bool:
        """Whether both heads predict distance distributions over the same number of bins."""
        return self.student_reg_max == self.teacher_reg_max > 1


class LossInputs:
    """The inputs of the losses in one training step, with a memo for results that several terms share.

    Args:
        student: The student's outputs, with gradient.
        teacher: The teacher's outputs, without gradient.
        targets: Ground truth, None if no term reads it.
        progress: Fraction of the training that has passed, in [0, 1].
        align: Function of (adapter kind, level index) that returns the student's features with the teacher's number of
            channels. The distiller supplies it; without it, the numbers must be equal.
        precision: Context in which learned layers run: that of the student's layers. Without it, they run in float32.
        continues: True for the second sub-batch of a batch.
    """

    def __init__(
        self,
        student: DetectorOutputs,
        teacher: DetectorOutputs,
        targets: Targets | None = None,
        progress: float = 0.0,
        align: Callable[[str, int], Tensor] | None = None,
        precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
        continues: bool = False,
    ):
        self.student = student
        self.teacher = teacher
        self.targets = targets
        self.progress = progress
        self.continues = continues
        self._align = align
        self._precision = precision
        self._memo: dict[Hashable, Any] = {}

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the result of `make`, computed once per step and key."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]

    def aligned(self, kind: str, level: int, as_is: bool = False) -> Tensor:
        """Return the student's features of one level with the teacher's channels, (B, C_teacher, H, W).

        Args:
            kind: Kind of the adapter, see `yolo_kd.distillation.adapters`.
            level: Index of the level, 0 for the finest.
            as_is: In the adapter's precision, for losses that convert in chunks; otherwise float32.
        """
        align = self._align or (lambda _, level: self.student.features[level])
        feature = self.once(("aligned", kind, level), lambda: align(kind, level))
        return feature if as_is else self.once(("aligned", kind, level, "float32"), feature.float)

    def layer(self, module: Callable[..., Tensor], *inputs: Tensor, as_is: bool = False) -> Tensor:
        """Run a learned layer of a loss in the precision of the student's layers.

        Args:
            module: The layer.
            *inputs: Its arguments.
            as_is: In that precision, for losses that convert in chunks; otherwise float32.
        """
        return self.layers(lambda *maps: (module(*maps),), *inputs, as_is=as_is)[0]

    def layers(self, modules: Callable[..., Sequence[Tensor]], *inputs: Tensor, as_is: bool = False) -> list[Tensor]:
        """Run learned layers with several outputs, see `layer`."""
        with self._precision():
            autocast = torch.is_autocast_enabled(inputs[0].device.type)
            outputs = modules(*(x if autocast else x.float() for x in inputs))
            return [*outputs] if as_is else [output.float() for output in outputs]

    def teacher_feature(self, level: int, as_is: bool = False) -> Tensor:
        """Return the teacher's features of one level, detached, (B, C_teacher, H, W).

        Args:
            level: Index of the level, 0 for the finest.
            as_is: In the teacher's precision, for losses that convert in chunks. Otherwise float32 in the student's
                memory format: arithmetic on two memory formats is several times slower.
        """
        feature = self.teacher.features[level].detach()
        if as_is:
            return feature

        def make() -> Tensor:
            planar = self.student.features[level].is_contiguous()
            layout = torch.contiguous_format if planar else torch.channels_last
            return feature.contiguous(memory_format=layout).float()

        return self.once(("teacher", level), make)


def tensors_of(predictions: Any) -> Iterator[Tensor]:
    """Yield every tensor in nested dictionaries, lists and tuples."""
    if isinstance(predictions, Tensor):
        yield predictions
    elif isinstance(predictions, Mapping | list | tuple):
        for item in predictions.values() if isinstance(predictions, Mapping) else predictions:
            yield from tensors_of(item)
