"""The base classes of all distillation losses, and the registry that finds losses by name."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from yolo_kd.errors import ConfigError, PairError, did_you_mean, listed
from yolo_kd.structures import LossInputs, PairSpec

READABLE = frozenset({"features", "scores", "boxes", "one2one", "targets", "assignment"})
COLUMN_WIDTH = 10  # Ultralytics' progress bar gives each column 11 characters, one of them a space

# Types of constructor arguments: a recipe is checked, and its schema is written, by what they say.
AtLeastZero = Annotated[float, Field(ge=0)]
AboveZero = Annotated[float, Field(gt=0)]
LevelNames = Annotated[list[str], Field(min_length=1, title="a list of level names", examples=[["p3", "p4", "p5"]])]

_REGISTRY: dict[str, type[Loss]] = {}


class Loss(nn.Module):
    """One published distillation loss.

    A subclass that sets `name` registers itself. The arguments of its constructor, all keyword-only and with defaults,
    are the keys that a recipe may set. `build` makes the modules with learned parameters, once the widths of both
    models are fixed. Adapters that only bring the student's features to the teacher's width are not made there: the
    loss declares one with `adapter` and reads `inputs.aligned(self.adapter, level)`, so that terms share it.

    Class attributes:
        name: Key in recipes.
        columns: Names of the scalars that `forward` returns. Each ends in `_loss`, because Ultralytics plots only such
            columns, and has at most 10 characters, because its progress bar has no room for more.
        reads: What the loss reads of its inputs, a subset of `READABLE`. The teacher's head computes nothing else.
        adapter: Kind of adapter that the loss reads through `inputs.aligned`, None for none.
        paper: Short reference.
        needs_bins: True if both heads must predict distance distributions with the same number of bins.
        instead: Name of a loss for pairs that do not meet `needs_bins`.
        teaches_classes: True if the loss compares class scores, so that the student learns classes from it.
        head_split: True if the loss reads the features inside the head, before the activation of the second
            convolution: `inputs.student.layers` and `inputs.teacher.layers` hold `cls0`, `box0`, `cls1`, ... per level.
    """

    name: ClassVar[str] = ""
    columns: ClassVar[tuple[str, ...]] = ()
    reads: ClassVar[frozenset[str]] = frozenset()
    adapter: ClassVar[str | None] = None
    paper: ClassVar[str] = ""
    needs_bins: ClassVar[bool] = False
    instead: ClassVar[str] = ""
    teaches_classes: ClassVar[bool] = False
    head_split: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not cls.name:
            return  # an abstract helper class
        other = _REGISTRY.get(cls.name)
        if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(f"two losses are named '{cls.name}': {other.__module__} and {cls.__module__}")
        if unknown := cls.reads - READABLE:
            raise TypeError(f"loss '{cls.name}' reads {sorted(unknown)}; allowed are {sorted(READABLE)}")
        for column in cls.columns:
            if not column.endswith("_loss") or len(column) > COLUMN_WIDTH:
                raise TypeError(
                    f"column '{column}' of loss '{cls.name}' must end in '_loss' and have at most {COLUMN_WIDTH} "
                    "characters"
                )
        if not cls.columns:
            raise TypeError(f"loss '{cls.name}' declares no columns")
        _REGISTRY[cls.name] = cls

    def build(self, pair: PairSpec) -> None:
        """Check that the loss can serve this pair and, in subclasses, make learned modules.

        Called once, before training.

        Args:
            pair: Widths, strides, classes and bins of both models.

        Raises:
            PairError: If the loss needs something that one of the models lacks.
        """
        if self.needs_bins and not pair.same_bins:
            instead = f" Use '{self.instead}' instead." if self.instead else ""
            raise PairError(
                f"loss '{self.name}' compares distance distributions, but the student's head has "
                f"{pair.student_reg_max} bins and the teacher's has {pair.teacher_reg_max}; both need the same number, "
                f"more than 1.{instead}"
            )

    def forward(self, inputs: LossInputs) -> dict[str, Tensor]:
        """Return one float32 scalar for each of `columns`, not multiplied by the batch size."""
        raise NotImplementedError

    def self_trained(self) -> list[nn.Parameter]:
        """Return the parameters that the loss trains with its own optimiser; the student's optimiser skips them."""
        return []

    def after_step(self) -> None:
        """Train the parameters of `self_trained`; called after each step of the student's optimiser."""

    def attach_teacher_head(self, tails: Sequence[tuple[nn.Module, nn.Module]]) -> None:
        """Receive the last layers of the frozen teacher's head, for losses with `head_split`; called after `build`.

        Args:
            tails: For each level the class branch and the box branch, from the activation after the recorded
                convolution to the output. They belong to the teacher: keep them out of this module's parameters and
                state.
        """


class FeatureLoss(Loss):
    """A loss that compares maps of the pyramid's levels, with the recipe key `levels`.

    A loss that is a sum over levels implements `level_loss`. Other losses override `forward` and use `levels` and
    `maps`.

    Class attributes:
        strength: Factor of the sum. It makes `weight: 1.0` a sane start: the gradient into the student's neck is about
            a third of the task loss's (table and command in docs/losses.md).

    Args:
        levels: Names of the levels to use, such as [p3, p4]; all by default.
    """

    strength: ClassVar[float] = 1.0

    levels: tuple[int, ...]
    """Indices of the levels in use, in stride order; set by `build`."""

    def __init__(self, *, levels: LevelNames | None = None):
        super().__init__()
        self.level_names = check_levels(levels)

    def build(self, pair: PairSpec) -> None:
        """Find the levels in use.

        Args:
            pair: Widths, strides, classes and bins of both models.

        Raises:
            PairError: If the pair lacks a level that the recipe names.
        """
        super().build(pair)
        for name in self.level_names:
            if name not in pair.level_names:
                raise PairError(
                    f"loss '{self.name}' names level '{name}', but this pair has {listed(pair.level_names)}."
                    f"{did_you_mean(name, pair.level_names)}"
                )
        names = self.level_names or pair.level_names
        self.levels = tuple(i for i, name in enumerate(pair.level_names) if name in names)

    def forward(self, inputs: LossInputs) -> dict[str, Tensor]:
        """Return the only column: the sum of `level_loss` over the levels, times `strength`."""
        return self.total([self.level_loss(inputs, level) for level in self.levels])

    def total(self, terms: list[Tensor]) -> dict[str, Tensor]:
        """Return the only column: the sum of all terms, times `strength`."""
        return {self.columns[0]: self.strength * torch.stack(terms).sum()}

    def level_loss(self, inputs: LossInputs, level: int) -> Tensor:
        """Return the loss of one level, or several terms of it as a vector."""
        raise NotImplementedError

    def maps(self, inputs: LossInputs, level: int, as_is: bool = True) -> tuple[Tensor, Tensor]:
        """Return the maps of one level, (B, C, H, W) each: the student's through the adapter, and the teacher's.

        Args:
            inputs: Outputs of both models.
            level: Index of the level.
            as_is: Leave both in the precision and memory format in which the models computed them. Otherwise the output
                of an adapter and the teacher's map are float32 in the student's memory format.
        """
        features = inputs.student.features
        student = features[level] if self.adapter is None else inputs.aligned(self.adapter, level, as_is)
        return student, inputs.teacher_feature(level, as_is)

    def of_level(self, modules: nn.ModuleList, level: int) -> Any:
        """Return the module of a level, where `modules` has one for each level in use."""
        return modules[self.levels.index(level)]


def check_levels(levels: Sequence[str] | None) -> tuple[str, ...]:
    """Return level names as a tuple, () for None, which stands for all levels.

    Raises:
        ValueError: If `levels` is not a list of names such as p3.
    """
    if levels is None:
        return ()
    if isinstance(levels, str) or not levels or not all(isinstance(v, str) for v in levels):
        raise ValueError(f"levels must be a list of names such as [p3, p4, p5], received {levels!r}")
    return tuple(levels)


def check_range(name: str, value: float, low: float, high: float = float("inf"), *, above: bool = False) -> float:
    """Return `value` if it lies in [low, high], or in (low, high] with `above`.

    Raises:
        ValueError: If it does not; the message names the argument, the number received and the allowed range.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and value != float("inf")
    if not number or not (low < value if above else low <= value) or not value <= high:
        left = f"more than {low:g}" if above else f"at least {low:g}"
        right = "" if high == float("inf") else f" and at most {high:g}"
        raise ValueError(f"{name} must be a number of {left}{right}, received {value!r}")
    return value


def check_choice(name: str, value: str, choices: Sequence[str]) -> str:
    """Return `value` if it is one of `choices`.

    Raises:
        ValueError: If it is not; the message names the argument, the choices and the closest one.
    """
    if value not in choices:
        raise ValueError(f"{name} must be {listed(choices)}, received {value!r}.{did_you_mean(value, choices)}")
    return value


def registered() -> dict[str, type[Loss]]:
    """Return every registered loss by name, sorted."""
    return dict(sorted(_REGISTRY.items()))


def find(name: str) -> type[Loss]:
    """Return the loss of that name.

    Raises:
        ConfigError: If there is none; the message suggests the closest name.
    """
    if name not in _REGISTRY:
        raise ConfigError(
            f"unknown loss '{name}'.{did_you_mean(name, _REGISTRY)} Known losses: {listed(sorted(_REGISTRY))}."
        )
    return _REGISTRY[name]


def parameters(loss: type[Loss]) -> dict[str, inspect.Parameter]:
    """Return the recipe keys of a loss: the parameters of its constructor."""
    return {k: p for k, p in inspect.signature(loss.__init__).parameters.items() if k != "self"}
