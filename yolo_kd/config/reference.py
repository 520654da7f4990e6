"""The keys a person can write, with what each allows, its default and what it does: made from the models."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from yolo_kd.config.class_options import ClassOptions
from yolo_kd.config.recipe import RecipeKeys
from yolo_kd.config.schedule import Schedule
from yolo_kd.config.speed import Speed
from yolo_kd.config.terms import TermKeys, meanings, term_model
from yolo_kd.config.train_options import OWN_KEYS, TrainKeys
from yolo_kd.config.unlabeled import UnlabeledOptions
from yolo_kd.config.validation import json_schema, words
from yolo_kd.errors import listed
from yolo_kd.losses.base import Loss


@dataclass(frozen=True)
class Key:
    """One key.

    Attributes:
        name: The key, as it is written.
        allowed: The values it takes, in words.
        default: The value that it has otherwise, as YAML; empty where there is none.
        meaning: What it does, as a sentence.
    """

    name: str
    allowed: str
    default: str
    meaning: str


def keys_of(model: Any) -> list[Key]:
    """Return the keys of a model, in the order of its fields."""
    schema = json_schema(model)
    return [_key(name, entry, schema.get("$defs", {})) for name, entry in schema["properties"].items()]


def _key(name: str, entry: Mapping[str, Any], definitions: Mapping[str, Any]) -> Key:
    # an entry's own words are about its key, those of a definition about any value of that kind
    allowed = listed(words(entry, definitions))
    default = entry.get("default")
    written = ""
    if default not in (None, []) and not isinstance(default, dict):
        written = yaml.safe_dump(default, default_flow_style=True, width=1000).partition("\n")[0]
    return Key(name, allowed, written, " ".join(entry.get("description", "").split()))


def train_keys() -> dict[str, list[Key]]:
    """Return this package's keys of a training, in groups by a heading; Ultralytics documents all others."""
    fields = {key.name: key for key in keys_of(TrainKeys)}
    fields["kd"] = Key("kd", "a recipe's name, the path of a recipe, a recipe or none", "default", fields["kd"].meaning)
    texts = [Key(name, allowed, "", OWN_KEYS[name]) for name, allowed in _TEXT_KEYS.items()]
    return {
        "Teacher, student and recipe": [*fields.values(), *texts],
        "Classes": keys_of(ClassOptions),
        "Unlabeled images": keys_of(UnlabeledOptions),
        "Speed": keys_of(Speed),
    }


_TEXT_KEYS = {"kd.<loss>.<key>": "what the key of the loss allows", "cfg": "the path of a YAML file"}


def recipe_keys() -> dict[str, list[Key]]:
    """Return the keys of a recipe, of every loss in it, and of a schedule."""
    return {"Recipe": keys_of(RecipeKeys), "Every loss": keys_of(TermKeys), "Schedule": keys_of(Schedule)}


def loss_keys(loss: type[Loss]) -> list[Key]:
    """Return the keys that a loss does not share with all others: the arguments of its constructor."""
    return [key for key in keys_of(term_model(loss)) if key.name not in TermKeys.model_fields]


def argument_keys(function: Callable[..., Any]) -> list[Key]:
    """Return the keyword arguments of a function as keys, with their meanings from its docstring."""
    documented = meanings(function)
    given = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
    defaults = {p.name: "" if p.default in (None, p.empty) else str(p.default).lower() for p in given}
    return [Key(name, "", default, documented[name]) for name, default in defaults.items()]
