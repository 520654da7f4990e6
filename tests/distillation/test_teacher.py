"""The teacher's fast ways against the plain model."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from ultralytics.nn.tasks import DetectionModel

from tests.support.models import narrow_model
from yolo_kd.config.speed import Speed
from yolo_kd.distillation import teacher as module
from yolo_kd.distillation import teacher_runner
from yolo_kd.distillation.teacher import EXACT, Teacher
from yolo_kd.distillation.teacher_runner import Way, largest_difference, ways
from yolo_kd.environment import cpu_has_bf16
from yolo_kd.safe_loading.checkpoint import LoadedDetector

CPU = torch.device("cpu")
IMAGES = torch.rand(5, 3, 64, 96, generator=torch.Generator().manual_seed(0))
HALF_HERE = ["bf16"] if cpu_has_bf16() else []


@pytest.fixture(scope="module", params=["yolov8n", "yolo26n"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DetectionModel:
    return narrow_model(request.param, tmp_path_factory.mktemp("model"), seed=3).eval()


def make(model: nn.Module, speed: Speed = EXACT, on_settled: Any = None, **keys: Any) -> Teacher:
    teacher = Teacher(LoadedDetector(model, {}, Path("teacher.pt"), ""), CPU, speed, **keys)
    teacher.on_settled = on_settled or teacher.on_settled
    return teacher


def raw(model: nn.Module) -> dict:
    with torch.no_grad():
        return model(IMAGES)[1]


@pytest.mark.parametrize("reads", [{"features"}, {"scores"}, {"boxes", "scores"}, {"scores", "one2one"}])
def test_only_what_is_read_is_computed(model: DetectionModel, reads: set[str]) -> None:
    frozen = make(model, reads=reads)
    frozen(IMAGES)
    head = frozen.runner.model.model[-1]
    ran: set[str] = set()
    for name, branch in (("boxes", head.cv2), ("scores", head.cv3), ("one2one", getattr(head, "one2one_cv3", None))):
        if branch is not None:
            branch[0].register_forward_hook(lambda *_, name=name: ran.add(name))
    view = frozen(IMAGES)
    has_two = getattr(head, "one2one_cv3", None) is not None
    assert ran == reads - {"features"} - (set() if has_two else {"one2one"})
    expected = raw(model)
    main = expected.get("one2many", expected)
    for name in ("scores", "boxes"):
        tensor = getattr(view, name)
        if name in reads:
            torch.testing.assert_close(tensor, main[name].transpose(1, 2), rtol=1e-4, atol=1e-4)
        else:
            assert tensor.shape == (5, 0, 0)
    for ours, theirs in zip(view.features, main["feats"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    if has_two and "one2one" in reads:
        torch.testing.assert_close(
            view.one2one_scores, expected["one2one"]["scores"].transpose(1, 2), rtol=1e-4, atol=1e-4
        )
    frozen.close()
    assert "forward" not in vars(head)


def test_a_layer_inside_the_head_runs_the_head(model: DetectionModel) -> None:
    view = make(model, reads={"features"}, head_split=True)(IMAGES)
    assert {"cls0", "box2"} <= view.layers.keys()
    assert view.scores.shape[1] == view.boxes.shape[1] > 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("channels_last", [True, False])
def test_what_is_asked_for_is_what_runs(model: DetectionModel, precision: str, channels_last: bool) -> None:
    said: list[str] = []
    speed = Speed(teacher_precision=precision, teacher_channels_last=channels_last)
    frozen = make(model, speed, on_settled=said.append)
    view = frozen(IMAGES)
    assert frozen.runner.way == Way(precision, channels_last)
    assert view.features[0].dtype == teacher_runner.PRECISIONS[precision]
    assert view.features[0].is_contiguous(memory_format=torch.channels_last) or not channels_last
    assert frozen.difference <= {"fp32": 1e-4, "bf16": 0.05}[precision]
    assert len(said) == 1
    assert precision in said[0]


def test_float16() -> None:
    frozen = make(ordinary(), Speed(teacher_precision="fp16"))
    assert frozen(IMAGES).features[0].dtype == torch.float16
    assert 0 < frozen.difference <= 0.05


def test_the_choice_is_the_fastest_by_measurement(model: DetectionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_runner, "cpu_has_bf16", lambda: True)
    seconds = {Way("bf16", True): 0.20, Way("fp32", True): 0.9, Way("fp32", False): 0.10}
    monkeypatch.setattr(module.Runner, "seconds", lambda self, _images: seconds[self.way])
    frozen = make(model, Speed())
    frozen(IMAGES)
    assert frozen.runner.way == Way("fp32", False)


def test_a_small_gain_does_not_change_the_order(model: DetectionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ways that are as fast as each other must not alternate from run to run."""
    monkeypatch.setattr(teacher_runner, "cpu_has_bf16", lambda: False)
    seconds = {Way("fp32", True): 0.100, Way("fp32", False): 0.080}
    monkeypatch.setattr(module.Runner, "seconds", lambda self, _images: seconds[self.way])
    frozen = make(model, Speed())
    frozen(IMAGES)
    assert frozen.runner.way == Way("fp32", True)


def test_a_way_that_is_too_far_off_is_passed_over(model: DetectionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOLERANCE", 1e-3)
    said: list[str] = []
    frozen = make(model, Speed(teacher_precision="bf16"), on_settled=said.append)
    assert frozen(IMAGES).features[0].dtype == torch.float32
    assert "bf16, channels-last differs by" in said[0]
    assert "not used" in said[0]


def test_a_teacher_of_nan_is_left_to_the_guard(model: DetectionModel) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        next(broken.parameters()).fill_(torch.nan)
    frozen = make(broken, Speed())
    assert frozen(IMAGES).scores.isnan().any()
    assert frozen.runner.way.precision == "fp32"


def test_ways() -> None:
    layouts = [Way("fp32", True), Way("fp32", False)]
    assert ways(Speed(), CPU) == [Way(p, True) for p in HALF_HERE] + layouts
    assert ways(Speed(teacher_precision="fp32"), CPU) == layouts
    assert ways(Speed(teacher_channels_last=False), CPU) == [Way(p, False) for p in [*HALF_HERE, "fp32"]]
    assert [w.precision for w in ways(Speed(), torch.device("cuda"))] == ["fp16", "bf16", "fp32", "fp32"]


def test_compiled_where_the_shape_fits(model: DetectionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last batch and multi-scale have other shapes and go the eager way."""
    seen: list[torch.Size] = []

    class Compiled(nn.Module):
        def __init__(self, target: nn.Module, **_keys: Any):
            super().__init__()
            self.target = target

        def forward(self, images: torch.Tensor) -> Any:
            seen.append(images.shape)
            return self.target(images)

        def __len__(self) -> int:  # as torch's own, which cannot be asked whether it is true
            raise TypeError("no len()")

    monkeypatch.setattr(torch, "compile", Compiled)
    said: list[str] = []
    frozen = make(model, Speed(teacher_precision="fp32", teacher_compile=True), on_settled=said.append)
    eager = make(model)
    whole = frozen(IMAGES)
    assert "compiled" in said[0]
    assert seen == [IMAGES.shape] * 2  # once to compare, once to run
    part = frozen(IMAGES[:3])
    assert len(seen) == 2
    assert largest_difference(whole, eager(IMAGES)) < 1e-5
    assert largest_difference(part, eager(IMAGES[:3])) < 1e-5


def test_a_failing_compiler_leaves_the_eager_model(model: DetectionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def compiler(_target: nn.Module, **_keys: Any) -> Any:
        def run(_images: torch.Tensor) -> Any:
            raise RuntimeError("no compiler was found\nmore")

        return run

    monkeypatch.setattr(torch, "compile", compiler)
    said: list[str] = []
    frozen = make(model, Speed(teacher_precision="fp32", teacher_compile=True), on_settled=said.append)
    assert frozen(IMAGES).scores.isfinite().all()
    assert "eager, as it could not be compiled: no compiler was found" in said[0]


def test_a_difference_that_is_not_a_number_is_not_small() -> None:
    view = make(ordinary())(IMAGES)
    broken = make(ordinary())(IMAGES)
    broken.features[0][0, 0, 0, 0] = torch.nan
    assert largest_difference(broken, view) == math.inf
    assert largest_difference(view, view) == 0.0


def ordinary() -> DetectionModel:
    """Return a model whose activations are of the usual size: its normalisation knows its inputs."""
    torch.manual_seed(0)
    model = DetectionModel("yolov8n.yaml", nc=2, verbose=False).train()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    with torch.no_grad():
        model(IMAGES)
    return model.eval()
