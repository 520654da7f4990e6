"""Recipes: what to distil. A YAML file or a mapping becomes a frozen object, or every mistake in it is reported."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool
from pydantic.dataclasses import dataclass

from yolo_kd.config.plugins import PluginKeys
from yolo_kd.config.source import Item, problem, raise_if, read_yaml, shown, wrap
from yolo_kd.config.terms import AUTO, TermSpec, read_term
from yolo_kd.config.validation import CONFIG, validate
from yolo_kd.errors import did_you_mean, listed
from yolo_kd.losses.base import find, registered

THINNED = "thinned"  # a value of inherit: all layers, with fewer channels; true is what fits of neck and head
INLINE = "inline"  # the name of a recipe that came from no file

_PACKAGE = Path(__file__).resolve().parents[1]
# in the wheel; in the checkout, where an editable installation finds them too
_FOLDERS = (_PACKAGE / "cfg" / "kd", _PACKAGE.parent / "cfg" / "kd")

Inherit = StrictBool | Literal["thinned"]


@dataclass(frozen=True, config=CONFIG)
class Recipe:
    """What to distil.

    Attributes:
        name: Name of the file without its ending, `inline` for a mapping.
        terms: Losses in the order in which they were written, which is the order of the columns.
        plugins: Modules to import before the losses are looked up.
        inherit: Initialisation of a student without weights: none from the teacher (False), what fits of the teacher's
            neck and head (True), or all of the teacher, `thinned`.
    """

    name: str
    terms: tuple[TermSpec, ...]
    plugins: tuple[str, ...] = ()
    inherit: Inherit = False

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
        losses = {term.name: term.to_dict() for term in self.terms}
        return {"losses": losses, "plugins": list(self.plugins), "inherit": self.inherit}


LossKeys = Annotated[dict[str, Any], Field(title="a mapping of its keys", examples=[{"weight": 1.0}])]


class RecipeKeys(PluginKeys):
    """The keys of a recipe file; each loss has a model of its own, see `term_model`."""

    inherit: Inherit | None = Field(
        default=False,
        description="Initialisation of a student without weights: thinned (a thinned copy of the teacher), true (what "
        "fits of its neck and head), false (random).",
    )
    losses: dict[str, LossKeys | None] = Field(
        min_length=1,
        title="a mapping from names of losses to their keys",
        examples=[{"objectness": {"weight": 1.0}}],
        description="What is distilled: one or more losses by name, each with its keys.",
    )


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
        overrides: Changes to the recipe, by `loss.key` or `loss.schedule.key`.
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
        received = "it is empty" if root.value is None else f"received {shown(root)}"
        problems.append(problem(root.where, f"a recipe must be a mapping with the key 'losses'; {received}."))
        return None
    keys = validate(RecipeKeys, root, problems, "of a recipe")
    losses = _losses(root)
    _override(losses, overrides, name, problems)
    found = [read_term(loss, item, problems) for loss, item in losses.items()]
    terms = [term for term in found if term is not None]
    _check_columns(losses, problems)
    if terms and len(terms) == len(found) and not any(term.weight for term in terms):
        where = root.value["losses"].where
        problems.append(problem(where, "every weight is 0: nothing would be distilled. Raise one, or write kd=none."))
    if len(problems) > before or keys is None:
        return None
    return Recipe(name, tuple(terms), tuple(keys.plugins), keys.inherit or False)


def _losses(root: Item) -> dict[str, Item]:
    """Return the terms as mappings that may be changed, without those that are none."""
    item = root.value.get("losses", Item(None))
    entries = item.value.items() if isinstance(item.value, dict) else ()
    return {name: Item(dict(i.value or {}), i.where) for name, i in entries if isinstance(i.value, dict | None)}


def _override(losses: dict[str, Item], overrides: Mapping[str, Item], recipe: str, problems: list[str]) -> None:
    """Put overrides in the place of what the recipe says, without keys of it that they leave without effect."""
    for key, item in overrides.items():
        name, _, rest = key.partition(".")
        if name not in losses:
            sentence = f"recipe '{recipe}' has no loss '{name}'.{did_you_mean(name[:60], losses)}"
            problems.append(problem(item.where, f"{sentence} It has {listed(list(losses))}."))
            continue
        term: dict[str, Item] = losses[name].value
        first, _, second = rest.partition(".")
        if not first or (second and first != "schedule") or rest.endswith("."):
            sentence = f"an override is written kd.{name}.<key>=value or kd.{name}.schedule.<key>=value."
            problems.append(problem(item.where, sentence))
        elif second:
            schedule = term.get("schedule", Item({}, item.where))
            if isinstance(schedule.value, dict):  # otherwise the recipe's own mistake is reported below
                term["schedule"] = Item({**schedule.value, second: item}, schedule.where)
                if item.value == "constant" and f"{name}.schedule.end" not in overrides:
                    term["schedule"].value.pop("end", None)
        else:
            term[first] = item
            if first == "weight" and item.value != AUTO and f"{name}.ratio" not in overrides:
                term.pop("ratio", None)


def _check_columns(losses: Mapping[str, Item], problems: list[str]) -> None:
    """Refuse two terms that report under one name: their numbers could not be told apart."""
    known = registered()
    owner: dict[str, str] = {}
    for name, item in losses.items():
        for column in known[name].columns if name in known else ():
            if column in owner:
                sentence = f"losses '{owner[column]}' and '{name}' both report the column '{column}'; use one of them."
                problems.append(problem(item.where, sentence))
                break
            owner[column] = name


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
