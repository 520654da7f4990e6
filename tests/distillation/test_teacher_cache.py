"""Teacher views kept on disk."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from yolo_kd.distillation import teacher_cache as view_cache
from yolo_kd.distillation.teacher_cache import ViewCache, check_cacheable
from yolo_kd.errors import ConfigError, DataError
from yolo_kd.structures import DetectorOutputs

NAMES = ["a.jpg", "b.jpg", "c.jpg"]


def make_view(batch: int, seed: int = 0) -> DetectorOutputs:
    rng = torch.Generator().manual_seed(seed)
    features = tuple(torch.rand(batch, c, s, s, generator=rng) for c, s in ((4, 8), (6, 4)))
    scores = torch.rand(batch, 80, 3, generator=rng)
    layers = {"model.3": torch.rand(batch, 2, 8, 8, generator=rng)}
    return DetectorOutputs(features, scores, scores.new_empty(batch, 0, 0), (8, 16), 4, scores + 1, layers)


def test_a_view_comes_back_once_it_is_complete(tmp_path: Path) -> None:
    cache, images = ViewCache(tmp_path / "views", NAMES), torch.zeros(2, 3, 64, 64)
    assert cache.get(NAMES[:2], images) is None
    view = make_view(2)
    cache.put(NAMES[:2], images, view)
    assert cache.get(NAMES[1:], images) is None
    found = cache.get([NAMES[1], NAMES[0]], images)
    assert found is not None
    for ours, theirs in zip(found.features, view.features, strict=True):
        torch.testing.assert_close(ours.float(), theirs.flip(0), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.scores.float(), view.scores.flip(0), rtol=1e-3, atol=1e-3)
    assert view.one2one_scores is not None
    assert found.one2one_scores is not None
    torch.testing.assert_close(found.one2one_scores.float(), view.one2one_scores.flip(0), rtol=1e-3, atol=1e-3)
    assert found.layers.keys() == {"model.3"}
    assert found.boxes.shape == (2, 0, 0)
    assert (found.strides, found.reg_max) == ((8, 16), 4)
    assert {f.name for f in (tmp_path / "views").iterdir()} == {
        "features_0.npy", "features_1.npy", "scores.npy", "one2one.npy", "layer_model_3.npy",
    }  # fmt: skip
    cache.close()
    assert not (tmp_path / "views").exists()


def test_another_size_is_not_kept(tmp_path: Path) -> None:
    cache = ViewCache(tmp_path / "views", NAMES)
    cache.put(NAMES[:1], torch.zeros(1, 3, 64, 64), make_view(1))
    cache.put(NAMES[1:2], torch.zeros(1, 3, 32, 64), make_view(1))
    assert cache.get(NAMES[1:2], torch.zeros(1, 3, 32, 64)) is None
    assert cache.get(NAMES[:1], torch.zeros(1, 3, 32, 64)) is None
    cache.close()


def test_values_that_do_not_fit(tmp_path: Path) -> None:
    view = make_view(1)
    view.features[0][0, 0, 0, 0] = 1e6
    with pytest.raises(DataError, match=r"features 0 hold values outside its range on a\.jpg"):
        ViewCache(tmp_path / "views", NAMES).put(NAMES[:1], torch.zeros(1, 3, 64, 64), view)


def test_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view_cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(DataError, match=r"kd\.cache=disk needs .* for 3 images, but only"):
        ViewCache(tmp_path / "views", NAMES).put(NAMES[:1], torch.zeros(1, 3, 64, 64), make_view(1))


STILL: dict[str, Any] = {**dict.fromkeys(view_cache._RANDOM, 0.0), "augmentations": []}


def test_only_without_random_augmentation() -> None:
    check_cacheable(STILL)
    for key in view_cache._RANDOM:
        with pytest.raises(ConfigError, match=f"{key}=0.5.*{key}=0"):
            check_cacheable({**STILL, key: 0.5})
    with pytest.raises(ConfigError, match="augmentations"):
        check_cacheable({**STILL, "augmentations": [object()]})
