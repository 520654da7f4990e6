"""Class names: normalised spelling, meaningless names, and short lists of names for messages."""

from __future__ import annotations

import re
from collections.abc import Sequence

_PLACEHOLDER = re.compile(r"(class|cls|category|label|object|obj|item|id)?\d+|item")


def normalised(name: str) -> str:
    """Return a class name without case, spaces and punctuation; a name of punctuation only keeps it."""
    plain = folded(name)
    return re.sub(r"[\W_]+", "", plain) or plain


def folded(name: str) -> str:
    """Return a class name without case and surrounding spaces."""
    return str(name).strip().casefold()


def is_placeholder(name: str) -> bool:
    """Return whether a name is meaningless: a number, `class0`, or the `item` of `single_cls`."""
    return _PLACEHOLDER.fullmatch(normalised(name)) is not None


def short(names: Sequence[str], limit: int = 4) -> str:
    """Return the first names of a list, and the number of further names."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{', '.join(str(n)[:40] for n in names[:limit])}{more}"
