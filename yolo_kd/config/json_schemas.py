"""JSON Schemas of recipes and experiment files, with which editors complete and check them; made from the models."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ultralytics.cfg import CFG_BOOL_KEYS, CFG_FLOAT_KEYS, CFG_FRACTION_KEYS, CFG_INT_KEYS, CFG_INT_MIN, CFG_STR_KEYS
from ultralytics.utils import DEFAULT_CFG_DICT

from yolo_kd.config.class_options import ClassOptions
from yolo_kd.config.recipe import RecipeKeys, shipped_recipes
from yolo_kd.config.speed import Speed
from yolo_kd.config.terms import TermKeys, term_model
from yolo_kd.config.train_options import TrainKeys
from yolo_kd.config.ultralytics_keys import FIXED, REPLACED
from yolo_kd.config.unlabeled import UnlabeledOptions
from yolo_kd.config.validation import json_schema
from yolo_kd.losses.base import registered

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_NULL = {"type": "null"}


def recipe_schema() -> dict[str, Any]:
    """Return the JSON Schema of a recipe file, with the keys of every loss that is registered now."""
    schema, definitions = _recipe()
    title = {"$schema": _DIALECT, "title": "yolo-kd recipe"}
    return {**title, **schema, "$defs": definitions}


def experiment_schema() -> dict[str, Any]:
    """Return the JSON Schema of an experiment file: the keys of `yolo-kd train`, Ultralytics' included."""
    recipe, definitions = _recipe()
    definitions = {**definitions, "recipe": recipe}
    properties: dict[str, Any] = dict(json_schema(TrainKeys)["properties"])
    properties["kd"] = {
        "description": properties["kd"]["description"],
        "anyOf": [{"type": "string", "examples": ["none", *shipped_recipes()]}, {"$ref": "#/$defs/recipe"}],
    }
    for group in (ClassOptions, UnlabeledOptions, Speed):
        properties |= json_schema(group)["properties"]
    for name in registered():
        for key, entry in definitions[f"loss_{name}"]["properties"].items():
            properties[f"kd.{name}.{key}"] = entry
        for key in definitions["Schedule"]["properties"]:
            properties[f"kd.{name}.schedule.{key}"] = {"$ref": f"#/$defs/Schedule/properties/{key}"}
    properties |= {key: _ultralytics(key) for key in DEFAULT_CFG_DICT if key not in REPLACED and key not in properties}
    others = "|".join(registered())
    return {
        "$schema": _DIALECT,
        "title": "yolo-kd experiment",
        "type": "object",
        "properties": properties,
        "patternProperties": {rf"^kd\.(?!({others})\.)\w+\..+": {"description": "A value of a plugin's loss."}},
        "additionalProperties": False,
        "$defs": definitions,
    }


def _recipe() -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the schema of a recipe and the definitions that it refers to, the losses among them."""
    shared = json_schema(TermKeys)
    definitions: dict[str, Any] = {key: _brief(entry) for key, entry in shared["$defs"].items()}
    definitions |= {f"every_{key}": entry for key, entry in shared["properties"].items()}
    for name, loss in registered().items():
        term = json_schema(term_model(loss))
        keys = {key: {"$ref": f"#/$defs/every_{key}"} for key in TermKeys.model_fields}
        own = {key: entry for key, entry in term["properties"].items() if key not in keys}
        summary = (inspect.getdoc(loss) or "").partition("\n\n")[0]
        definitions[f"loss_{name}"] = {
            "type": ["object", "null"],
            "description": " ".join(f"{summary} {term['description']}".split()),
            "properties": {**keys, **own},
            "required": term.get("required", []),
            "additionalProperties": False,
        }
    schema = _brief(json_schema(RecipeKeys))
    schema.pop("title", None)
    losses = {name: {"$ref": f"#/$defs/loss_{name}"} for name in registered()}
    schema["properties"]["losses"] |= {"properties": losses, "additionalProperties": {"type": ["object", "null"]}}
    # a plugin brings losses that nobody knows here
    only_known = {"properties": {"losses": {"propertyNames": {"enum": [*losses]}}}}
    return {**schema, "if": {"required": ["plugins"]}, "else": only_known}, definitions


def _brief(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a schema with the first line of its description, which is a docstring."""
    return {**schema, "description": schema.get("description", "").partition("\n")[0]}


def _ultralytics(key: str) -> dict[str, Any]:
    """Return the schema of one of Ultralytics' keys, by the tables that its own checker reads."""
    if key in FIXED:
        return {"const": FIXED[key]}
    default = DEFAULT_CFG_DICT[key]
    number: dict[str, Any] = {"type": "number"}
    entry: dict[str, Any] = {}
    if key in CFG_BOOL_KEYS:
        entry = {"type": "boolean"}
    elif key in CFG_INT_KEYS:
        entry = {"type": "integer"} | ({"minimum": CFG_INT_MIN[key]} if key in CFG_INT_MIN else {})
    elif key in CFG_FLOAT_KEYS:
        entry = number
    elif key in CFG_FRACTION_KEYS and key != "fraction":  # which takes counts and lists as well
        entry = number | {"minimum": 0, "maximum": 1}
    elif key in CFG_STR_KEYS:
        entry = {"type": "string"}
    if entry and (default is None or key == "auto_augment"):
        entry = {"anyOf": [entry, _NULL, {"const": "None"}]}
    return {"description": "A key of Ultralytics, see docs.ultralytics.com/usage/cfg.", "default": default, **entry}


SCHEMAS: dict[str, Callable[[], dict[str, Any]]] = {"recipe": recipe_schema, "experiment": experiment_schema}
