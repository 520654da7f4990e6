"""Keys that make a training faster and change nothing else; each is `auto` unless the user gives a value."""

from __future__ import annotations

import os
from typing import Annotated, Final, Literal

from pydantic import Field, StrictBool
from pydantic.dataclasses import dataclass

from yolo_kd.config.groups import KeyGroup
from yolo_kd.config.validation import CONFIG, Whole

AUTO: Final = "auto"


@dataclass(frozen=True, config=CONFIG)
class Speed(KeyGroup):
    """How a training is made fast. The descriptions of the fields are their documentation."""

    teacher_precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default=AUTO, description="Number format that the teacher computes in."
    )
    teacher_channels_last: Literal["auto"] | StrictBool = Field(
        default=AUTO, description="Memory layout of the teacher's features."
    )
    teacher_compile: Literal["auto"] | StrictBool = Field(
        default=AUTO, description="torch.compile for the teacher; auto follows compile= on a GPU."
    )
    teacher_stream: Literal["auto"] | StrictBool = Field(
        default=AUTO, description="Run the teacher at the same time as the student, in its own CUDA stream."
    )
    threads: Literal["auto"] | Annotated[Whole, Field(ge=1)] = Field(
        default=AUTO, description="Threads on a CPU; auto is OMP_NUM_THREADS if that is set, otherwise all cores."
    )


SPEED_KEYS = Speed.documented()


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def thread_count(threads: int | str) -> int:
    """Return how many threads a training on a CPU uses.

    Ultralytics leaves one core idle. All of them are faster, unless other processes use them; OMP_NUM_THREADS is set
    for that case.

    Args:
        threads: A number, or auto.
    """
    if isinstance(threads, int):
        return threads
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdigit() and int(asked) > 0 else usable_cores()
