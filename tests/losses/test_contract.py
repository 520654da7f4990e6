"""Every registered loss keeps the contract of `tests/support/loss_contract.py`."""

from __future__ import annotations

import pytest
import torch

import yolo_kd.losses  # noqa: F401  (registers the losses that ship with the package)
from tests.support import loss_contract as contract
from yolo_kd.losses.base import Loss, parameters, registered
from yolo_kd.losses.kernels.ops import categorical_kl, same_shape

LOSSES = registered()

every_loss = pytest.mark.parametrize("name", LOSSES)


def run(check: str, name: str, *args: object) -> None:
    """Run one check on one loss, unless the loss declares itself exempt."""
    cls = LOSSES[name]
    if reason := contract.facts(cls).exempt.get(check):
        pytest.skip(reason)
    getattr(contract, f"check_{check}")(cls, *args)


@every_loss
@pytest.mark.parametrize(
    "check",
    [
        "columns",
        "minimum",
        "one_class",
        "gradient",
        "self_trained",
        "reads",
        "gradcheck",
        "autocast",
        "duplication",
        "shapes",
        "state",
        "waits_for_nothing",
    ],
)
def test_contract(check, name):
    run(check, name)


@every_loss
@pytest.mark.parametrize("edge", contract.EDGES)
def test_finite(edge, name):
    run("finite", name, edge)


@every_loss
@pytest.mark.parametrize(("student", "teacher"), [(8, 1), (1, 8), (1, 1), (8, 4)])
def test_bins(student, teacher, name):
    run("bins", name, student, teacher)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision(dtype, name):
    run("half_precision", name, dtype)


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, cls in LOSSES.items() for key in parameters(cls)])
def test_key(name, key):
    run("key", name, key)


@every_loss
def test_facts_speak_of_existing_checks_and_keys(name):
    """A renamed check or key leaves no stale exemption."""
    declared = contract.facts(LOSSES[name])
    assert {f"check_{check}" for check in declared.exempt} <= set(dir(contract))
    assert declared.values.keys() | declared.context.keys() <= parameters(LOSSES[name]).keys()


class Sound(Loss):
    """A loss that keeps the contract; without a name it is not registered. Each class below breaks it in one way."""

    columns = ("sound_loss",)
    reads = frozenset({"features", "scores"})
    adapter = "conv1x1"

    def __init__(self, *, gain: float = 1.0):
        super().__init__()
        self.gain = gain

    def forward(self, inputs):
        s, t = inputs.student.scores.float(), inputs.teacher.scores.detach().float()
        same_shape(student=s, teacher=t)
        terms = [self.reduce(s, t)]
        for i in range(len(inputs.student.features)):
            terms.append(self.reduce(inputs.aligned("conv1x1", i), inputs.teacher_feature(i)))
        return {"sound_loss": self.gain * torch.stack(terms).sum()}

    def reduce(self, s, t):
        return (s - t).square().mean()


class SumsOverBatch(Sound):
    def reduce(self, s, t):
        return super().reduce(s, t) * len(s)


class Broadcasts(Sound):
    def reduce(self, s, t):
        return (s[:, :1].mean() - t[:, :1]).square().mean()


class IgnoresKey(Sound):
    def forward(self, inputs):
        self.gain = 1.0
        return super().forward(inputs)


class TrainsTeacher(Sound):
    def forward(self, inputs):
        return {"sound_loss": super().forward(inputs)["sound_loss"] + 1e-3 * inputs.teacher.boxes.square().mean()}


class DividesByObjects(Sound):
    def forward(self, inputs):
        return {"sound_loss": super().forward(inputs)["sound_loss"] / inputs.targets.assignment.foreground.sum()}


class SoftmaxOverClasses(Sound):
    def forward(self, inputs):
        kl = categorical_kl(inputs.student.scores.float(), inputs.teacher.scores.float()).mean()
        return {"sound_loss": kl}


class HalfPrecision(Sound):
    def forward(self, inputs):
        error = (inputs.student.scores - inputs.teacher.scores.detach()).square().mean()
        return {"sound_loss": error.float()}


class WrongGradient(Sound):
    def reduce(self, s, t):
        return ((s - t).square() * (s - t).abs().detach()).mean()


class OutOfGraph(Sound):
    def forward(self, inputs):
        if not len(inputs.targets.boxes):
            return {"sound_loss": torch.tensor(0.0)}
        return super().forward(inputs)


class SkipsLevel(Sound):
    def forward(self, inputs):
        return {"sound_loss": self.reduce(inputs.aligned("conv1x1", 0), inputs.teacher_feature(0))}


class NeverZero(Sound):
    def reduce(self, s, t):
        return super().reduce(s, t) + s.square().mean()


class Drifts(Sound):
    def forward(self, inputs):
        self.gain *= 1.1
        return super().forward(inputs)


class UndeclaredRead(Sound):
    reads = frozenset({"features"})


class FixedPrecision(Sound):
    class Square(torch.autograd.Function):  # noqa: D106
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return (x.flatten(1) ** 2).sum(1)

        @staticmethod
        def backward(ctx, gradient):
            (x,) = ctx.saved_tensors
            product = torch.empty(len(x), x[0].numel())
            torch.mm(2 * torch.diag(gradient), x.flatten(1) @ torch.eye(x[0].numel()), out=product)
            return product.view_as(x)

    def reduce(self, s, t):
        return self.Square.apply(s - t).mean()


class UndeclaredTeacher(Sound):
    def forward(self, inputs):
        return {"sound_loss": super().forward(inputs)["sound_loss"] * (1 + inputs.teacher.boxes.mean())}


class UntrainedModule(Sound):
    def build(self, pair):
        self.spare = torch.nn.Linear(2, 2)


BROKEN = {
    SumsOverBatch: ("duplication",),
    Broadcasts: ("minimum",),
    IgnoresKey: ("key", "gain"),
    TrainsTeacher: ("gradient",),
    DividesByObjects: ("finite", "boxes: none"),
    SoftmaxOverClasses: ("one_class",),
    HalfPrecision: ("half_precision", torch.bfloat16),
    WrongGradient: ("gradcheck",),
    OutOfGraph: ("finite", "boxes: none"),
    SkipsLevel: ("gradient",),
    NeverZero: ("minimum",),
    Drifts: ("state",),
    UndeclaredRead: ("gradient",),
    UndeclaredTeacher: ("reads",),
    UntrainedModule: ("gradient",),
    FixedPrecision: ("autocast",),
}


@pytest.mark.parametrize("cls", BROKEN, ids=lambda cls: cls.__name__)
def test_contract_catches_a_broken_loss(cls):
    check, *args = BROKEN[cls]
    getattr(contract, f"check_{check}")(Sound, *args)
    with pytest.raises((AssertionError, RuntimeError, pytest.fail.Exception)):
        getattr(contract, f"check_{check}")(cls, *args)
