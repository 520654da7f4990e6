"""A student between its start and what training made of it."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.models import narrow_model
from yolo_kd.engine.components.weight_blend import Blend, blend_checkpoint
from yolo_kd.upstream.heads import class_rows


def moved(model: Any, seed: int) -> Any:
    """Return a copy of a model with every floating value changed."""
    torch.manual_seed(seed)
    model = deepcopy(model)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(torch.randn_like(tensor))
    return model


@pytest.mark.parametrize("family", ["yolov8n", "yolo26n"])
def test_every_value_goes_a_share_of_its_way_but_new_rows_go_all(family: str, tmp_path: Path) -> None:
    start = narrow_model(family, tmp_path, nc=5)
    trained = moved(start, 1)
    blended = deepcopy(trained)
    Blend.of(start, 0.25).apply(blended, new=(3, 4))
    head = len(start.model) - 1
    ends = [f"model.{head}.{a}.{i}.2." for a in ("cv3", "one2one_cv3") for i in range(3)]
    rows = 0
    starts, ends_at = start.state_dict(), trained.state_dict()
    for name, tensor in blended.state_dict().items():
        before, after = starts[name], ends_at[name]
        expected = before + (after - before) * 0.25 if tensor.is_floating_point() else after
        if any(name.startswith(end) for end in ends):
            rows += 1
            expected[3:] = after[3:]
        torch.testing.assert_close(tensor, expected, msg=name)
    assert rows == len(class_rows(start)) == (12 if family == "yolo26n" else 6)


def test_the_whole_way_is_what_was_trained_and_frozen_tensors_are_not_kept(tmp_path: Path) -> None:
    start = narrow_model("yolov8n", tmp_path, nc=3)
    trained = moved(start, 2)
    blend = Blend.of(start, 1.0, frozen=["model.0.", ".dfl"])
    assert not any(name.startswith("model.0.") or ".dfl" in name for name in blend.start)
    assert any(name.startswith("model.1.") for name in blend.start)
    result = deepcopy(trained)
    blend.apply(result, new=())
    ends_at = trained.state_dict()
    for name, tensor in result.state_dict().items():
        assert torch.equal(tensor, ends_at[name]), name


def test_a_finished_checkpoint_is_not_blended_again(tmp_path: Path) -> None:
    start = narrow_model("yolov8n", tmp_path, nc=3)
    trained = moved(start, 3).half()
    blend = Blend.of(start, 0.5)
    once: dict[str, Any] = {"ema": deepcopy(trained), "model": None}
    blend_checkpoint(once, blend, ())
    weight = "model.0.conv.weight"
    expected = (start.state_dict()[weight] + trained.state_dict()[weight].float()) / 2
    found = once["ema"].state_dict()[weight]
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), expected, rtol=1e-3, atol=1e-3)
    finished = {"model": deepcopy(once["ema"]), "ema": None, "yolo_kd": {}}
    blend_checkpoint(finished, blend, ())
    assert torch.equal(finished["model"].state_dict()[weight], found)
