"""What every registered loss must do, and realistic inputs to try it on.

`tests/losses/test_contract.py` runs every check below on every registered loss; there is no list to maintain. A new
loss that is an exception says so in its own test module, `tests/losses/test_<file of the loss>.py`:

    from tests.support.loss_contract import Facts

    FACTS = {
        "mgd": Facts(
            exempt={"minimum": "the generation block is trained, so its output is not the teacher's at the start"},
            duplication=0.2,                  # relative tolerance: masks are drawn per image
            values={"mode": "channel"},       # another valid value for a key that is neither number, flag nor levels
            context={"ratio": {"fm": True}},  # keys that must be set for `ratio` to matter
        )
    }

The name in `exempt` is the check's name without `check_`, its value the reason that pytest prints.

In a loss's own test, `make_pair`, `make_step` and `make_loss` give inputs of the right kind:

    pair = make_pair(teacher_channels=(8, 8, 8))
    loss = make_loss(FGD, pair, temperature=0.5)
    columns = loss(make_step(pair, boxes=BOXES["overlapping"], seed=3))
"""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from yolo_kd.distillation.adapters import build_adapters
from yolo_kd.errors import PairError
from yolo_kd.losses.base import Loss, parameters
from yolo_kd.losses.kernels import points
from yolo_kd.structures import Assignment, DetectorOutputs, LossInputs, PairSpec, Targets

IMAGE = (128, 160)  # height and width in pixels: maps of 16x20, 8x10 and 4x5 cells

ImageBoxes = Sequence[tuple[float, float, float, float]]

# boxes of a batch of two images of IMAGE size, xyxy pixels
BOXES: dict[str, tuple[ImageBoxes, ...]] = {
    "typical": (((10, 12, 70, 90), (60, 40, 150, 120), (100, 5, 125, 30)), ((30, 20, 90, 110), (8, 88, 40, 124))),
    "overlapping": (((10, 10, 100, 100), (20, 20, 90, 90), (20, 20, 90, 90)), ((5, 5, 60, 60), (50, 50, 120, 120))),
    "none": ((), ()),
    "one empty image": ((), ((30, 20, 90, 110),)),
    "partly outside": (((-40, -30, 50, 60), (120, 90, 220, 190)), ((-10, 40, 170, 80),)),
    "wholly outside": (((-90, -80, -20, -10),), ((200, 140, 260, 190),)),
    "tiny": (((20.2, 20.3, 21.9, 21.1), (90, 61, 90.4, 61.2)), ((0, 0, 1, 1),)),
    "no area": (((50, 50, 50, 50),), ((40, 60, 90, 60),)),
    "everything": (((0, 0, 160, 128),), ((-20, -20, 200, 200),)),
    "odd": (((19, 37, 37, 53),), ((8, 8, 16, 16),)),
}


# --------------------------------------------------------------------------------------------------------- inputs
def make_pair(
    student_channels: Sequence[int] = (8, 12, 16),
    teacher_channels: Sequence[int] = (16, 24, 32),
    strides: Sequence[int] = (8, 16, 32),
    nc: int = 3,
    student_reg_max: int = 8,
    teacher_reg_max: int = 8,
    equal: bool = False,
) -> PairSpec:
    """Return a pair of detectors, small but of the usual proportions; with `equal` the student is as the teacher."""
    if equal:
        student_channels, student_reg_max = teacher_channels, teacher_reg_max
    widths = tuple(student_channels), tuple(teacher_channels)
    # features inside the head, for losses with `head_split`
    head = [{f"{kind}{i}": c for i in range(len(strides)) for kind, c in (("cls", cls), ("box", 6))} for cls in (8, 10)]
    return PairSpec(*widths, tuple(strides), nc, student_reg_max, teacher_reg_max, head[equal], head[1])


def make_tails(pair: PairSpec) -> list[tuple[nn.Module, nn.Module]]:
    """Return the end of the teacher's head: per level its class branch and its box branch, frozen.

    The teacher's scores and boxes in `make_view` are what they make of its `layers`.
    """
    tails = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        for i in range(len(pair.strides)):
            branches = []
            for kind, out in (("cls", pair.nc), ("box", 4 * pair.teacher_reg_max)):
                conv = nn.Conv2d(pair.teacher_layer_channels[f"{kind}{i}"], out, 1)
                nn.init.normal_(conv.weight, std=0.8)
                nn.init.constant_(conv.bias, -3.0 if kind == "cls" else 0.5)
                positive = [nn.Softplus()] if kind == "box" and pair.teacher_reg_max == 1 else []
                branches.append(nn.Sequential(nn.SiLU(inplace=True), conv, *positive).eval().requires_grad_(False))
            tails.append(tuple(branches))
    return tails


def make_view(
    pair: PairSpec, who: str, batch: int, image: tuple[int, int], rng: torch.Generator, spread: float = 1.0
) -> DetectorOutputs:
    """Return one model's outputs: SiLU features, class logits about -3, plausible distances."""
    student = who == "student"
    channels = pair.student_channels if student else pair.teacher_channels
    inside = pair.student_layer_channels if student else pair.teacher_layer_channels
    bins = pair.student_reg_max if student else pair.teacher_reg_max
    sizes = [(image[0] // s, image[1] // s) for s in pair.strides]

    def normal(*shape: int) -> Tensor:  # drawn in float32 so that every precision gets the same numbers
        return torch.randn(shape, generator=rng, dtype=torch.float32).to(torch.get_default_dtype())

    features = tuple(nn.functional.silu(normal(batch, c, h, w)) for c, (h, w) in zip(channels, sizes, strict=True))
    layers = {name: normal(batch, c, *sizes[int(name[-1])]) for name, c in inside.items()}
    if student:
        points = sum(h * w for h, w in sizes)
        scores = normal(batch, pair.nc, points) * 1.5 - 3
        boxes = normal(batch, 4 * bins, points) if bins > 1 else normal(batch, 4, points).abs() + 0.3
    else:
        ends = dict(zip(("cls", "box"), zip(*make_tails(pair), strict=True), strict=True))
        scores, boxes = (
            torch.cat([tail(layers[f"{kind}{i}"].clone()).flatten(2) for i, tail in enumerate(tails)], -1)
            for kind, tails in ends.items()
        )
    # as the taps make them: turned, not contiguous
    scores, boxes = scores.transpose(1, 2) * spread, boxes.transpose(1, 2)
    return DetectorOutputs(features, scores, boxes * spread if bins > 1 else boxes, pair.strides, bins, layers=layers)


def make_targets(
    pair: PairSpec, boxes: Sequence[ImageBoxes], image: tuple[int, int], rng: torch.Generator, per_box: int = 10
) -> Targets:
    """Return ground truth with an assignment: the `per_box` points inside a box that lie nearest to its centre."""
    index = torch.tensor([i for i, image_boxes in enumerate(boxes) for _ in image_boxes], dtype=torch.int64)
    xyxy = torch.tensor([b for image_boxes in boxes for b in image_boxes]).view(-1, 4).to(torch.get_default_dtype())
    labels = torch.randint(pair.nc, (len(index),), generator=rng)
    centres = torch.cat([_centres(image[0] // s, image[1] // s, s) for s in pair.strides])

    foreground = torch.zeros(len(boxes), len(centres), dtype=torch.bool)
    scores = torch.zeros(len(boxes), len(centres), pair.nc)
    target = torch.zeros(len(boxes), len(centres), 4)
    for i, box, label in zip(index.tolist(), xyxy, labels.tolist(), strict=True):
        inside = ((centres > box[:2]) & (centres < box[2:])).all(-1) & ~foreground[i]
        distance = (centres - (box[:2] + box[2:]) / 2).square().sum(-1).masked_fill(~inside, torch.inf)
        chosen = distance.argsort(stable=True)[: min(per_box, int(inside.sum()))]
        foreground[i, chosen] = True
        target[i, chosen] = box
        scores[i, chosen, label] = 0.2 + 0.8 * torch.rand(len(chosen), generator=rng).to(scores.dtype)
    return Targets(xyxy, labels, index, image, len(boxes), Assignment(foreground, scores, target))


def make_step(
    pair: PairSpec | None = None,
    *,
    seed: int = 0,
    boxes: Sequence[ImageBoxes] | None = None,
    batch: int = 2,
    image: tuple[int, int] = IMAGE,
    dtype: torch.dtype | None = None,
    progress: float = 0.3,
    equal: bool = False,
    spread: float = 1.0,
    one2one: bool = False,
    teacher_grad: bool = False,
) -> LossInputs:
    """Return one training step. The student's tensors are leaves with gradient.

    Args:
        pair: From `make_pair`; that function's own default when absent.
        seed: Of every number drawn.
        boxes: Per image, xyxy pixels; their number is the batch size. `BOXES["typical"]`, repeated or cut to `batch`
            images, when absent.
        batch: Number of images when `boxes` is absent.
        image: Height and width in pixels.
        dtype: Of both models' outputs, as mixed precision yields them; ground truth keeps the default.
        progress: Fraction of the training that has passed.
        equal: The student outputs what the teacher outputs and is aligned by doing nothing; `pair` must be equal too.
        spread: Factor on logits, to saturate them.
        one2one: Give the teacher a second branch of class logits.
        teacher_grad: Let the teacher's tensors require a gradient, to prove that they get none.
    """
    pair = pair or make_pair(equal=equal)
    boxes = [BOXES["typical"][i % 2] for i in range(batch)] if boxes is None else boxes
    rng = torch.Generator().manual_seed(seed)
    teacher = make_view(pair, "teacher", len(boxes), image, rng, spread)
    student = teacher if equal else make_view(pair, "student", len(boxes), image, rng, spread)
    second = teacher.scores + torch.randn(teacher.scores.shape, generator=rng) if one2one else None
    targets = make_targets(pair, boxes, image, rng)
    student = _leaves(student, dtype, True)
    teacher = _leaves(replace(teacher, one2one_scores=second), dtype, teacher_grad)
    return LossInputs(student, teacher, targets, progress, None if equal else Align(pair, student))


class Align:
    """Real adapters of every kind that is asked for, in `adapters` by kind; same numbers for the same pair."""

    def __init__(self, pair: PairSpec, student: DetectorOutputs):
        self.pair, self.student = pair, student
        self.adapters: dict[str, nn.ModuleList] = {}

    def __call__(self, kind: str, level: int) -> Tensor:
        if kind not in self.adapters:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(7)
                self.adapters[kind] = build_adapters(kind, self.pair)
        return self.adapters[kind][level](self.student.features[level].float())


def with_student(step: LossInputs, student: DetectorOutputs, pair: PairSpec) -> LossInputs:
    """Return the step with another student and an empty memo."""
    return LossInputs(student, step.teacher, step.targets, step.progress, step._align and Align(pair, student))


def duplicated(step: LossInputs, pair: PairSpec) -> LossInputs:
    """Return the step with every image twice."""

    def twice(view: DetectorOutputs) -> DetectorOutputs:
        second = view.one2one_scores
        return replace(
            view,
            features=tuple(_twice(f) for f in view.features),
            scores=_twice(view.scores),
            boxes=_twice(view.boxes),
            one2one_scores=None if second is None else _twice(second),
            layers={name: _twice(layer) for name, layer in view.layers.items()},
        )

    t = step.targets
    assert t is not None
    assert t.assignment is not None
    a = t.assignment
    targets = Targets(
        _twice(t.boxes),
        _twice(t.labels),
        torch.cat([t.image_index, t.image_index + t.batch_size]),
        t.image_size,
        2 * t.batch_size,
        Assignment(_twice(a.foreground), _twice(a.scores), _twice(a.boxes)),
    )
    student = _leaves(twice(step.student), None, True)
    return LossInputs(student, twice(step.teacher), targets, step.progress, step._align and Align(pair, student))


def make_loss(cls: type[Loss], pair: PairSpec, **keys: Any) -> Loss:
    """Return the loss, built for the pair with the same random parameters each time."""
    torch.manual_seed(0)
    loss = cls(**keys)
    loss.build(pair)
    if cls.head_split:
        loss.attach_teacher_head(make_tails(pair))
    return loss


def evaluate(loss: Loss, step: LossInputs, seed: int = 0) -> dict[str, Tensor]:
    """Return the loss's columns, with the random numbers it draws fixed."""
    torch.manual_seed(seed)
    return loss(step)


def leaves(view: DetectorOutputs) -> dict[str, Tensor]:
    """Return the tensors of a view by name."""
    named = {f"features of level {i}": f for i, f in enumerate(view.features)}
    named |= {"scores": view.scores, "boxes": view.boxes, **view.layers}
    return named if view.one2one_scores is None else named | {"one2one_scores": view.one2one_scores}


@contextmanager
def in_float64() -> Iterator[None]:
    """Compute everything in float64, also where the code under test says `.float()`."""
    torch.set_default_dtype(torch.float64)
    try:
        with patch.object(torch.Tensor, "float", lambda tensor: tensor.double()):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def _leaves(view: DetectorOutputs, dtype: torch.dtype | None, grad: bool) -> DetectorOutputs:
    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().to(dtype or tensor.dtype, copy=True).requires_grad_(grad)

    second = None if view.one2one_scores is None else leaf(view.one2one_scores)
    features, layers = tuple(leaf(f) for f in view.features), {name: leaf(v) for name, v in view.layers.items()}
    return DetectorOutputs(features, leaf(view.scores), leaf(view.boxes), view.strides, view.reg_max, second, layers)


def _twice(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor]).detach()


def _centres(h: int, w: int, stride: int) -> Tensor:
    y, x = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
    return torch.stack([x, y], -1).view(-1, 2) * stride


# ---------------------------------------------------------------------------------------------------------- facts
@dataclass(frozen=True)
class Facts:
    """What is special about a loss; see the top of this file.

    Attributes:
        exempt: Checks that do not apply, by name, with the reason.
        minimum: Value of each column when the student equals the teacher.
        duplication: Relative change allowed when every image is in the batch twice.
        values: Another valid value of a constructor key, where doubling, halving or negating is not one.
        context: Keys that must be set too for a key to matter, by key.
    """

    exempt: dict[str, str] = field(default_factory=dict)
    minimum: float = 0.0
    duplication: float = 1e-4
    values: dict[str, Any] = field(default_factory=dict)
    context: dict[str, dict[str, Any]] = field(default_factory=dict)


def facts(cls: type[Loss]) -> Facts:
    """Return what the test module of the loss declares in `FACTS`, or the default."""
    module = f"tests.losses.test_{cls.__module__.rsplit('.', 1)[-1]}"
    declared = getattr(import_module(module), "FACTS", {}) if find_spec(module) else {}
    return declared.get(cls.name, Facts())


# --------------------------------------------------------------------------------------------------------- checks
def check_columns(cls: type[Loss]) -> None:
    """It returns its columns, each a finite float32 scalar in the graph."""
    pair = make_pair()
    columns = evaluate(make_loss(cls, pair), make_step(pair))
    assert tuple(columns) == cls.columns
    for name, value in columns.items():
        assert value.shape == (), name
        assert value.dtype == torch.float32, name
        assert value.isfinite(), name
        assert value.requires_grad, name


def check_minimum(cls: type[Loss]) -> None:
    """A student that equals its teacher has the smallest loss there is, and no reason to move."""
    minimum = facts(cls).minimum
    pair = make_pair(equal=True)
    loss, step = make_loss(cls, pair), make_step(pair, equal=True)
    columns = evaluate(loss, step)
    for name, value in columns.items():
        assert value.item() == pytest.approx(minimum, abs=1e-5), name
    _backward(columns)
    far = make_step(pair, seed=1)
    apart = LossInputs(far.student, step.teacher, step.targets, step.progress)
    other = evaluate(loss, apart)
    _backward(other)
    for (name, here), there in zip(leaves(step.student).items(), leaves(apart.student).values(), strict=True):
        if here.grad is not None and there.grad is not None:
            assert here.grad.abs().max() <= 1e-2 * there.grad.abs().max() + 1e-7, f"gradient at the minimum: {name}"
    for name, value in other.items():
        assert value.item() > minimum, name


EDGES: dict[str, dict[str, Any]] = {
    **{f"boxes: {name}": {"boxes": boxes} for name, boxes in BOXES.items()},
    "batch of one": {"batch": 1},
    "batch of one without a box": {"boxes": ((),)},
    "wide image": {"image": (64, 288)},
    "one cell on p5": {"image": (32, 32)},
    "one row on p5": {"image": (32, 96)},
    "saturated logits": {"spread": 30.0},
    "end of training": {"progress": 1.0},
    "start of training": {"progress": 0.0},
    "second branch": {"one2one": True},
    "student equals teacher": {"equal": True},
}


def check_finite(cls: type[Loss], edge: str) -> None:
    """Values and gradients are finite on awkward batches, and the graph stays connected."""
    equal = EDGES[edge].get("equal", False)
    pair = make_pair(equal=equal)
    _finite(make_loss(cls, pair), make_step(pair, **EDGES[edge]))


def check_one_class(cls: type[Loss]) -> None:
    """With one class it is finite and still teaches something: no softmax over a single class."""
    pair = make_pair(nc=1)
    for name, value in _finite(make_loss(cls, pair), make_step(pair)).items():
        assert value.item() != 0, name


def check_bins(cls: type[Loss], student: int, teacher: int) -> None:
    """It serves heads with any distance bins, or says before training that it cannot, and what can."""
    pair = make_pair(student_reg_max=student, teacher_reg_max=teacher)
    if cls.needs_bins and not pair.same_bins:
        with pytest.raises(PairError, match=f"{student} bins .* {teacher}.*{cls.instead}"):
            cls().build(pair)
        return
    for name, value in _finite(make_loss(cls, pair), make_step(pair)).items():
        assert value.item() != 0, name


def check_gradient(cls: type[Loss]) -> None:
    """Each column reaches the student, on every level it reads, and nothing ever reaches the teacher."""
    pair = make_pair()
    loss, step = make_loss(cls, pair), make_step(pair, teacher_grad=True, one2one=True)
    columns = evaluate(loss, step)
    for name, column in columns.items():
        gradients = torch.autograd.grad(
            column, list(leaves(step.student).values()), retain_graph=True, allow_unused=True
        )
        assert any(g is not None and g.abs().max() > 0 for g in gradients), f"{name} does not reach the student"
    _backward(columns)
    reached = {k for k, v in leaves(step.student).items() if v.grad is not None and v.grad.abs().max() > 0}
    levels = {k for k in reached if k.startswith("features")}
    assert not levels or len(levels) == len(pair.strides), f"only {levels} of {len(pair.strides)} levels are reached"
    declared = {"features": bool(levels), "scores": "scores" in reached, "boxes": "boxes" in reached}
    assert {k for k, v in declared.items() if v} <= cls.reads, "it uses what it does not declare in `reads`"
    assert cls.head_split or not reached & step.student.layers.keys(), "it uses what `head_split` must declare"
    for name, tensor in leaves(step.teacher).items():
        assert tensor.grad is None or not tensor.grad.any(), f"the teacher's {name} get a gradient"
    modules = {"its own": loss}
    if cls.adapter is not None:
        assert isinstance(step._align, Align)
        assert set(step._align.adapters) == {cls.adapter}, "adapters that it uses are not the one that it declares"
        modules["the adapter's"] = step._align.adapters[cls.adapter]
    own = {id(p) for p in loss.self_trained()}
    for owner, module in modules.items():
        for name, parameter in module.named_parameters():
            assert id(parameter) in own or parameter.grad is not None, f"{owner} parameter {name} is never trained"


def check_reads(cls: type[Loss]) -> None:
    """Of the teacher it needs what it declares and no more: the rest of the head is never computed."""
    pair = make_pair()
    step = make_step(pair, one2one=True)
    teacher = step.teacher
    nothing = teacher.scores.new_empty(len(teacher.scores), 0, 0)
    emptied = replace(
        teacher,
        scores=teacher.scores if "scores" in cls.reads else nothing,
        boxes=teacher.boxes if "boxes" in cls.reads else nothing,
        one2one_scores=teacher.one2one_scores if "one2one" in cls.reads else None,
    )
    whole = evaluate(make_loss(cls, pair), step)
    part = evaluate(make_loss(cls, pair), LossInputs(step.student, emptied, step.targets, step.progress, step._align))
    assert {k: v.item() for k, v in part.items()} == {k: v.item() for k, v in whole.items()}


def check_self_trained(cls: type[Loss]) -> None:
    """`after_step` trains what `self_trained` names, all of it and nothing else."""
    pair = make_pair()
    loss = make_loss(cls, pair)
    own = {id(p) for p in loss.self_trained()}
    assert own <= {id(p) for p in loss.parameters()}, "these must be in a checkpoint too"
    before = {name: p.detach().clone() for name, p in loss.named_parameters()}
    for seed in range(2):
        _backward(evaluate(loss, make_step(pair, seed=seed)))
        loss.after_step()
    for name, parameter in loss.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == (id(parameter) in own), f"{name} {'moved' if moved else 'was never trained'}"


def check_gradcheck(cls: type[Loss]) -> None:
    """Its gradient along a random direction of each tensor is that of its value, by central differences in float64."""
    with in_float64():
        pair = make_pair((2, 3, 4), (4, 4, 6), student_reg_max=4, teacher_reg_max=4)
        loss = make_loss(cls, pair)
        step = make_step(pair, image=(64, 96), boxes=(((4, 6, 50, 40), (40, 20, 90, 60)), ((10, 8, 60, 60),)))
        tensors = leaves(step.student)

        def total(moved: dict[str, Tensor]) -> Tensor:
            *features, scores, boxes = [v for k, v in moved.items() if k not in step.student.layers]
            layers = {k: moved[k] for k in step.student.layers}
            student = replace(step.student, features=tuple(features), scores=scores, boxes=boxes, layers=layers)
            columns = evaluate(loss, with_student(step, student, pair))
            assert all(v.dtype == torch.float64 for v in columns.values()), "a cast other than .float() is in the way"
            return torch.stack(list(columns.values())).sum()

        gradients = torch.autograd.grad(total(tensors), list(tensors.values()), allow_unused=True)
        rng, eps = torch.Generator().manual_seed(3), 1e-6
        for (name, tensor), gradient in zip(tensors.items(), gradients, strict=True):
            way = torch.randn(tensor.shape, generator=rng)
            there, back = (total(tensors | {name: tensor.detach() + sign * eps * way}).item() for sign in (1, -1))
            ours = 0.0 if gradient is None else (gradient * way).sum().item()
            assert ours == pytest.approx((there - back) / (2 * eps), rel=1e-4, abs=1e-7), f"gradient of {name}"


def check_half_precision(cls: type[Loss], dtype: torch.dtype) -> None:
    """Half-precision outputs are computed with in float32: the same value as for the same numbers in float32."""
    pair = make_pair()
    loss = make_loss(cls, pair)
    half = make_step(pair, dtype=dtype, seed=2)
    student, teacher = _leaves(half.student, torch.float32, True), _leaves(half.teacher, torch.float32, False)
    align = half._align and Align(pair, student)
    exact = LossInputs(student, teacher, half.targets, half.progress, align)
    expected = evaluate(loss, exact)
    for name, value in _finite(loss, half).items():
        assert value.dtype == torch.float32, name
        assert value.item() == pytest.approx(expected[name].item(), rel=1e-4, abs=1e-7), name


def check_autocast(cls: type[Loss]) -> None:
    """A gradient asked for inside autocast, as by an audit during the forward pass, is there and nearly the same."""
    pair = make_pair()
    loss, step = make_loss(cls, pair), make_step(pair)
    total = torch.stack(list(evaluate(loss, step).values())).sum()
    inputs = list(leaves(step.student).values())
    exact = torch.autograd.grad(total, inputs, retain_graph=True, allow_unused=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = torch.autograd.grad(total, inputs, allow_unused=True)
    for a, b in zip(exact, rounded, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a - b).abs().max() <= 0.05 * a.abs().max()


def check_duplication(cls: type[Loss]) -> None:
    """The same images twice are worth the same: no sum over the batch."""
    pair = make_pair()
    loss, step = make_loss(cls, pair), make_step(pair)
    once = evaluate(loss, step)
    again = evaluate(loss, duplicated(step, pair))
    for name, value in once.items():
        assert again[name].item() == pytest.approx(value.item(), rel=facts(cls).duplication), name


def check_key(cls: type[Loss], key: str) -> None:
    """A key that can be set changes the result."""
    declared, pair = facts(cls), make_pair()
    context = declared.context.get(key, {})
    default = parameters(cls)[key].default
    if key in declared.values:
        others = [declared.values[key]]
    elif isinstance(default, bool):
        others = [not default]
    elif isinstance(default, int | float):
        others = [default * 2, default / 2] if default else [1, 1.0]
        others = [int(v) if isinstance(default, int) and v == int(v) else v for v in others]
    elif key == "levels":
        others = [["p3"]]
    else:
        pytest.fail(f"say another value of '{key}' in FACTS of the loss's test module: values={{'{key}': ...}}")
    before = evaluate(make_loss(cls, pair, **context), make_step(pair, one2one=True))
    for other in others:
        try:
            loss = make_loss(cls, pair, **context | {key: other})
        except ValueError:
            continue  # out of range; the next candidate may not be
        after = evaluate(loss, make_step(pair, one2one=True))
        changed = [n for n in cls.columns if after[n].item() != pytest.approx(before[n].item(), rel=1e-5, abs=1e-9)]
        assert changed, f"{key}={other!r} computes what {key}={default!r} does"
        return
    pytest.fail(f"no valid value of '{key}' among {others}; say one in FACTS: values={{'{key}': ...}}")


def check_shapes(cls: type[Loss]) -> None:
    """A student with one row of cells too many on its finest level is refused, and the message names both shapes."""
    pair = make_pair()
    step = make_step(pair)
    rng = torch.Generator().manual_seed(5)
    h, w = step.student.shapes[0]
    first = torch.randn(2, pair.student_channels[0], h + 1, w, generator=rng)
    scores = torch.cat([step.student.scores, torch.randn(2, w, pair.nc, generator=rng)], 1)
    boxes = torch.cat([step.student.boxes, torch.rand(2, w, 4 * pair.student_reg_max, generator=rng)], 1)
    layers = dict(step.student.layers)
    layers |= {k: torch.randn(2, layers[k].shape[1], h + 1, w, generator=rng) for k in ("cls0", "box0")}
    features = (first, *step.student.features[1:])
    student = replace(step.student, features=features, scores=scores, boxes=boxes, layers=layers)
    with pytest.raises((ValueError, PairError)) as error:
        evaluate(make_loss(cls, pair), with_student(step, student, pair))
    shapes = set(re.findall(r"\(\d+(?:, \d+)+\)", str(error.value)))
    assert len(shapes) >= 2, f"the message must name both shapes: {error.value}"


def check_state(cls: type[Loss]) -> None:
    """It can be copied and pickled, and computes the same each time."""
    pair = make_pair()
    loss = make_loss(cls, pair)
    twins = copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), loss
    expected = evaluate(loss, make_step(pair))
    for twin in twins:
        assert evaluate(twin, make_step(pair)) == expected


def _backward(columns: dict[str, Tensor]) -> None:
    torch.stack(list(columns.values())).sum().backward()


def _finite(loss: Loss, step: LossInputs) -> dict[str, Tensor]:
    columns = evaluate(loss, step)
    for name, value in columns.items():
        assert value.isfinite(), f"{name} is {value.item()}"
        assert value.requires_grad, f"{name} is out of the graph"
    _backward(columns)
    for name, tensor in leaves(step.student).items():
        assert tensor.grad is None or tensor.grad.isfinite().all(), f"gradient of the student's {name}"
    for name, parameter in loss.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), f"gradient of {name}"
    return columns


def check_waits_for_nothing(cls: type[Loss]) -> None:
    """A step asks no tensor for its values, which would let the host wait for the device.

    The tensors here have shapes and no values: reading one raises, and so does a shape that depends on one (boolean
    indexing, `unique`).
    """
    pair = make_pair()
    step = make_step(pair, seed=3)
    mode = FakeTensorMode()

    def fake(record: Any) -> Any:
        """Return a record whose tensors, also those of records inside, have no values."""

        def of(value: Any) -> Any:
            if isinstance(value, Tensor):
                return mode.from_tensor(value)
            if isinstance(value, dict):
                return {k: of(v) for k, v in value.items()}
            if isinstance(value, tuple):
                return tuple(of(v) for v in value)
            return fake(value) if is_dataclass(value) else value

        return replace(record, **{f.name: of(getattr(record, f.name)) for f in fields(record)})

    student = fake(step.student)
    with mode, patch.object(points, "_few_count", return_value=False):  # as on a GPU
        loss = make_loss(cls, pair)
        columns = loss(LossInputs(student, fake(step.teacher), fake(step.targets), 0.3, Align(pair, student)))
        torch.stack(list(columns.values())).sum().backward()
        loss.after_step()
