"""Training in several processes without the search for unused parameters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from ultralytics.cfg import get_cfg

from tests.support.models import FAMILIES, narrow_model
from yolo_kd.distillation.criterion import touch
from yolo_kd.upstream.ddp import reaches_every_parameter, without_search

IMAGES = torch.zeros(2, 3, 64, 64)


@pytest.mark.parametrize("family", FAMILIES)
def test_detectors_use_all_their_parameters(family: str, tmp_path: Path) -> None:
    model = narrow_model(family, tmp_path)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert reaches_every_parameter(model, IMAGES, [".dfl"])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_parameter_that_nothing_reaches(tmp_path: Path) -> None:
    model = narrow_model("yolov8n", tmp_path)
    model.model[0].spare = nn.Parameter(torch.ones(1))
    assert not reaches_every_parameter(model, IMAGES, [".dfl"])
    assert reaches_every_parameter(model, IMAGES, [".dfl", "spare"])


def test_without_objects_the_box_outputs_take_part(tmp_path: Path) -> None:
    model = narrow_model("yolov8n", tmp_path).train()
    model.args = get_cfg()
    empty = {"img": IMAGES, "bboxes": torch.zeros(0, 4), "cls": torch.zeros(0, 1), "batch_idx": torch.zeros(0)}
    predictions = model(IMAGES)
    loss, _ = model.init_criterion()(predictions, empty)
    touched = touch(loss, predictions)
    assert torch.equal(touched, loss)
    assert torch.autograd.grad(touched.sum(), predictions["boxes"])[0].abs().max() == 0


def test_the_wrapper_is_told_only_where_it_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module, find_unused_parameters: bool):
            super().__init__()
            self.searches = find_unused_parameters

    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", Wrapper)
    for allowed in (True, False):
        with without_search(lambda _, allowed=allowed: allowed):
            made = nn.parallel.DistributedDataParallel(nn.Linear(1, 1), find_unused_parameters=True)
        assert made.searches is not allowed
        assert isinstance(made, Wrapper)
        assert nn.parallel.DistributedDataParallel is Wrapper
