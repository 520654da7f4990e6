"""Ultralytics' keys: types and ranges are its own checker's business, the rest is what it refuses too late or never."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from ultralytics.cfg import check_cfg
from ultralytics.utils import DEFAULT_CFG_DICT

from yolo_kd.errors import did_you_mean, listed

OPTIMIZERS = ("SGD", "MuSGD", "Adam", "Adamax", "AdamW", "NAdam", "RAdam", "RMSProp", "auto")
SMALLEST_IMAGE, LARGEST_IMAGE = 32, 16384  # pixels; the coarsest level of a detector has stride 32
MINIMA = {"workers": 0, "close_mosaic": 0, "box": 0, "cls": 0, "dfl": 0, "warmup_epochs": 0}

REPLACED = {
    "model": "write student= for the model that is trained.",
    "distill_model": "write teacher= with kd=ultralytics, which is the same loss.",
    "dis": "write kd=ultralytics kd.ultralytics.dis=... (with teacher=), which is the same gain.",
}
FIXED = {"task": "detect", "mode": "train"}
PYTHON_KEYS = ("augmentations", "save_dir")  # Ultralytics takes these from Python although its list of keys lacks them


def checked_keys(keys: Mapping[str, Any], others: Iterable[str]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Check keys of a training that are not this package's.

    Args:
        keys: Them.
        others: This package's keys, which an unknown key may be meant for.

    Returns:
        The keys with their values as Ultralytics converts them, and pairs of a key and a sentence for every mistake.
    """
    allowed = [key for key in (*DEFAULT_CFG_DICT, *others) if key not in REPLACED]
    good: dict[str, Any] = {}
    wrong: list[tuple[str, str]] = []
    for key, value in keys.items():
        if key in REPLACED:
            if value is not None:
                wrong.append((key, f"key '{key}' is not used here: {REPLACED[key]}"))
        elif key in FIXED:
            if value not in (None, FIXED[key]):
                sentence = f"{key}={value} is not possible: this program does {key}={FIXED[key]} only. Leave it out."
                wrong.append((key, sentence))
        elif key in DEFAULT_CFG_DICT or key in PYTHON_KEYS:
            good[key], reason = _checked(key, value)
            wrong += [(key, reason)] if reason else []
        else:
            hint = did_you_mean(key[:60], allowed)
            hint = hint or " See 'yolo-kd train --help' for ours and docs.ultralytics.com/usage/cfg for the others."
            wrong.append((key, f"unknown key '{key}'.{hint}"))
    return good, wrong


def _checked(key: str, value: Any) -> tuple[Any, str | None]:
    entry = {key: value}
    try:
        check_cfg(entry)
    except Exception as error:  # it checks some values with comparisons that raise errors of their own
        sentence = " ".join(str(error).split())
        return value, f"{sentence}." if sentence[-1:].isalnum() else sentence
    return entry[key], wrong_value(key, entry[key])


def wrong_value(key: str, value: Any, mode: str = "train") -> str | None:
    """Return what is wrong with a value, as a sentence, or None.

    Args:
        key: One of Ultralytics' keys.
        value: Its value, of a type that Ultralytics accepts.
        mode: `train`, where a batch of -1 or of a fraction means to measure it, or `export`.
    """
    if value is None:
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return f"{key} must be a finite number, received {value}."
    if key == "imgsz":
        return _image_size(value)
    if key == "batch":
        return _batch(value, mode)
    if key == "optimizer" and str(value).lower() not in [name.lower() for name in OPTIMIZERS]:
        return f"optimizer={value} is not known.{did_you_mean(value, OPTIMIZERS)} Allowed: {listed(OPTIMIZERS)}."
    if key == "device":
        return _device(value)
    if key == "freeze":
        layers = value if isinstance(value, list | tuple) else [value]
        if not all(isinstance(n, int | str) and not isinstance(n, bool) for n in layers):
            return f"freeze must be a number of layers or a list of them, such as 10 or [0,1,2], received {value}."
    if key in MINIMA and isinstance(value, int | float) and value < MINIMA[key]:
        return f"{key} must be a number of at least {MINIMA[key]}, received {value}."
    return None


def wrong_values(keys: Mapping[str, Any], mode: str = "train") -> list[str]:
    """Return every sentence of `wrong_value` for a mapping of keys."""
    return [sentence for key, value in keys.items() if (sentence := wrong_value(key, value, mode)) is not None]


def _image_size(value: Any) -> str | None:
    try:  # Ultralytics takes text as well
        size = ast.literal_eval(value) if isinstance(value, str) else value
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        size = None
    sizes = list(size) if isinstance(size, list | tuple) else [size]
    fits = all(type(n) is int and SMALLEST_IMAGE <= n <= LARGEST_IMAGE for n in sizes)
    if fits and 1 <= len(sizes) <= 2:
        return None
    return (
        f"imgsz={value} is not a size that a detector can take. Write pixels from {SMALLEST_IMAGE} to {LARGEST_IMAGE}, "
        f"such as imgsz=640."
    )


def _batch(value: Any, mode: str) -> str | None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and value >= 1 and value == int(value):
        return None
    if mode == "train" and number and (value == -1 or 0 < value < 1):
        return None
    measured = " (or -1, or a fraction of the GPU's memory such as 0.7, to have it measured)" if mode == "train" else ""
    return f"batch must be a whole number of at least 1{measured}, received {value}."


def _device(value: Any) -> str | None:
    """Return why a device cannot be used; what is no CUDA device is left to Ultralytics to know."""
    parts = value if isinstance(value, list | tuple) else str(value).lower().replace("cuda:", "").split(",")
    names = [str(part).strip(" ()[]'") for part in parts]
    names = [name for name in names if name]
    if not names or names[0] in ("cpu", "mps", "cuda", "auto") or ":" in names[0] or names[0] in ("npu", "xpu", "tpu"):
        return None
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    numbers = [int(name) for name in names if name.lstrip("-").isdigit()]
    if len(numbers) == len(names) and all(-1 <= n < count for n in numbers):
        return None
    here = f"device=0{f' to device={count - 1}' if count > 1 else ''}" if count else "no CUDA device"
    return f"device={value} is not here: this torch sees {here}. Write device=cpu, or leave it out to have one chosen."
