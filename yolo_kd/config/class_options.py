"""Keys that say how classes of the teacher and the student correspond, and which are kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic.dataclasses import dataclass
from typing_extensions import Self

from yolo_kd.classes.names import normalised
from yolo_kd.config.groups import KeyGroup
from yolo_kd.config.source import parse_yaml
from yolo_kd.config.validation import CONFIG, Number, Text, Whole, mistakes

TEACHER = "teacher"
KEEP_CONF = 0.05
KEEP_BLEND = 0.65

ClassName = Annotated[Text, Field(title="the name of a class")] | Annotated[Whole, Field(ge=0, title="its index")]


def _from_text(value: Any) -> Any:
    """Return the mapping that a text such as `{car: vehicle}` stands for."""
    if not isinstance(value, str) or not value.strip().startswith("{"):
        return value
    problems: list[str] = []
    item = parse_yaml(value, "class_map", problems)
    if problems or item is None:
        raise mistakes([((), line) for line in problems])
    return item.plain()


def _each_once(value: Mapping[str | int, str | int]) -> Mapping[str | int, str | int]:
    first: dict[str, str | int] = {}
    for key in value:
        if (other := first.setdefault(normalised(str(key)), key)) != key:
            raise mistakes([((), f"class_map maps teacher class '{key}' twice, first as '{other}'. Keep one of them.")])
    return value


Classes = Annotated[
    dict[ClassName, ClassName],
    Field(
        min_length=1,
        title="a mapping of teacher classes to student classes",
        examples=[{"car": "vehicle", "truck": "vehicle"}],
    ),
    AfterValidator(_each_once),
]


@dataclass(frozen=True, config=CONFIG)
class ClassOptions(KeyGroup):
    """What the user chose about classes. The descriptions of the fields are their documentation."""

    class_map: Annotated[Literal["index"] | Classes | None, BeforeValidator(_from_text)] = Field(
        default=None,
        description="Student class of each teacher class: '{car: vehicle, truck: vehicle}', or index to pair them by "
        "index; without it they are paired by name.",
    )
    keep_classes: Literal["teacher"] | None = Field(
        default=None,
        description="teacher: the student keeps the teacher's classes and learns the data set's besides.",
    )
    keep_conf: Annotated[Number, Field(gt=0, lt=1)] = Field(
        default=KEEP_CONF,
        description="With keep_classes: class probability of the teacher from which the task loss does not deny its "
        "classes at a point.",
    )
    keep_blend: Annotated[Number, Field(gt=0, le=1)] = Field(
        default=KEEP_BLEND,
        description="With keep_classes: share of the way from its initialisation that the finished student goes.",
    )

    @model_validator(mode="after")
    def _belong_together(self) -> Self:
        lines = []
        for key, default in (("keep_conf", KEEP_CONF), ("keep_blend", KEEP_BLEND)):
            if getattr(self, key) != default and not self.keep_classes:
                sentence = f"{key} has no effect without keep_classes: add keep_classes={TEACHER}, or leave {key} out."
                lines.append(((key,), sentence))
        if self.keep_classes and self.class_map is not None:
            sentence = "class_map cannot be given with keep_classes, which pairs classes by name. Leave one out."
            lines.append((("class_map",), sentence))
        if lines:
            raise mistakes(lines)
        return self

    def to_keys(self) -> dict[str, Any]:
        """Return the mapping that `of` reads, of plain types, without what has no effect."""
        keys: dict[str, Any] = {}
        if self.class_map is not None:
            keys["class_map"] = self.class_map
        if self.keep_classes:
            keys |= {"keep_classes": TEACHER, "keep_conf": self.keep_conf, "keep_blend": self.keep_blend}
        return keys


CLASS_KEYS = ClassOptions.documented()
