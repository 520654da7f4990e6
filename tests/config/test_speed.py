"""Keys that make a training faster."""

from __future__ import annotations

import os

import pytest

from yolo_kd.config.speed import SPEED_KEYS, Speed, thread_count, usable_cores
from yolo_kd.errors import ConfigError


def test_round_trip() -> None:
    keys = {"teacher_precision": "bf16", "threads": 3, "teacher_compile": True}
    speed = Speed.of({**keys, "teacher_stream": None, "epochs": 3})
    assert speed == Speed(teacher_precision="bf16", threads=3, teacher_compile=True)
    assert speed.to_keys().keys() == SPEED_KEYS.keys()
    assert Speed.of(speed.to_keys()) == speed
    assert Speed.of({}) == Speed()


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("teacher_precision", "bf61", "must be auto, fp32, bf16 or fp16, received 'bf61'. Did you mean 'bf16'?"),
        ("teacher_precision", True, "received True"),
        ("teacher_compile", 1, "must be auto, true or false, received 1."),
        ("teacher_stream", "yes", "must be auto, true or false"),
        ("threads", 0, "a whole number of at least 1, received 0"),
        ("threads", True, "received True"),
        ("threads", "all", "received 'all'"),
    ],
)
def test_mistakes(key: str, value: object, sentence: str) -> None:
    with pytest.raises(ConfigError, match=key) as error:
        Speed.of({key: value})
    assert sentence in str(error.value)


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert thread_count("auto") == usable_cores() <= (os.cpu_count() or 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert thread_count("auto") == 1
    assert thread_count(3) == 3
