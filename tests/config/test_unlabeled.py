"""Keys of the pool: values, defaults, what they share a batch into."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from yolo_kd.config.train_options import parse_train
from yolo_kd.config.unlabeled import UNLABELED_KEYS, UnlabeledOptions
from yolo_kd.errors import ConfigError
from yolo_kd.unlabeled.dataset import share_of_batch

REST = ["teacher=a.pt", "student=b.pt", "data=c.yaml"]


def test_defaults() -> None:
    pool = UnlabeledOptions.of({"unlabeled": "images"})
    assert pool == UnlabeledOptions(("images",), 1.0, "distill", 0.4, 0.1, 0.7)
    assert pool.to_keys().keys() == UNLABELED_KEYS.keys()
    assert UnlabeledOptions.of(pool.to_keys()) == pool


@pytest.mark.parametrize("keys", [{}, {"unlabeled": None}, {"unlabeled": "images", "unlabeled_ratio": 0}])
def test_no_pool(keys: dict) -> None:
    assert UnlabeledOptions.of(keys) is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("unlabeled", 3),
        ("unlabeled", []),
        ("unlabeled", ""),
        ("unlabeled_ratio", -0.1),
        ("unlabeled_ratio", math.nan),
        ("unlabeled_ratio", math.inf),
        ("unlabeled_ratio", True),
        ("unlabeled_ratio", "1"),
        ("unlabeled_mode", "labels"),
        ("unlabeled_mode", 1),
        ("unlabeled_conf", 0),
        ("unlabeled_conf", 1),
        ("unlabeled_low", -1),
        ("unlabeled_iou", math.nan),
    ],
)
def test_wrong_values_are_named(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{key} must be"):
        UnlabeledOptions.of({"unlabeled": "images", key: value})


def test_a_wrong_place_in_a_list_is_named() -> None:
    with pytest.raises(ConfigError, match=r"unlabeled\[1\] must be text, received 3"):
        UnlabeledOptions.of({"unlabeled": ["images", 3]})


def test_all_mistakes_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        UnlabeledOptions.of({"unlabeled_mode": "x", "unlabeled_iou": 2})
    assert len(error.value.problems) == 3


def test_modes() -> None:
    found = {
        mode: UnlabeledOptions.of({"unlabeled": "i", "unlabeled_mode": mode}) for mode in ("distill", "pseudo", "both")
    }
    assert {m: (p.distils, p.labels) for m, p in found.items() if p} == {
        "distill": (True, False),
        "pseudo": (False, True),
        "both": (True, True),
    }


@pytest.mark.parametrize(
    ("batch", "ratio", "pool"),
    [(16, 1, 8), (16, 3, 12), (16, 0.5, 5), (5, 1, 2), (2, 1, 1), (2, 100, 1), (8, 0.01, 1), (8, 1000, 7), (3, 1, 2)],
)
def test_share_of_a_batch(batch: int, ratio: float, pool: int) -> None:
    assert share_of_batch(batch, ratio) == pool


def test_paths_on_the_command_line() -> None:
    def given(text: str) -> Any:
        return parse_train([*REST, f"unlabeled={text}"]).to_keys()["unlabeled"]

    assert given("some, folder") == ["some, folder"]
    assert given("[a, 'b c']") == ["a", "b c"]
    assert given("007") == ["007"]


def test_an_experiment_file_names_them(tmp_path: Path) -> None:
    file = tmp_path / "cfg.yaml"
    file.write_text("teacher: a.pt\nstudent: b.pt\ndata: c.yaml\nunlabeled: [x, y]\nunlabeled_ratio: 2\n")
    options = parse_train([f"cfg={file}", "unlabeled_ratio=3"])
    assert options.unlabeled == UnlabeledOptions(("x", "y"), ratio=3)
    assert options.to_keys()["unlabeled"] == ["x", "y"]
    file.write_text("teacher: a.pt\nstudent: b.pt\ndata: c.yaml\nunlabeled: x\nunlabeled_mode: all\n")
    with pytest.raises(ConfigError, match=r"cfg\.yaml:5: unlabeled_mode must be distill, pseudo or both"):
        parse_train([f"cfg={file}"])
