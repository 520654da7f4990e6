"""Every error this package raises on purpose.

YoloKDError
├── ConfigError        a key, value, recipe or experiment file that the user wrote
├── CheckpointError    a model file that is missing, damaged, unsafe or of another kind
├── PairError          a teacher and a student (or a data set) that do not fit each other
├── DataError          a data set that cannot be trained or validated on
├── SetupError         an installation or a processor that cannot do what was asked
├── SaveError          a file of the run could not be written while it ran
├── AuditError         distillation was asked for but is not happening
├── NumbersError       NaN or infinity that training cannot get around
└── ParityError        an exported file does not compute what its checkpoint computes

The command line prints the message without a traceback and exits with `exit_code`: 2 where the user can fix the
command, 1 where the command was right and the result is not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class YoloKDError(Exception):
    """Base class: a sentence for the user and the exit code of the command that met it."""

    exit_code = 2


class ConfigError(YoloKDError):
    """Mistakes in what the user wrote, all of them at once.

    Args:
        problems: One sentence, or one per mistake.
    """

    def __init__(self, problems: str | Iterable[str]):
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class CheckpointError(YoloKDError):
    """A model file is missing, damaged, unsafe to load, or not the kind of model that is needed."""


class PairError(YoloKDError):
    """Teacher and student, or teacher and data set, do not fit each other."""


class DataError(YoloKDError):
    """The data set is missing, or lacks what training needs."""


class SetupError(YoloKDError):
    """The installation or the processor cannot do what was asked."""


class SaveError(YoloKDError):
    """A file of the run could not be written; what was written before is whole."""

    exit_code = 1


class AuditError(YoloKDError):
    """Distillation was asked for, but a term or the teacher is not doing its work."""

    exit_code = 1


class NumbersError(YoloKDError):
    """The teacher, a term or the weights are NaN or infinite, and leaving out a batch does not help."""

    exit_code = 1


class ParityError(YoloKDError):
    """An exported model computes something else than the checkpoint it came from."""

    exit_code = 1


def did_you_mean(word: object, allowed: Iterable[str], *, cutoff: float = 0.6) -> str:
    """Return `" Did you mean 'x'?"` for the closest allowed word, or an empty string when none is close."""
    close = get_close_matches(str(word), list(allowed), n=1, cutoff=cutoff)
    return f" Did you mean '{close[0]}'?" if close else ""


def listed(words: Sequence[object]) -> str:
    """Return `a, b or c` for use in a sentence."""
    names = [str(w) for w in words]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}" if names else "nothing"


def first_line(error: Exception) -> str:
    """Return the first line of a message as the middle of a sentence: no signs in front, no full stop at its end."""
    text = re.sub(r"^(ERROR)?\W*", "", str(error).strip().partition("\n")[0])
    return text[:160].rstrip(". ") or type(error).__name__
