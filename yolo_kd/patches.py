"""Replacing a function of another package for a while: the one way in which this package does it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import RLock
from typing import Any


@dataclass
class _Patch:
    """The original of an attribute, and the replacements in force, the newest last."""

    original: Any
    replacements: list[Any] = field(default_factory=list)


_lock = RLock()
_patches: dict[tuple[int, str], _Patch] = {}


@contextmanager
def replaced(owner: Any, name: str, replacement: Any) -> Iterator[Any]:
    """Replace an attribute of a module, class or object for the duration.

    Replacements nest: the newest one is in force. Two holders of the same replacement, in two threads for example, may
    leave in any order; the attribute is restored when the last holder has left.

    Args:
        owner: Module, class or object.
        name: Attribute of `owner`; it must exist.
        replacement: The new value. Pass the same object again to share a replacement between holders.

    Yields:
        The original value, from before any replacement.

    Raises:
        AttributeError: If `owner` has no such attribute, for example since Ultralytics moved it.
    """
    key = (id(owner), name)
    with _lock:
        patch = _patches.setdefault(key, _Patch(getattr(owner, name)))
        patch.replacements.append(replacement)
        setattr(owner, name, replacement)
    try:
        yield patch.original
    finally:
        with _lock:
            patch.replacements.remove(replacement)
            setattr(owner, name, patch.replacements[-1] if patch.replacements else patch.original)
            if not patch.replacements:
                del _patches[key]


def original(owner: Any, name: str) -> Any:
    """Return the value that an attribute has without our replacements."""
    patch = _patches.get((id(owner), name))
    return getattr(owner, name) if patch is None else patch.original
