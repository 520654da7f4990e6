"""Records of tensors that travel between the taps and the losses. No arithmetic of any method lives here."""

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
    """What one detector shows on one batch, the same for teacher and student.

    B is the batch size, A the number of points (grid cells of all levels, in stride order, row by row).

    Attributes:
        features: Inputs of the head, one (B, C, H, W) map per level in stride order.
        scores: Raw class logits, (B, A, nc). A teacher's are (B, 0, 0) where no term reads them, and so are its boxes.
        boxes: Raw box outputs, (B, A, 4 * reg_max): logits of a distribution over distances for each of the sides
            left, top, right, bottom, or with `reg_max == 1` the four distances themselves, in units of the stride.
        strides: Pixels per cell of each level.
        reg_max: Bins of the distance distribution, 1 where the head has none.
        one2one_scores: Raw class logits of the second branch of an end-to-end head, (B, A, nc), otherwise None.
        layers: Outputs of other layers that a recipe names, by layer name, each (B, C, H, W).
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
        """Points of each level; they sum to A."""
        return tuple(h * w for h, w in self.shapes)

    @cached_property
    def objectness(self) -> Tensor:
        """Largest class probability at each point, (B, A), in [0, 1], float32 and without gradient.

        Heads since YOLOv8 have no objectness output; this is what takes its place throughout the package.
        """
        return self.scores.detach().amax(-1).float().sigmoid()

    def part(self, images: slice) -> DetectorOutputs:
        """Return what the view shows of some of the images of the batch."""
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
    """Which points the student's own loss made responsible for which object (its task-aligned assigner's answer).

    Attributes:
        foreground: True at points that are trained towards an object, (B, A).
        scores: Soft class targets in [0, 1], zero at background points, (B, A, nc).
        boxes: Target boxes in pixels, xyxy, meaningful at foreground points only, (B, A, 4).
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
        assignment: The native loss's label assignment, None before it has run.
    """

    boxes: Tensor
    labels: Tensor
    image_index: Tensor
    image_size: tuple[int, int]
    batch_size: int
    assignment: Assignment | None = None

    @cached_property
    def clipped_boxes(self) -> Tensor:
        """The boxes cut off at the borders of their images, (M, 4), float32 and without gradient."""
        height, width = self.image_size
        boxes = self.boxes.detach().float().clamp(min=0)
        return torch.minimum(boxes, boxes.new_tensor([width, height, width, height]))


@dataclass(frozen=True)
class PairSpec:
    """Facts about a teacher and a student that hold for the whole run; losses build their modules from them.

    Attributes:
        student_channels: Channels of the student's features per level.
        teacher_channels: Channels of the teacher's features per level.
        strides: Strides of the levels that both have, in pixels.
        nc: Number of classes that both have; scores and labels of a step count these.
        student_reg_max: Bins of the student's distance distribution, 1 for none.
        teacher_reg_max: Bins of the teacher's distance distribution, 1 for none.
        student_layer_channels: Channels of other student layers that the recipe names, by layer name.
        teacher_layer_channels: Channels of other teacher layers that the recipe names, by layer name.
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
        """True when both heads predict distance distributions over the same number of bins."""
        return self.student_reg_max == self.teacher_reg_max > 1


class LossInputs:
    """One training step as the losses see it, with a memo so that what two terms need is computed once.

    Args:
        student: The student's view, with gradient.
        teacher: The teacher's view, without.
        targets: Ground truth, None when no term reads it.
        progress: Fraction of the training that has passed, in [0, 1].
        align: Function of (adapter kind, level index) that returns the student's features brought to the teacher's
            channels. The distiller supplies it; without one, features must agree already.
        precision: Context in which learned layers run, as the student's do; float32 without one.
        continues: True for the second part of a batch that the losses see in parts.
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
        """Return what `make` returned the first time that any term asked for `key` in this step."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]

    def aligned(self, kind: str, level: int, as_is: bool = False) -> Tensor:
        """Return the student's features of one level at the teacher's width, (B, C_teacher, H, W).

        Args:
            kind: Name of the adapter, see `yolo_kd.distillation.adapters`.
            level: Index of the level, 0 for the finest.
            as_is: In the precision in which the adapter ran, for losses that convert part by part; float32 otherwise.
        """

        def make() -> Tensor:
            return self.student.features[level] if self._align is None else self._align(kind, level)

        feature = self.once(("aligned", kind, level), make)
        return feature if as_is else self.once(("aligned", kind, level, "float32"), feature.float)

    def layer(self, module: Callable[..., Tensor], *inputs: Tensor, as_is: bool = False) -> Tensor:
        """Run a learned layer of a loss in the precision in which the student's layers run.

        Args:
            module: The layer.
            *inputs: Its arguments.
            as_is: Return what comes out in that precision, for losses that convert part by part; float32 otherwise.
        """
        return self.layers(lambda *maps: (module(*maps),), *inputs, as_is=as_is)[0]

    def layers(self, modules: Callable[..., Sequence[Tensor]], *inputs: Tensor, as_is: bool = False) -> list[Tensor]:
        """Do the same with layers that have several outputs."""
        with self._precision():
            autocast = torch.is_autocast_enabled(inputs[0].device.type)
            outputs = modules(*(x if autocast else x.float() for x in inputs))
            return [*outputs] if as_is else [output.float() for output in outputs]

    def teacher_feature(self, level: int, as_is: bool = False) -> Tensor:
        """Return the teacher's features of one level, detached, (B, C_teacher, H, W).

        Args:
            level: Index of the level, 0 for the finest.
            as_is: As the teacher left them, for losses that convert part by part. Otherwise float32, laid out like the
                student's: arithmetic on two memory formats at once is several times slower.
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
    elif isinstance(predictions, Mapping):
        for value in predictions.values():
            yield from tensors_of(value)
    elif isinstance(predictions, list | tuple):
        for value in predictions:
            yield from tensors_of(value)
