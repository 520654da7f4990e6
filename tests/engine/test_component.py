"""Hosts and components: the order of calls, the state in the optimiser, and what a component may touch."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.models.yolo.segment import SegmentationTrainer

import yolo_kd.engine.components
from yolo_kd.engine.component import Component, Hosted, carry_state, hooks

FOLDER = Path(yolo_kd.engine.components.__file__).parent
LOG: list[str] = []


class Base:
    """A trainer as far as these tests need one."""

    def __init__(self, cfg: Any, overrides: Any = None, _callbacks: Any = None):
        LOG.append("init")

    def validate(self) -> str:
        LOG.append("validate")
        return "metrics"


class Host(Hosted, Base):
    pass


class Named(Component):
    def __init__(self, name: str):
        super().__init__(None)
        self.name = name

    def init(self, proceed: Callable[[], None]) -> None:
        LOG.append(f"{self.name} before")
        proceed()
        LOG.append(f"{self.name} after")

    def validate(self, proceed: Callable[[], Any]) -> Any:
        return f"{self.name}({proceed()})"


def test_the_first_component_is_outermost() -> None:
    LOG.clear()

    class Two(Host):
        components = (Named("a"), Named("b"))

    host = Two({})
    assert LOG == ["a before", "b before", "init", "b after", "a after"]
    assert host.validate() == "a(b(metrics))"


def test_without_components_a_host_is_its_base() -> None:
    LOG.clear()
    assert Host({}).validate() == "metrics"
    assert LOG == ["init", "validate"]


class Stateful(Component):
    state_key = "some_state"

    def __init__(self, value: int):
        super().__init__(None)
        self.value = value

    def state_dict(self) -> Any:
        return self.value

    def load_state_dict(self, state: Any) -> None:
        self.value = state


def optimizer_with(*components: Component) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(nn.Linear(2, 2).parameters())
    carry_state(optimizer, components)
    return optimizer


def test_state_travels_in_the_optimisers_state_dict() -> None:
    saved = optimizer_with(Stateful(7), Named("none")).state_dict()
    assert saved["some_state"] == 7
    restored = Stateful(0)
    optimizer_with(restored).load_state_dict(saved)
    assert restored.value == 7
    assert "some_state" in saved, "the caller's dictionary stays whole"


def test_a_state_dict_without_that_state_loads_as_ever() -> None:
    plain = torch.optim.AdamW(nn.Linear(2, 2).parameters()).state_dict()
    component = Stateful(3)
    optimizer_with(component).load_state_dict(plain)
    assert component.value == 3


def test_any_trainer_becomes_a_host_in_one_class_line() -> None:
    class Segmentation(Hosted, SegmentationTrainer):
        pass

    for name, function in vars(Hosted).items():
        if inspect.isfunction(function) and hasattr(DetectionTrainer, name) and not name.startswith("__"):
            assert hasattr(SegmentationTrainer, name), name
            assert getattr(Segmentation, name) is function


def test_the_host_calls_every_hook() -> None:
    called = {
        node.args[0].value
        for node in ast.walk(ast.parse(inspect.getsource(Hosted)))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "through"
        if isinstance(node.args[0], ast.Constant)
    }
    assert called <= hooks()


def test_a_misspelt_hook_is_an_error() -> None:
    with pytest.raises(TypeError, match=r"Wrong\.validat wraps no method of a trainer\. Did you mean 'validate'\?"):

        class Wrong(Component):
            def validat(self, proceed: Callable[[], Any]) -> Any:
                return proceed()


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_components_touch_no_private_field_of_another_object(path: Path) -> None:
    found = [
        f"line {node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__")
        if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
    ]
    assert not found, f"{path.name} reads private fields: {'; '.join(found)}"


def test_overrides_are_short() -> None:
    """The trainer's file and the mixin hold overrides; the work is in the components."""
    for function in vars(Hosted).values():
        if inspect.isfunction(function):
            lines = inspect.getsource(function).splitlines()
            body = [line for line in lines if line.strip() and not line.strip().startswith(("#", '"""'))]
            assert len(body) <= 7, function.__name__
