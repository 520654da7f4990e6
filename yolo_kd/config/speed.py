"""Keys that make a training faster and change nothing else; each is `auto` unless the user says otherwise."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from yolo_kd.errors import ConfigError, did_you_mean, listed

AUTO = "auto"
CACHE_KEY = "kd.cache"

SPEED_KEYS: dict[str, str] = {
    "teacher_precision": "auto, fp32, bf16 or fp16: what the teacher computes in",
    "teacher_channels_last": "auto, true or false: memory layout of the teacher's feature maps",
    "teacher_compile": "auto, true or false: torch.compile for the teacher; auto follows compile= on a GPU",
    "teacher_stream": "auto, true or false: run the teacher beside the student in a CUDA stream of its own",
    "threads": "auto, or the number of threads on a CPU; auto is OMP_NUM_THREADS if that is set, otherwise all cores",
    CACHE_KEY: "disk: keep the teacher's views of all images, for trainings without random augmentation",
}

_CHOICES: dict[str, tuple[Any, ...]] = {
    "teacher_precision": (AUTO, "fp32", "bf16", "fp16"),
    "teacher_channels_last": (AUTO, True, False),
    "teacher_compile": (AUTO, True, False),
    "teacher_stream": (AUTO, True, False),
    CACHE_KEY: ("disk", False),
}


@dataclass(frozen=True)
class Speed:
    """How a training is made fast.

    Attributes:
        teacher_precision: auto, fp32, bf16 or fp16.
        teacher_channels_last: auto, or whether the teacher's maps are laid out channels-last.
        teacher_compile: auto, or whether the teacher goes through `torch.compile`.
        teacher_stream: auto, or whether the teacher has a CUDA stream of its own.
        threads: auto, or the number of threads on a CPU.
        cache: "disk" to keep the teacher's views, otherwise False.
    """

    teacher_precision: str = AUTO
    teacher_channels_last: bool | str = AUTO
    teacher_compile: bool | str = AUTO
    teacher_stream: bool | str = AUTO
    threads: int | str = AUTO
    cache: str | bool = False

    @classmethod
    def of(cls, keys: Mapping[str, Any]) -> Speed:
        """Read the keys of `SPEED_KEYS`; those that are missing or None stay at their defaults.

        Raises:
            ConfigError: With one sentence for every value that is not allowed.
        """
        given = {k: keys[k] for k in SPEED_KEYS if keys.get(k) is not None}
        if problems := [m for k, v in given.items() if (m := mistake(k, v))]:
            raise ConfigError(problems)
        return cls(**{k.removeprefix("kd."): v for k, v in given.items()})

    def to_keys(self) -> dict[str, Any]:
        """Return the mapping that `of` reads."""
        return {CACHE_KEY if k == "cache" else k: v for k, v in asdict(self).items()}


def mistake(key: str, value: Any) -> str | None:
    """Return what is wrong with the value of one of `SPEED_KEYS`, None if nothing is."""
    if key == "threads":
        if value == AUTO or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
            return None
        return f"threads must be auto or a whole number of at least 1, received {value!r}."
    choices = _CHOICES[key]
    if any(value is c or (isinstance(c, str) and value == c) for c in choices):
        return None
    words = [str(c).lower() if isinstance(c, bool) else c for c in choices]
    return f"{key} must be {listed(words)}, received {value!r}.{did_you_mean(value, words)}"


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def thread_count(threads: int | str) -> int:
    """Return how many threads a training on a CPU uses.

    Ultralytics leaves one core idle. All of them are faster, unless other processes use them, which is what
    OMP_NUM_THREADS is set for.

    Args:
        threads: A number, or auto.
    """
    if isinstance(threads, int):
        return threads
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdigit() and int(asked) > 0 else usable_cores()
