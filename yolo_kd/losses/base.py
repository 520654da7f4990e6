"""The base class of every distillation loss, and the registry that finds them by name."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from yolo_kd.errors import ConfigError, PairError, did_you_mean, listed
from yolo_kd.structures import LossInputs, PairSpec

READABLE = frozenset({"features", "scores", "boxes", "one2one", "targets", "assignment"})
COLUMN_WIDTH = 10  # the progress bar of Ultralytics gives each column 11 characters, one of them a space

# Types of constructor arguments: a recipe is checked, and its schema is written, by what they say.
AtLeastZero = Annotated[float, Field(ge=0)]
AboveZero = Annotated[float, Field(gt=0)]
LevelNames = Annotated[list[str], Field(min_length=1, title="a list of level names", examples=[["p3", "p4", "p5"]])]

_REGISTRY: dict[str, type[Loss]] = {}


class Loss(nn.Module):
    """One published distillation loss.

    A subclass that sets `name` registers itself. The arguments of its constructor, all keyword-only and with
    defaults, are the keys that a recipe may set. Modules with learned parameters are made in `build`, once the widths
    of both models are known; adapters that only bring the student's features to the teacher's width are not made here
    but declared with `adapter` and read with `step.aligned(self.adapter, level)`, so that terms share them.

    Class attributes:
        name: Key in recipes.
        columns: Names of the scalars that `forward` returns, each ending in `_loss` (Ultralytics plots only those) and
            at most 10 characters wide (its progress bar has no room for more).
        reads: What the loss needs of a step, a subset of `READABLE`. Of the teacher's head nothing else is computed.
        adapter: Kind of adapter that it reads through `step.aligned`, None for none.
        paper: Short reference.
        needs_bins: True when both heads must predict distance distributions with equal bins.
        instead: Name of the loss that serves where `needs_bins` cannot be met.
        teaches_classes: True when it compares class scores, so that the student learns classes from it.
        head_split: True when the loss reads the features inside the head, before the activation of the second
            convolution: `step.student.layers` and `step.teacher.layers` hold `cls0`, `box0`, `cls1`, ... per level.
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

    level_names: tuple[str, ...] = ()  # () stands for every level

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
        """Check that this pair can be served, resolve the level names and, in subclasses, make learned modules.

        Called once, before training.

        Args:
            pair: Widths, strides, classes and bins of both models.

        Raises:
            PairError: If the loss needs something that one of the models does not have.
        """
        self.check_bins(pair)
        self.levels = self.level_indices(pair)

    def forward(self, step: LossInputs) -> dict[str, Tensor]:
        """Return one float32 scalar for each of `columns`, not multiplied by the batch size."""
        raise NotImplementedError

    def self_trained(self) -> list[nn.Parameter]:
        """Return the parameters that the loss trains with an optimiser of its own; the student's leaves them alone."""
        return []

    def after_step(self) -> None:
        """Train what `self_trained` names; called after each step of the student's optimiser."""

    def attach_teacher_head(self, tails: Sequence[tuple[nn.Module, nn.Module]]) -> None:
        """Receive the end of the frozen teacher's head, for losses with `head_split`; called after `build`.

        Args:
            tails: Per level the class branch and the box branch, from the tapped convolution's activation on. They
                belong to the teacher: keep them out of this module's parameters and state.
        """

    def check_bins(self, pair: PairSpec) -> None:
        """Raise `PairError` if the loss needs distance distributions that the pair does not share."""
        if self.needs_bins and not pair.same_bins:
            instead = f" Use '{self.instead}' instead." if self.instead else ""
            raise PairError(
                f"loss '{self.name}' compares distance distributions, but the student's head has "
                f"{pair.student_reg_max} bins and the teacher's has {pair.teacher_reg_max}; both need the same number, "
                f"more than 1.{instead}"
            )

    def level_indices(self, pair: PairSpec) -> tuple[int, ...]:
        """Return the indices of the levels this loss acts on, in stride order.

        Raises:
            PairError: If a level was named that the pair does not have.
        """
        if not self.level_names:
            return tuple(range(len(pair.strides)))
        for name in self.level_names:
            if name not in pair.level_names:
                raise PairError(
                    f"loss '{self.name}' names level '{name}', but this pair has {listed(pair.level_names)}."
                    f"{did_you_mean(name, pair.level_names)}"
                )
        return tuple(i for i, name in enumerate(pair.level_names) if name in self.level_names)


def check_levels(levels: Sequence[str] | None) -> tuple[str, ...]:
    """Return level names as a tuple, () for None, which stands for all of them.

    Raises:
        ValueError: If it is not a list of names like p3.
    """
    if levels is None:
        return ()
    if isinstance(levels, str) or not levels or not all(isinstance(v, str) for v in levels):
        raise ValueError(f"levels must be a list of names such as [p3, p4, p5], received {levels!r}")
    return tuple(levels)


def check_range(name: str, value: float, low: float, high: float = float("inf"), *, above: bool = False) -> float:
    """Return `value` if it lies in [low, high], or in (low, high] with `above`.

    Raises:
        ValueError: Naming the argument, what was received and what is allowed.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and value != float("inf")
    if not number or not (low < value if above else low <= value) or not value <= high:
        left = f"more than {low:g}" if above else f"at least {low:g}"
        right = "" if high == float("inf") else f" and at most {high:g}"
        raise ValueError(f"{name} must be a number of {left}{right}, received {value!r}")
    return value


def registered() -> dict[str, type[Loss]]:
    """Return every registered loss by name, sorted."""
    return dict(sorted(_REGISTRY.items()))


def find(name: str) -> type[Loss]:
    """Return the loss of that name.

    Raises:
        ConfigError: If there is none, with the closest match.
    """
    if name not in _REGISTRY:
        known = listed(sorted(_REGISTRY))
        raise ConfigError(f"unknown loss '{name}'.{did_you_mean(name, _REGISTRY)} Known losses: {known}.")
    return _REGISTRY[name]


def parameters(loss: type[Loss]) -> dict[str, inspect.Parameter]:
    """Return the recipe keys of a loss: the parameters of its constructor."""
    return {k: p for k, p in inspect.signature(loss.__init__).parameters.items() if k != "self"}
