"""Recipes: what to distil. A YAML file or a mapping becomes a frozen record, or every mistake in it is reported."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yolo_kd.losses  # noqa: F401  registers the losses that ship with the package
from yolo_kd.config.plugins import read_plugins
from yolo_kd.config.source import Item, problem, raise_if, read_yaml, shown, wrap
from yolo_kd.config.terms import (
    AUTO,
    LAYER_KEYS,
    TermSpec,
    check_columns,
    constructor,
    override,
    plain,
    read_losses,
    read_term,
    unknown_keys,
)
from yolo_kd.errors import did_you_mean, listed
from yolo_kd.losses.base import find, registered

TOP_KEYS = ("losses", "plugins", "inherit")
THINNED = "thinned"  # of the values of inherit: all layers, with fewer channels; true is what fits of neck and head
INLINE = "inline"  # the name of a recipe that came from no file

_PACKAGE = Path(__file__).resolve().parents[1]
# in the wheel; in the checkout, where an editable installation finds them too
_FOLDERS = (_PACKAGE / "cfg" / "kd", _PACKAGE.parent / "cfg" / "kd")


@dataclass(frozen=True)
class Recipe:
    """What to distil.

    Attributes:
        name: Name of the file without its ending, `inline` for a mapping.
        terms: Losses in the order in which they were written, which is the order of the columns.
        plugins: Modules to import before the losses are looked up.
        inherit: What a student without weights of its own starts from: nothing (False), what fits of the teacher's neck
            and head (True), or all of the teacher, `thinned`.
    """

    name: str
    terms: tuple[TermSpec, ...]
    plugins: tuple[str, ...] = ()
    inherit: bool | str = False

    @property
    def reads(self) -> frozenset[str]:
        """What the terms need of a step."""
        return frozenset().union(*(find(term.name).reads for term in self.terms))

    @property
    def head_split(self) -> bool:
        """Whether some term reads the features inside the head."""
        return any(find(term.name).head_split for term in self.terms)

    @property
    def student_layers(self) -> list[str]:
        """Layers of the student that terms read in place of its neck's outputs, each once."""
        return [*dict.fromkeys(name for term in self.terms for name in term.student_layers)]

    @property
    def teacher_layers(self) -> list[str]:
        """Layers of the teacher likewise."""
        return [*dict.fromkeys(name for term in self.terms for name in term.teacher_layers)]

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe with every default filled in, in plain types that YAML and `load_recipe` read back."""
        losses = {}
        for term in self.terms:
            defaults = {k: p.default for k, p in constructor(registered()[term.name]).items()}
            arguments = {k: term.arguments.get(k, default) for k, default in defaults.items()}
            losses[term.name] = {
                **({"weight": term.weight} if term.ratio is None else {"weight": AUTO, "ratio": term.ratio}),
                "schedule": asdict(term.schedule),
                **{k: list(getattr(term, k)) for k in LAYER_KEYS if getattr(term, k)},
                **{k: plain(v) for k, v in arguments.items()},
            }
        return {"losses": losses, "plugins": list(self.plugins), "inherit": self.inherit}


def shipped_recipes() -> dict[str, Path]:
    """Return the recipes that come with the package, by name."""
    for folder in _FOLDERS:
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    return {}


def describe(path: str | os.PathLike[str]) -> str:
    """Return what a recipe is for: the first paragraph of the comment at the head of its file, as one line."""
    lines = []
    for line in Path(path).read_text(encoding="utf-8-sig").splitlines():
        text = line.strip()
        if not text.startswith("#") or not text.strip("# "):
            break
        lines.append(text.lstrip("#").strip())
    return " ".join(lines)


def load_recipe(
    source: str | os.PathLike[str] | Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    *,
    name: str | None = None,
) -> Recipe:
    """Read and check a recipe.

    Args:
        source: Name of a recipe that ships with the package, path of a YAML file, or a mapping as such a file holds.
        overrides: Values that replace what the recipe says, by `loss.key` or `loss.schedule.key`.
        name: Name of the recipe where a mapping cannot tell it, e.g. when a run is resumed.

    Raises:
        ConfigError: With one line for every mistake: file, line, what was received, what is allowed.
    """
    problems: list[str] = []
    given = {key: wrap(value, f"kd.{key} on the command line", problems) for key, value in (overrides or {}).items()}
    recipe = read_recipe(wrap(source, "kd" if isinstance(source, Mapping) else "", problems), given, problems, name)
    raise_if(problems)
    assert recipe is not None  # it is None only together with a problem
    return recipe


def read_recipe(
    source: Item, overrides: Mapping[str, Item], problems: list[str], name: str | None = None
) -> Recipe | None:
    """Do the work of `load_recipe` for a source and overrides that know where they were written.

    Args:
        source: Item that holds a name, a path or a mapping.
        overrides: Items by `loss.key`.
        problems: Receives one line per mistake.
        name: Name of the recipe.

    Returns:
        The recipe, None if anything is wrong with it.
    """
    before = len(problems)
    root: Item | None = source
    if not isinstance(source.value, dict):
        path = _find(source, problems)
        root = None if path is None else read_yaml(path, problems)
        name = name or (path.stem if path else None)
    if root is None:
        return None
    name = name or INLINE
    if not isinstance(root.value, dict):
        if root.value is None:
            sentence = "the recipe is empty. It needs 'losses:' with at least one loss."
        else:
            sentence = f"a recipe must be a mapping with the key 'losses', received {shown(root)}."
        problems.append(problem(root.where, sentence))
        return None
    unknown_keys(root.value, TOP_KEYS, "of a recipe", problems)
    plugins = read_plugins(root.value.get("plugins"), problems)
    inherit = root.value.get("inherit", Item(False))
    if wrong := inherit_mistake(inherit.value):
        problems.append(problem(inherit.where, wrong))
    losses = read_losses(root, problems)
    if losses is None:
        return None
    replaced = override(losses, overrides, name, problems)
    terms = [read_term(loss, item, replaced, problems) for loss, item in losses.items()]
    check_columns(losses, problems)
    valid = [term for term in terms if term is not None]
    if valid and len(valid) == len(terms) and not any(term.weight for term in valid):
        where = root.value["losses"].where
        problems.append(problem(where, "every weight is 0: nothing would be distilled. Raise one, or write kd=none."))
    if len(problems) > before:
        return None
    return Recipe(name, tuple(valid), plugins, inherit.value or False)


def inherit_mistake(value: Any) -> str | None:
    """Return what is wrong with a value of inherit, None if nothing is."""
    if value is None or isinstance(value, bool) or value == THINNED:
        return None
    return f"inherit must be true, false or {THINNED}, received {shown(value)}.{did_you_mean(value, (THINNED,))}"


def _find(source: Item, problems: list[str]) -> Path | None:
    """Return the file that a name or a path stands for."""
    value, names = source.value, shipped_recipes()
    if isinstance(value, os.PathLike):
        return Path(value)
    if not isinstance(value, str) or not value.strip():
        sentence = f"a recipe is a name, a path to a YAML file or a mapping, received {shown(value)}."
        problems.append(problem(source.where, sentence))
        return None
    if value in names:
        return names[value]
    path = Path(value)
    if path.suffix.lower() in (".yaml", ".yml"):
        if len(path.parts) == 1 and path.stem in names and not os.path.exists(value):
            sentence = f"no file '{value}' in the current folder. Write kd={path.stem} for the recipe of that name."
            problems.append(problem(source.where, sentence))
            return None
        return path
    if len(path.parts) > 1 and os.path.isfile(value):
        return path
    problems.append(
        problem(
            source.where,
            f"unknown recipe {shown(value)}.{did_you_mean(value[:60], names)} Recipes: {listed(list(names))}, or the "
            "path of a .yaml file.",
        )
    )
    return None
