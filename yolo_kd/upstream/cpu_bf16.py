"""bfloat16 training on a CPU, which Ultralytics refuses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from ultralytics.engine import trainer as engine

from yolo_kd.patches import original, replaced


@contextmanager
def cpu_bf16_autocast() -> Iterator[None]:
    """Make the trainer's autocast accept bfloat16 on a CPU, for the duration.

    The function of Ultralytics raises an error there, although processors with AMX or AVX512-BF16 train two to three
    times faster in bfloat16.
    """
    with replaced(engine, "autocast", _autocast):
        yield


def _autocast(enabled: Any, device: str = "cuda") -> Any:
    if enabled is torch.bfloat16 and device == "cpu":
        return torch.autocast("cpu", dtype=torch.bfloat16)
    return original(engine, "autocast")(enabled, device=device)


def is_cpu_bf16(args: Mapping[str, Any], device: str | None = None) -> bool:
    """Return whether the arguments ask for bfloat16 training on the CPU.

    Args:
        args: Ultralytics' training arguments.
        device: Type of the device that was selected; by default it is derived from `args`.
    """
    if str(args.get("amp", "")).lower() != "bf16":
        return False
    on_cpu = str(args.get("device") or "").strip().lower() == "cpu" or not torch.cuda.is_available()
    return device == "cpu" if device is not None else on_cpu
