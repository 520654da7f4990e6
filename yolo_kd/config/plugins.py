"""Plugins: modules outside this package whose losses register themselves when they are imported."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from yolo_kd.config.source import Item, problem, raise_if, shown, wrap


def import_plugins(names: Any) -> tuple[str, ...]:
    """Import modules that were named beside the recipe, so that their losses register themselves.

    Args:
        names: Module names, or one as text with commas, None for none.

    Returns:
        The names.

    Raises:
        ConfigError: If one is no name or cannot be imported.
    """
    problems: list[str] = []
    imported = read_plugins(wrap(split_names(names), "plugins", problems), problems)
    raise_if(problems)
    return imported


def split_names(value: Any) -> Any:
    """Return `[a, b]` or `a,b`, as a command line has it, as a list; anything else as it is."""
    if not isinstance(value, str):
        return value
    return [name.strip() for name in value.strip().removeprefix("[").removesuffix("]").split(",")]


def read_plugins(item: Item | None, problems: list[str]) -> tuple[str, ...]:
    """Do the work of `import_plugins` for an item that knows where it was written; every import is logged."""
    if item is None or item.value is None:
        return ()
    if not isinstance(item.value, list):
        sentence = f"plugins must be a list of module names such as [my_package.my_loss], received {shown(item)}."
        problems.append(problem(item.where, sentence))
        return ()
    for entry in item.value:
        if not isinstance(entry.value, str) or not all(part.isidentifier() for part in entry.value.split(".")):
            problems.append(problem(entry.where, f"a plugin must be the name of a module, received {shown(entry)}."))
            continue
        if entry.value not in sys.modules:
            from ultralytics.utils import LOGGER

            LOGGER.info(f"Importing plugin {entry.value}" + (f", named in {entry.where}" if entry.where else ""))
        try:
            importlib.import_module(entry.value)
        except Exception as error:  # whatever the module does when it is imported
            reason = f"{type(error).__name__}: {error}"
            hint = " Is it installed, or its folder in PYTHONPATH?" if isinstance(error, ImportError) else ""
            problems.append(problem(entry.where, f"plugin '{entry.value}' cannot be imported: {reason}.{hint}"))
    return tuple(entry.value for entry in item.value if isinstance(entry.value, str))
