"""Plugins: modules outside this package whose losses register themselves when they are imported."""

from __future__ import annotations

import importlib
import sys
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field

from yolo_kd.config.validation import STRICT, mistakes


def split_names(value: Any) -> Any:
    """Return `[a, b]` or `a,b`, as a command line has it, as a list; anything else as it is."""
    if not isinstance(value, str):
        return value
    return [name.strip() for name in value.strip().removeprefix("[").removesuffix("]").split(",")]


def _imported(name: str) -> str:
    """Import a module, so that its losses register themselves."""
    if name not in sys.modules:
        from ultralytics.utils import LOGGER

        LOGGER.info(f"Importing plugin {name}")
    try:
        importlib.import_module(name)
    except Exception as error:  # a module may do anything when it is imported
        hint = " Is it installed, or its folder in PYTHONPATH?" if isinstance(error, ImportError) else ""
        sentence = f"plugin '{name}' cannot be imported: {type(error).__name__}: {error}.{hint}"
        raise mistakes([((), sentence)]) from error
    return name


ModuleName = Annotated[str, Field(pattern=r"^[^\W\d]\w*(\.[^\W\d]\w*)*$", title="the name of a module")]
Plugins = Annotated[
    list[Annotated[ModuleName, AfterValidator(_imported)]],
    Field(
        title="a list of names of modules",
        examples=[["my_package.my_loss"]],
        description="Modules to import for losses of your own; importing a module runs its code.",
    ),
]


class PluginKeys(BaseModel):
    """The key `plugins`, of recipes and of trainings."""

    model_config = STRICT

    plugins: Plugins = []
