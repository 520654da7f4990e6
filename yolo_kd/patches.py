"""Temporary replacement of functions that belong to other packages, Ultralytics above all.

This module is the only place where `yolo_kd` does so. A replacement is in force in the whole process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import RLock
from typing import Any

_INHERITED = object()


@dataclass
class _Patch:
    """The replacements of one attribute.

    Attributes:
        original: Its value without replacements.
        stored: The value to set at the end, `_INHERITED` if the owner inherits the attribute from a class.
        replacements: The replacement of each holder, the newest last.
    """

    original: Any
    stored: Any
    replacements: dict[object, Any] = field(default_factory=dict)


_lock = RLock()
_patches: dict[tuple[int, str], _Patch] = {}


@contextmanager
def replaced(owner: Any, name: str, replacement: Any) -> Iterator[Any]:
    """Replace an attribute of a module, class or object for the duration.

    Replacements nest, and the newest one is in force. Holders may leave in any order, from any thread; the attribute is
    restored when the last one has left.

    Args:
        owner: Module, class or object.
        name: Attribute of `owner`; it must exist, and may be inherited.
        replacement: The new value. A replacement that calls what it replaces takes it from `original`, or from the
            attribute itself if it is to call an older replacement.

    Yields:
        The value without replacements.

    Raises:
        AttributeError: If `owner` has no such attribute, for example because Ultralytics has moved it.
    """
    key, holder = (id(owner), name), object()
    with _lock:
        patch = _patches.get(key) or _Patch(getattr(owner, name), _stored(owner, name))
        setattr(owner, name, replacement)
        _patches[key] = patch
        patch.replacements[holder] = replacement
    try:
        yield patch.original
    finally:
        with _lock:
            del patch.replacements[holder]
            if patch.replacements:
                setattr(owner, name, next(reversed(patch.replacements.values())))
            else:
                del _patches[key]
                if patch.stored is _INHERITED:
                    delattr(owner, name)
                else:
                    setattr(owner, name, patch.stored)


def original(owner: Any, name: str) -> Any:
    """Return the value that an attribute has without replacements.

    Raises:
        AttributeError: If `owner` has no such attribute.
    """
    with _lock:
        patch = _patches.get((id(owner), name))
        return getattr(owner, name) if patch is None else patch.original


def _stored(owner: Any, name: str) -> Any:
    """Return what the owner itself stores: a class stores a static method as a wrapper, not as the function."""
    if name in vars(owner):
        return vars(owner)[name]
    classes = owner.__mro__ if isinstance(owner, type) else type(owner).__mro__
    return _INHERITED if any(name in vars(c) for c in classes) else getattr(owner, name)
