"""Pairs teacher classes with student classes: by name, by index, or by a class map.

Names are compared without case, spaces and punctuation. A class map overrides the names, and can merge classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from yolo_kd.classes.mapping import INDEX, ClassMap
from yolo_kd.classes.names import folded, is_placeholder, normalised, short
from yolo_kd.errors import ConfigError, PairError, did_you_mean


def match(
    teacher: Mapping[int, str],
    student: Mapping[int, str],
    class_map: Mapping[str | int, str | int] | str | None = None,
    by_index: bool = False,
) -> ClassMap:
    """Pair teacher classes with student classes.

    Args:
        teacher: The teacher's class names by index.
        student: The student's class names by index.
        class_map: The user's class map: `index`, or a mapping that overrides the names for the teacher classes in it.
        by_index: Ignore the names, as for a random teacher or one class on both sides.

    Returns:
        The mapping. It may match no class at all.

    Raises:
        ConfigError: If the class map contains an unknown class, or a teacher class twice.
        PairError: If the classes are paired by index and their counts differ.
    """
    theirs, ours = (tuple(str(names[i]) for i in sorted(names)) for names in (teacher, student))
    spelled = [[folded(n) for n in names] for names in (theirs, ours)]
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
    """Return the student class for each teacher class of the same name, if the name is unique on both sides."""
    pairs: dict[int, int] = {}
    for spell in (folded, normalised):
        left = {i: spell(n) for i, n in enumerate(theirs) if i not in pairs and not is_placeholder(n)}
        right = {i: spell(n) for i, n in enumerate(ours) if i not in pairs.values() and not is_placeholder(n)}
        counts = Counter(left.values()), Counter(right.values())
        where = {n: i for i, n in right.items() if counts[1][n] == 1}
        pairs |= {i: where[n] for i, n in left.items() if n in where and counts[0][n] == 1}
    return pairs


def _resolve(class_map: Mapping[str | int, str | int], theirs: Sequence[str], ours: Sequence[str]) -> dict[int, int]:
    """Convert a class map to indices.

    Raises:
        ConfigError: With a sentence for every unknown or repeated class.
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
    """Return the index of a class, given its name or, if no class has that name, its index."""
    if isinstance(word, str):
        for spell in (str, folded, normalised):
            if len(found := [i for i, name in enumerate(names) if spell(name) == spell(word)]) == 1:
                return found[0]
            if found:
                problems.append(
                    f"class_map: the {side} has {len(found)} classes named '{word}'. Write the index of one."
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
    """Return the index of each class among others, None unless each name occurs there exactly once."""
    sources = match(dict(enumerate(among)), dict(enumerate(names))).sources
    return [s[0] for s in sources] if all(len(s) == 1 for s in sources) else None


def nothing_matched(classes: ClassMap, data: Any, single: bool = False) -> str:
    """Return the message that no student class matches a teacher class, with what to write."""
    equal = len(classes.teacher) == len(classes.student)
    example = f"class_map='{{{classes.teacher[0]}: {classes.student[0]}}}'"
    text = (
        f"none of the {len(classes.student)} classes of data={data} ({short(classes.student)}) has the name of one of "
        f"the teacher's {len(classes.teacher)} ({short(classes.teacher)})."
    )
    if single:
        return f"{text} single_cls makes one class of all: write the teacher class that it is, such as {example}."
    if any(is_placeholder(n) for n in (*classes.teacher, *classes.student)):
        text += " Names that are mere numbers are never matched."
    by_index = f", or {example.partition('=')[0]}={INDEX} if they are the same in the same order" if equal else ""
    return (
        f"{text} Say which is which, such as {example}{by_index}; or train the teacher on this data set first "
        "(yolo-kd train kd=none student=<teacher model> data=...)."
    )
