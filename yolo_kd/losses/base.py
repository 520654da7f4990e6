"""The base classes of all distillation losses, and the registry that finds losses by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, get_origin

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor, nn

from yolo_kd.errors import ConfigError, PairError, did_you_mean, listed
from yolo_kd.structures import LossInputs, PairSpec

READABLE = frozenset({"features", "scores", "boxes", "one2one", "targets", "assignment"})
COLUMN_WIDTH = 10  # Ultralytics' progress bar gives each column 11 characters, one of them a space

# Types of keys: constructors and recipes are checked, and the schema of recipes is written, by what they say.
AtLeastZero = Annotated[float, Field(ge=0)]
AboveZero = Annotated[float, Field(gt=0)]
LevelNames = Annotated[list[str], Field(min_length=1, title="a list of level names", examples=[["p3", "p4", "p5"]])]

_BOUNDS = {  # of a JSON Schema, in words
    "minimum": "at least",
    "exclusiveMinimum": "more than",
    "maximum": "at most",
    "exclusiveMaximum": "less than",
}
_REGISTRY: dict[str, type[Loss]] = {}


def _declared_keys(cls: type[Loss]) -> dict[str, inspect.Parameter]:
    """Return the keys that a class declares: its annotated attributes with a value, class variables excepted."""
    annotated = {key: hint for key, hint in vars(cls).get("__annotations__", {}).items() if key in vars(cls)}
    # a class of its own, because the other annotations may name types that only a type checker imports
    resolvable = type(cls.__name__, (), {"__annotations__": annotated, "__module__": cls.__module__})
    return {
        key: inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=vars(cls)[key], annotation=hint)
        for key, hint in inspect.get_annotations(resolvable, eval_str=True).items()
        if get_origin(hint) is not ClassVar
    }


def _constructor(keys: Mapping[str, inspect.Parameter]) -> Callable[..., None]:
    """Return a constructor with these keyword-only arguments, which checks them and sets them on the instance."""
    named = [p for p in keys.values() if p.kind is p.KEYWORD_ONLY]
    signature = inspect.Signature([inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY), *named])

    def construct(self: Loss, **given: Any) -> None:
        nn.Module.__init__(self)
        arguments = signature.bind(self, **given)
        arguments.apply_defaults()
        for parameter in named:
            key = parameter.name
            setattr(self, key, check_key(key, arguments.arguments[key], parameter.annotation))

    construct.__signature__ = signature  # type: ignore[attr-defined]
    construct.__annotations__ = {p.name: p.annotation for p in named}
    return construct


def check_key(key: str, value: Any, annotation: Any) -> Any:
    """Return the value of a key, converted to its type: a whole number to a number, a tuple to a list.

    Raises:
        ValueError: If the annotation does not allow it; the message names the key, what is allowed and the closest
            choice.
    """
    adapter = TypeAdapter(annotation, config=ConfigDict(strict=True, allow_inf_nan=False))
    try:
        return adapter.validate_python(list(value) if isinstance(value, tuple) else value)
    except ValidationError:
        schema = adapter.json_schema()
        schema = schema.get("anyOf", [schema])[0]
        hint = did_you_mean(value, schema.get("enum", ()))
        raise ValueError(f"{key} must be {_allowed(schema)}, received {value!r}{hint and '.'}{hint}") from None


def _allowed(schema: Mapping[str, Any]) -> str:
    """Return what a JSON Schema allows, in words."""
    if "enum" in schema:
        return listed(schema["enum"])
    if schema["type"] == "array":
        example = f" such as [{', '.join(schema['examples'][0])}]" if "examples" in schema else ""
        return schema.get("title", f"a list, each entry {_allowed(schema['items'])}") + example
    kinds = {"boolean": "true or false", "string": "text", "integer": "a whole number", "number": "a number"}
    limits = [f"{words} {schema[bound]:g}" for bound, words in _BOUNDS.items() if bound in schema]
    return kinds[schema["type"]] + (" of " + " and ".join(limits) if limits else "")


def parameters(loss: type[Loss]) -> dict[str, inspect.Parameter]:
    """Return the recipe keys of a loss: the parameters of its constructor."""
    return {k: p for k, p in inspect.signature(loss.__init__).parameters.items() if k != "self"}


class Loss(nn.Module):
    """One published distillation loss.

    A subclass that sets `name` registers itself. Its class attributes that have an annotation and a value are the keys
    that a recipe may set. They become keyword-only arguments of the constructor, which checks each one against its
    annotation and sets it on the instance. A subclass may write a constructor instead.

    `build` makes the modules with learned parameters, once the widths of both models are fixed. Adapters that only
    bring the student's features to the teacher's width are not made there: the loss declares one with `adapter` and
    reads `inputs.aligned(self.adapter, level)`, so that terms share it.

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
        written = cls.__init__ is not nn.Module.__init__ and not hasattr(cls.__init__, "__signature__")
        if not written and (keys := _declared_keys(cls)):
            cls.__init__ = _constructor(keys | parameters(cls) | keys)  # type: ignore[method-assign]
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

    A loss that is a sum over levels implements `level_loss`. Other losses override `forward` and use `level_indices`
    and `maps`.

    Attributes:
        levels: Names of the levels to use, such as [p3, p4]; all by default.
        strength: Factor of the sum. It makes `weight: 1.0` a sane start: the gradient into the student's neck is about
            a third of the task loss's (table and command in docs/losses.md).
    """

    strength: ClassVar[float] = 1.0

    levels: LevelNames | None = None

    level_indices: tuple[int, ...]
    """Indices of the levels in use, in stride order; set by `build`."""

    def build(self, pair: PairSpec) -> None:
        """Find the levels in use.

        Args:
            pair: Widths, strides, classes and bins of both models.

        Raises:
            PairError: If the pair lacks a level that the recipe names.
        """
        super().build(pair)
        names = self.levels or pair.level_names
        for name in names:
            if name not in pair.level_names:
                raise PairError(
                    f"loss '{self.name}' names level '{name}', but this pair has {listed(pair.level_names)}."
                    f"{did_you_mean(name, pair.level_names)}"
                )
        self.level_indices = tuple(i for i, name in enumerate(pair.level_names) if name in names)

    def forward(self, inputs: LossInputs) -> dict[str, Tensor]:
        """Return the only column: the sum of `level_loss` over the levels, times `strength`."""
        return self.total([self.level_loss(inputs, level) for level in self.level_indices])

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
        return modules[self.level_indices.index(level)]


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
