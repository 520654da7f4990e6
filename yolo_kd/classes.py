"""Which class of the student is which of the teacher, and what that makes of scores and targets.

Names are compared after normalising case, spaces and punctuation. A class map overrides that and merges: where several
classes of the teacher are one of the student, the teacher's probability for it is that any of them is there,

    p = 1 - (1 - p_1) (1 - p_2) ...

In odds, 1 + o = (1 + o_1) (1 + o_2) ..., so the logit of a merger of two is log(e^a + e^b + e^(a + b)), which neither
overflows nor loses small probabilities; more are merged one after another. A class that is not merged keeps its logit,
bit for bit.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, reduce
from typing import Any

import torch
from torch import Tensor, nn

from yolo_kd.errors import CheckpointError, ConfigError, PairError, did_you_mean
from yolo_kd.views import Assignment, Targets, View
from yolo_kd.yaml_lines import parse_yaml, problem, shown

INDEX = "index"
TEACHER = "teacher"
KEEP_CONF = 0.05
KEEP_BLEND = 0.65

CLASS_KEYS: dict[str, str] = {
    "class_map": "which teacher class is which of the student: '{car: vehicle, truck: vehicle}', or index for by index",
    "keep_classes": "teacher: the student keeps the teacher's classes and learns the data set's beside them",
    "keep_conf": f"with keep_classes: teacher's confidence from which labels do not deny old classes ({KEEP_CONF})",
    "keep_blend": f"with keep_classes: share of the way from its start that the finished student goes ({KEEP_BLEND})",
}

_PLACEHOLDER = re.compile(r"(class|cls|category|label|object|obj|item|id)?\d+|item")
_SHOWN = 12  # rows of a table that only repeat what names say


@dataclass(frozen=True)
class ClassChoice:
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
    def of(cls, keys: Mapping[str, Any]) -> ClassChoice:
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


def read_choice(keys: Mapping[str, Any], problems: list[str], places: Mapping[str, str] | None = None) -> ClassChoice:
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
    return ClassChoice(mapping, kept == TEACHER, **numbers)


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


def normalised(name: str) -> str:
    """Return a class name without case, spaces and punctuation; a name of nothing else keeps its signs."""
    folded = _folded(name)
    return re.sub(r"[\W_]+", "", folded) or folded


def _folded(name: str) -> str:
    return str(name).strip().casefold()


def is_placeholder(name: str) -> bool:
    """Return whether a name says nothing about its class: a number, `class0`, or the `item` of `single_cls`."""
    return _PLACEHOLDER.fullmatch(normalised(name)) is not None


# ------------------------------------------------------------------------------------------------ the mapping


@dataclass(frozen=True)
class ClassMap:
    """Which classes of the teacher each class of the student is.

    The losses see the matched classes only, those of the student that have a class of the teacher, in the student's
    order. Where all match in order, nothing is touched.

    Attributes:
        teacher: The teacher's class names, by index.
        student: The student's.
        sources: For each student class, the indices of the teacher's that it stands for; several are merged, none
            leaves it unmatched.
        by: How they were paired: name, index, or placeholder for two equal lists of names that say nothing.
    """

    teacher: tuple[str, ...]
    student: tuple[str, ...]
    sources: tuple[tuple[int, ...], ...]
    by: str = "name"

    def to_dict(self) -> dict[str, Any]:
        """Return plain types only."""
        return {
            "teacher": list(self.teacher),
            "student": list(self.student),
            "sources": [list(s) for s in self.sources],
            "by": self.by,
        }

    @classmethod
    def from_dict(cls, state: Any) -> ClassMap:
        """Rebuild a mapping from `to_dict`.

        Raises:
            CheckpointError: If it was not made by `to_dict`.
        """
        try:
            sources = tuple(tuple(int(i) for i in s) for s in state["sources"])
            teacher, student = (tuple(str(n) for n in state[side]) for side in ("teacher", "student"))
            if len(sources) != len(student) or any(not 0 <= i < len(teacher) for s in sources for i in s):
                raise ValueError("classes do not fit")
            return cls(teacher, student, sources, str(state["by"]))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError("the checkpoint's record of its distillation is damaged: its class map.") from error

    @cached_property
    def matched(self) -> tuple[int, ...]:
        """Indices of the student's classes that have a class of the teacher."""
        return tuple(i for i, s in enumerate(self.sources) if s)

    @cached_property
    def is_identity(self) -> bool:
        """True where class i is class i on both sides, and there are no others."""
        return len(self.teacher) == len(self.student) and all(s == (i,) for i, s in enumerate(self.sources))

    # -------------------------------------------------------------------------------------------- tensors

    def teacher_logits(self, logits: Tensor, dim: int = -1) -> Tensor:
        """Return the teacher's logits for the matched classes.

        Args:
            logits: Class logits with the teacher's classes along `dim`; what has no classes was not read and stays.
            dim: The dimension of the classes.
        """
        if self.is_identity or logits.shape[dim] == 0:
            return logits
        sources = [self.sources[i] for i in self.matched]
        if all(len(s) == 1 for s in sources):
            return logits.index_select(dim, _index(tuple(s[0] for s in sources), logits.device))
        columns = logits.unbind(dim)
        merged = [columns[s[0]] if len(s) == 1 else reduce(_either, [columns[i].float() for i in s]) for s in sources]
        return torch.stack([column.to(logits.dtype) for column in merged], dim)

    def student_logits(self, logits: Tensor) -> Tensor:
        """Return the student's (..., classes) logits or class targets for the matched classes."""
        if len(self.matched) == len(self.student):
            return logits
        return logits.index_select(-1, _index(self.matched, logits.device))

    def student_labels(self, labels: Tensor) -> Tensor:
        """Return the student's numbers of classes that count the matched ones, of any shape."""
        if len(self.matched) == len(self.student):
            return labels
        return _index(self.matched, labels.device)[labels]

    def student_mask(self, mask: Tensor) -> Tensor:
        """Return a (B, matched, A) mask for all classes of the student, (B, classes, A), true where none matches."""
        if len(self.matched) == len(self.student):
            return mask
        whole = mask.new_ones(len(mask), len(self.student), mask.shape[-1])
        whole[:, _index(self.matched, mask.device)] = mask
        return whole

    def student_view(self, view: View) -> View:
        """Return the student's view with the matched classes only."""
        if len(self.matched) == len(self.student):
            return view
        return _with_scores(view, self.student_logits)

    def teacher_view(self, view: View) -> View:
        """Return the teacher's view with its classes as the student has them."""
        if self.is_identity:
            return view
        return _with_scores(view, self.teacher_logits)

    def targets(self, targets: Targets) -> Targets:
        """Return the targets of matched classes, with labels that count them; others are background."""
        if len(self.matched) == len(self.student):
            return targets
        number = {c: i for i, c in enumerate(self.matched)}
        renumbered = _index(tuple(number.get(c, -1) for c in range(len(self.student))), targets.labels.device)
        labels = renumbered[targets.labels]
        known = labels >= 0
        assignment = targets.assignment
        if assignment is not None:
            scores = self.student_logits(assignment.scores)
            # a foreground point has a class target above zero in its object's class and in no other
            foreground = assignment.foreground & (scores > 0).any(-1)
            assignment = Assignment(foreground, scores, assignment.boxes)
        return replace(
            targets,
            boxes=targets.boxes[known],
            labels=labels[known],
            image_index=targets.image_index[known],
            assignment=assignment,
        )

    # -------------------------------------------------------------------------------------------- words

    def table(self) -> str:
        """Show which class is which, for the log."""
        if self.is_identity:
            return f"Classes: all {len(self.student)} of teacher and student agree"
        rows = self.rows()
        width = max(len(left) for left, _ in rows)
        lines = [f"Classes: {len(self.matched)} of the student's {len(self.student)} have a class of the teacher"]
        return "\n".join([*lines, *(f"  {left.ljust(width)}  {right}" for left, right in rows)])

    def rows(self) -> list[tuple[str, str]]:
        """Return the table's rows, headings first: a class of the student, and what it is of the teacher."""
        sources = [" + ".join(f"{i} {self.teacher[i]}" for i in s) or "-" for s in self.sources]
        plain = [i for i, s in enumerate(self.sources) if s == (i,) and self.teacher[i] == self.student[i]]
        hidden = set(plain[_SHOWN:]) if len(plain) > _SHOWN + 1 else set()
        cells = [(f"{i} {self.student[i]}", sources[i]) for i in range(len(self.student)) if i not in hidden]
        rows = [("student", "teacher"), *cells]
        if hidden:
            rows.append((f"{len(hidden)} more", "of the same name and index"))
        used = {i for s in self.sources for i in s}
        if unused := [name for i, name in enumerate(self.teacher) if i not in used]:
            rows.append(("(not learned)", short(unused)))
        return rows


class MappedTail(nn.Module):
    """The end of the teacher's class branch, followed by the mapping of its classes.

    Args:
        tail: A frozen module that returns (B, classes, H, W).
        classes: The mapping.
    """

    def __init__(self, tail: nn.Module, classes: ClassMap):
        super().__init__()
        self.tail = tail
        self.classes = classes
        self.eval()

    def forward(self, feature: Tensor) -> Tensor:
        """Return the logits of the matched classes, (B, matched, H, W)."""
        return self.classes.teacher_logits(self.tail(feature), dim=1)


def _with_scores(view: View, mapping: Callable[[Tensor], Tensor]) -> View:
    """Return a view with the scores of both branches mapped."""
    second = view.one2one_scores
    return replace(view, scores=mapping(view.scores), one2one_scores=None if second is None else mapping(second))


def _either(a: Tensor, b: Tensor) -> Tensor:
    """Return the logit of the probability that at least one of two independent classes is there."""
    return torch.logaddexp(torch.logaddexp(a, b), a + b)


@lru_cache(maxsize=64)
def _index(indices: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(indices, dtype=torch.int64, device=device)


# ------------------------------------------------------------------------------------------------ matching


def match(
    teacher: Mapping[int, str],
    student: Mapping[int, str],
    class_map: Mapping[str | int, str | int] | str | None = None,
    by_index: bool = False,
) -> ClassMap:
    """Pair the teacher's classes with the student's.

    Args:
        teacher: The teacher's class names by index.
        student: The student's.
        class_map: What the user says: a mapping overrides what names say of the teacher classes that it names.
        by_index: Names say nothing: a random teacher, or one class on both sides.

    Returns:
        The mapping. It may match nothing, which is for the caller to judge.

    Raises:
        ConfigError: If the class map names a class that is not there, or a teacher class twice.
        PairError: If classes are to be paired by index and the counts differ.
    """
    theirs, ours = (tuple(str(names[i]) for i in sorted(names)) for names in (teacher, student))
    spelled = [[_folded(n) for n in names] for names in (theirs, ours)]
    bare = [[normalised(n) for n in names] for names in (theirs, ours)]
    equal = spelled[0] == spelled[1] or (bare[0] == bare[1] and len({*bare[0]}) == len(bare[0]))
    meaningless = any(is_placeholder(n) for n in ours)
    mapped = class_map if isinstance(class_map, Mapping) else None
    if class_map == INDEX or (mapped is None and (by_index or equal)):
        if len(theirs) != len(ours):
            raise PairError(
                f"classes cannot be paired by index: the teacher knows {len(theirs)} ({short(theirs)}), the data set "
                f"has {len(ours)} ({short(ours)}). Write class_map='{{<teacher class>: <data class>}}'."
            )
        by = "index" if class_map == INDEX or by_index else "placeholder" if meaningless else "name"
        return ClassMap(theirs, ours, tuple((i,) for i in range(len(ours))), by)
    pairs = _by_name(theirs, ours)
    if mapped is not None:
        pairs |= _resolve(mapped, theirs, ours)
    sources = tuple(tuple(t for t in sorted(pairs) if pairs[t] == s) for s in range(len(ours)))
    return ClassMap(theirs, ours, sources)


def _by_name(theirs: Sequence[str], ours: Sequence[str]) -> dict[int, int]:
    """Return the student's class for each class of the teacher whose name it has, and no other class of either."""
    pairs: dict[int, int] = {}
    for spell in (_folded, normalised):
        left = {i: spell(n) for i, n in enumerate(theirs) if i not in pairs and not is_placeholder(n)}
        right = {i: spell(n) for i, n in enumerate(ours) if i not in pairs.values() and not is_placeholder(n)}
        counts = Counter(left.values()), Counter(right.values())
        where = {n: i for i, n in right.items() if counts[1][n] == 1}
        pairs |= {i: where[n] for i, n in left.items() if n in where and counts[0][n] == 1}
    return pairs


def _resolve(class_map: Mapping[str | int, str | int], theirs: Sequence[str], ours: Sequence[str]) -> dict[int, int]:
    """Return a class map by indices.

    Raises:
        ConfigError: With a sentence for every class that is not there or named twice.
    """
    problems: list[str] = []
    pairs: dict[int, int] = {}
    named: dict[int, str | int] = {}
    for key, target in class_map.items():
        source, goal = _find(key, "teacher", theirs, problems), _find(target, "student", ours, problems)
        if source is not None and source in pairs:
            problems.append(
                f"class_map maps teacher class {source} '{theirs[source]}' twice, as '{named[source]}' and as '{key}'. "
                "Keep one of them."
            )
        elif source is not None and goal is not None:
            pairs[source], named[source] = goal, key
    if problems:
        raise ConfigError(problems)
    return pairs


def _find(word: str | int, side: str, names: Sequence[str], problems: list[str]) -> int | None:
    """Return the index of a class by its name, or by its index where no class is called so."""
    if isinstance(word, str):
        for spell in (str, _folded, normalised):
            if len(found := [i for i, name in enumerate(names) if spell(name) == spell(word)]) == 1:
                return found[0]
            if found:
                problems.append(
                    f"class_map: the {side} has {len(found)} classes called '{word}'. Write the index of one."
                )
                return None
    if isinstance(word, int) or word.strip().isdecimal():
        if 0 <= int(word) < len(names):
            return int(word)
        problems.append(f"class_map: the {side} has no class of index {word}; it has 0 to {len(names) - 1}.")
        return None
    problems.append(
        f"class_map: the {side} has no class '{word}'.{did_you_mean(word, names)} It has {short(names, 8)}."
    )
    return None


def indices_of(names: Sequence[str], among: Sequence[str]) -> list[int] | None:
    """Return the index of each class among others, None unless every one of them is there by name, and once."""
    sources = match(dict(enumerate(among)), dict(enumerate(names))).sources
    return [s[0] for s in sources] if all(len(s) == 1 for s in sources) else None


def nothing_matched(classes: ClassMap, data: Any, single: bool = False) -> str:
    """Say that no class of the student is one of the teacher's, and what to write."""
    equal = len(classes.teacher) == len(classes.student)
    example = f"class_map='{{{classes.teacher[0]}: {classes.student[0]}}}'"
    text = (
        f"none of the {len(classes.student)} classes of data={data} ({short(classes.student)}) has the name of one of "
        f"the teacher's {len(classes.teacher)} ({short(classes.teacher)})."
    )
    if single:
        return f"{text} single_cls makes one class of all: say which of the teacher's it is, such as {example}."
    if any(is_placeholder(n) for n in (*classes.teacher, *classes.student)):
        text += " Names that are mere numbers are never matched."
    by_index = f", or {example.partition('=')[0]}={INDEX} if they are the same in the same order" if equal else ""
    return (
        f"{text} Say which is which, such as {example}{by_index}; or train the teacher on this data set first "
        "(yolo-kd train kd=none student=<teacher model> data=...)."
    )


def short(names: Sequence[str], limit: int = 4) -> str:
    """Return the first names of a list and the number of the others."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{', '.join(str(n)[:40] for n in names[:limit])}{more}"
