"""Keys that say which class is which, and which are kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from yolo_kd.classes.mapping import INDEX
from yolo_kd.classes.names import normalised
from yolo_kd.config.source import parse_yaml, problem, shown
from yolo_kd.errors import ConfigError

TEACHER = "teacher"
KEEP_CONF = 0.05
KEEP_BLEND = 0.65

CLASS_KEYS: dict[str, str] = {
    "class_map": "which teacher class is which of the student: '{car: vehicle, truck: vehicle}', or index for by index",
    "keep_classes": "teacher: the student keeps the teacher's classes and learns the data set's beside them",
    "keep_conf": f"with keep_classes: teacher's confidence from which labels do not deny old classes ({KEEP_CONF})",
    "keep_blend": f"with keep_classes: share of the way from its start that the finished student goes ({KEEP_BLEND})",
}


@dataclass(frozen=True)
class ClassOptions:
    """What the user says about classes.

    Attributes:
        class_map: Teacher class to student class, by name or index; "index" to pair all by index; None to pair by name.
        keep_classes: The student keeps the teacher's classes and learns the data set's beside them.
        keep_conf: Class probability of the teacher from which the task loss does not deny old classes at a point.
        keep_blend: Share of the way from its start that the finished student goes, above 0 and at most 1.
    """

    class_map: Mapping[str | int, str | int] | str | None = None
    keep_classes: bool = False
    keep_conf: float = KEEP_CONF
    keep_blend: float = KEEP_BLEND

    @classmethod
    def of(cls, keys: Mapping[str, Any]) -> ClassOptions:
        """Read the keys of `CLASS_KEYS`; those that are missing or None stay at their defaults.

        Raises:
            ConfigError: With one sentence for every value that is not allowed.
        """
        problems: list[str] = []
        choice = read_choice(keys, problems)
        if problems:
            raise ConfigError(problems)
        return choice

    def to_keys(self) -> dict[str, Any]:
        """Return the mapping that `of` reads, of plain types, without what is at its default."""
        keys: dict[str, Any] = {}
        if self.class_map is not None:
            keys["class_map"] = self.class_map if isinstance(self.class_map, str) else dict(self.class_map)
        if self.keep_classes:
            keys |= {"keep_classes": TEACHER, "keep_conf": self.keep_conf, "keep_blend": self.keep_blend}
        return keys


def read_choice(keys: Mapping[str, Any], problems: list[str], places: Mapping[str, str] | None = None) -> ClassOptions:
    """Read the keys of `CLASS_KEYS`.

    Args:
        keys: Them, with any others.
        problems: Receives a sentence for every mistake.
        places: Where a key was written, for messages.
    """
    places = places or {}
    kept = keys.get("keep_classes")
    mapping = _read_class_map(keys.get("class_map"), places.get("class_map", ""), problems)
    if kept is not None and kept != TEACHER:
        sentence = f"keep_classes must be {TEACHER}, received {shown(kept)}. Leave it out to train new classes only."
        problems.append(problem(places.get("keep_classes", ""), sentence))
    numbers = {"keep_conf": KEEP_CONF, "keep_blend": KEEP_BLEND}
    for key in numbers:
        value = keys.get(key)
        if value is None:
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        within = number and (0 < value < 1 or (value == 1 and key == "keep_blend"))  # all of the way is a way
        if not within:
            allowed = "above 0 and at most 1" if key == "keep_blend" else "between 0 and 1"
            sentence = f"{key} must be a number {allowed}, received {shown(value)}."
            problems.append(problem(places.get(key, ""), sentence))
        elif kept is None:
            sentence = f"{key} says how keep_classes works: add keep_classes={TEACHER}, or leave {key} out."
            problems.append(problem(places.get(key, ""), sentence))
        else:
            numbers[key] = float(value)
    if kept is not None and keys.get("class_map") is not None:
        sentence = (
            "class_map cannot be given with keep_classes, where names alone say which class is which. Leave one out."
        )
        problems.append(problem(places.get("class_map", ""), sentence))
    return ClassOptions(mapping, kept == TEACHER, **numbers)


def _read_class_map(value: Any, where: str, problems: list[str]) -> dict[str | int, str | int] | str | None:
    """Return a class map in its plain form; None for none, or for one with mistakes."""
    example = "class_map='{car: vehicle, truck: vehicle}'"
    if value is None or value == INDEX:
        return value
    if isinstance(value, str) and value.strip().startswith("{"):
        item = parse_yaml(value, "class_map", problems)
        if item is None:
            return None
        value = item.plain()
    if not isinstance(value, Mapping):
        sentence = f"class_map must be {INDEX} or a mapping of teacher classes to student classes, such as {example}"
        problems.append(problem(where, f"{sentence}, received {shown(value)}."))
        return None
    if not value:
        problems.append(problem(where, f"class_map is empty, so it maps nothing. Write {example}, or leave it out."))
    found: dict[str | int, str | int] = {}
    first: dict[str, Any] = {}
    for key, target in value.items():
        same = normalised(str(key))
        if isinstance(key, bool) or not isinstance(key, str | int) or key == "":
            sentence = f"class_map: a teacher class is a name or an index, received {shown(key)}."
        elif same in first:
            sentence = f"class_map maps teacher class '{key}' twice, first as '{first[same]}'. Keep one of them."
        elif target is None or target in ("", {}, [], ()):
            sentence = f"class_map: '{key}' is mapped to nothing. Write {{{key}: <student class>}}, or leave it out."
        elif isinstance(target, bool) or not isinstance(target, str | int):
            sentence = f"class_map: '{key}' must be mapped to the name or index of one student class, "
            sentence += f"received {shown(target)}."
        else:
            first[same] = key
            found[key] = target
            continue
        problems.append(problem(where, sentence))
    return found
