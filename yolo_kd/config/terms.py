"""One loss of a recipe: its keys are those of every term and the arguments of the loss's constructor."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import asdict, field
from functools import cache
from textwrap import dedent
from types import UnionType
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, create_model
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

import yolo_kd.losses  # noqa: F401  registers the losses that ship with the package
from yolo_kd.config.schedule import RATIO, Multiplier, Schedule
from yolo_kd.config.source import Item, problem
from yolo_kd.config.validation import CONFIG, STRICT, validate
from yolo_kd.errors import YoloKDError, did_you_mean, listed
from yolo_kd.losses.base import Loss, parameters, registered

AUTO = "auto"  # the weight that sets itself
LAYER_KEYS = ("student_layers", "teacher_layers")
LAYER_READS = frozenset({"features", "targets", "one2one"})

_ANY_NUMBER_OF = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@dataclass(frozen=True, config=CONFIG)
class TermSpec:
    """One loss of a recipe.

    Attributes:
        name: Name of the loss.
        weight: Multiplier of its scalars, at least 0; for a weight that sets itself, its first value.
        schedule: How the multiplier changes over the training.
        arguments: Arguments of the loss's constructor, only those that were given.
        student_layers: Layers of the student to read in place of its neck's outputs, finest first, () for the neck.
        teacher_layers: Layers of the teacher likewise; as many as the student's side has.
        ratio: Target of an automatic weight: the term's gradient over the task loss's. None for a fixed weight.
        loss: The constructed loss, not built yet; whoever trains with it takes a copy.
    """

    name: str
    weight: float = 1.0
    schedule: Schedule = field(default_factory=lambda: Schedule())
    arguments: dict[str, Any] = field(default_factory=dict)
    student_layers: tuple[str, ...] = ()
    teacher_layers: tuple[str, ...] = ()
    ratio: float | None = None
    loss: Any = field(default=None, compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the keys of the term with every default filled in, in plain types."""
        keys = {key: parameter.default for key, parameter in constructor(registered()[self.name]).items()}
        return {
            **({"weight": self.weight} if self.ratio is None else {"weight": AUTO, "ratio": self.ratio}),
            "schedule": asdict(self.schedule),
            **{key: list(getattr(self, key)) for key in LAYER_KEYS if getattr(self, key)},
            **{key: plain(self.arguments.get(key, default)) for key, default in keys.items()},
        }


def _different(names: list[str]) -> list[str]:
    if len(set(names)) < len(names):
        raise PydanticCustomError("repeated", "a layer is named twice")
    return names


def _made(value: Any) -> Any:
    return Schedule(**value) if isinstance(value, dict) else value


Layers = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    Field(
        min_length=1,
        title="a list of different layer names",
        examples=[["model.4", "model.6"]],
        json_schema_extra={"uniqueItems": True},
    ),
    AfterValidator(_different),
]


class TermKeys(BaseModel):
    """The keys that every loss of a recipe takes."""

    model_config = STRICT

    weight: Multiplier | Literal["auto"] = Field(
        default=1.0, description="Strength of the loss; 1.0 is a sensible one. auto: the weight follows the gradients."
    )
    ratio: float = Field(
        default=RATIO,
        gt=0,
        le=10,
        description="With weight: auto, the loss's gradient over the task loss's that the weight aims at.",
    )
    schedule: Annotated[Schedule, BeforeValidator(_made)] = Field(
        default=Schedule(),
        examples=[{"kind": "cosine", "start": 1.0, "end": 0.1}],
        description="How the strength changes over the training.",
    )
    student_layers: Layers | None = Field(
        default=None, description="Layers of the student to read in place of its neck's outputs, finest first."
    )
    teacher_layers: Layers | None = Field(
        default=None, description="Layers of the teacher to read in place of its neck's outputs, finest first."
    )

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of the loss's constructor that were given."""
        fields = {name: field.alias for name, field in type(self).model_fields.items() if field.alias}
        return {key: getattr(self, name) for name, key in fields.items() if name in self.model_fields_set}


def _contradictions(loss: type[Loss], given: Mapping[str, Item]) -> Iterator[tuple[Item, str]]:
    """Yield the mistakes between keys, each with what is wrong."""
    if "ratio" in given and ("weight" not in given or given["weight"].value != AUTO):
        sentence = f"ratio of loss '{loss.name}' has no effect without weight: {AUTO}."
        yield given["ratio"], f"{sentence} Write that, or leave ratio out."
    schedule = given["schedule"].plain() if "schedule" in given else None
    if isinstance(schedule, dict) and schedule.get("kind", "constant") == "constant":
        start = schedule.get("start", 1.0)
        if schedule.get("end", start) not in (1.0, start):
            sentence = f"end of the schedule of loss '{loss.name}' has no effect with kind: constant."
            yield given["schedule"].value["end"], f"{sentence} Write kind: linear or cosine, or leave it out."
    layers = [key for key in LAYER_KEYS if key in given and given[key].value]
    if layers and (other := sorted(loss.reads - LAYER_READS)):
        sentence = (
            f"loss '{loss.name}' reads {listed(other)}, which belong to the head's levels; it cannot take layers."
        )
        yield given[layers[0]], sentence


def constructor(loss: type[Loss]) -> dict[str, inspect.Parameter]:
    """Return the keys of a loss without *args and **kwargs, which a class without a constructor inherits."""
    return {key: p for key, p in parameters(loss).items() if p.kind not in _ANY_NUMBER_OF}


def meanings(documented: object) -> dict[str, str]:
    """Return what each argument of a class or function does, from the section `Args:` of its Google-style docstring."""
    found: dict[str, str] = {}
    name = ""
    section = (inspect.getdoc(documented) or "").partition("\nArgs:\n")[2].partition("\n\n")[0]
    for line in dedent(section).splitlines():
        if line[0].isspace():
            found[name] += f" {line.strip()}"
        else:
            name, _, found[name] = line.partition(": ")
    return found


def term_model(loss: type[Loss]) -> type[TermKeys]:
    """Return the model of a loss's keys, made from the signature of its constructor.

    Raises:
        ValueError: If the constructor cannot be described: an annotation that does not resolve, or a reserved name.
    """
    return _term_model(cast(Any, loss))


@cache
def _term_model(loss: Any) -> type[TermKeys]:
    keys = constructor(loss)
    if taken := [key for key in TermKeys.model_fields if key in keys]:
        sentence = f"loss '{loss.name}' has a constructor argument '{taken[0]}', a name that recipes use themselves."
        raise ValueError(f"{sentence} Rename it in {loss.__module__}.")
    try:
        hints = get_type_hints(loss.__init__, include_extras=True) if keys else {}
    except NameError as error:
        sentence = f"the types of the constructor of loss '{loss.name}' cannot be found: {error}."
        raise ValueError(f"{sentence} Import them in {loss.__module__} outside of TYPE_CHECKING.") from error
    documented = meanings(loss)
    fields: dict[str, Any] = {}
    for key, parameter in keys.items():
        default = ... if parameter.default is parameter.empty else parameter.default
        # the prefix keeps names of arguments apart from those of pydantic's methods
        fields[f"argument_{key}"] = (
            _as_read(hints.get(key, Any)),
            Field(default, alias=key, description=documented.get(key)),
        )
    return create_model(f"Term_{loss.name}", __base__=TermKeys, __doc__=f"{loss.paper or loss.name}.", **fields)


def _as_read(hint: Any) -> Any:
    """Return an annotation for values of YAML, which has lists and no tuples."""
    if get_origin(hint) is tuple:
        return Annotated[hint, Field(strict=False)]
    if get_origin(hint) in (Union, UnionType):
        return Union[tuple(_as_read(choice) for choice in get_args(hint))]  # noqa: UP007
    return hint


def read_term(name: str, item: Item, problems: list[str]) -> TermSpec | None:
    """Check one loss of a recipe; None if anything is wrong with it."""
    label = f"of loss '{name}'"
    loss = registered().get(name)
    if loss is None:
        known = registered()
        sentence = f"unknown loss '{name}'.{did_you_mean(name[:60], known)} Known losses: {listed(list(known))}."
        problems.append(problem(item.where, sentence))
        shared = {key: entry for key, entry in item.value.items() if key in TermKeys.model_fields}
        validate(TermKeys, Item(shared, item.where), problems, label)
        return None
    try:
        model = term_model(loss)
    except ValueError as error:
        problems.append(problem(item.where, str(error)))
        return None
    keys = validate(model, item, problems, label)
    problems += [problem(wrong.where, sentence) for wrong, sentence in _contradictions(loss, item.value)]
    if keys is None:  # what is right of it may still be refused by the constructor
        given = [key for key in constructor(loss) if key in item.value]
        alone = {key: validate(model, Item({key: item.value[key]}), []) for key in given}
        _construct(loss, {key: made.arguments[key] for key, made in alone.items() if made}, item, problems)
        return None
    if (made := _construct(loss, keys.arguments, item, problems)) is None:
        return None
    auto = keys.weight == AUTO
    return TermSpec(
        name,
        1.0 if auto else float(keys.weight),
        keys.schedule,
        keys.arguments,
        tuple(keys.student_layers or ()),
        tuple(keys.teacher_layers or ()),
        keys.ratio if auto else None,
        made,
    )


def _construct(loss: type[Loss], arguments: dict[str, Any], item: Item, problems: list[str]) -> Loss | None:
    """Construct a loss, and return None if it does not accept its arguments.

    A constructor stops at its first mistake and does not say where that was written. So every argument is tried with
    the defaults of the others; what only fails together belongs to the loss.
    """
    made = _try(loss, arguments)
    if not isinstance(made, str):
        return made
    needed = {
        key: value for key, value in arguments.items() if constructor(loss)[key].default is inspect.Parameter.empty
    }
    alone = {key: _try(loss, {**needed, key: value}) for key, value in arguments.items()}
    wrong = {key: reason for key, reason in alone.items() if isinstance(reason, str)}
    if len(needed) < sum(p.default is inspect.Parameter.empty for p in constructor(loss).values()):
        return None  # a key is missing, which has been reported
    if not wrong or needed:
        wrong = {"": made}
    for key, reason in wrong.items():
        where = item.value[key].where if key else item.where
        problems.append(problem(where, f"loss '{loss.name}': {reason.rstrip('.')}."))
    return None


def _try(loss: type[Loss], arguments: dict[str, Any]) -> Loss | str:
    """Return a loss, or the reason why its constructor refuses the arguments."""
    try:
        return loss(**arguments)
    except Exception as error:  # a plugin may raise anything
        meant = isinstance(error, ValueError | TypeError | YoloKDError)
        return str(error) if meant else f"{type(error).__name__}: {error}"


def plain(value: Any) -> Any:
    """Return a value in types that YAML writes without tags."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value
