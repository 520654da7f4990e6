"""The contract of every registered loss, and realistic inputs to test it with.

`tests/losses/test_contract.py` runs every check below on every registered loss; there is no list to maintain. A loss
with exceptions declares them in its test module, `tests/losses/test_<file of the loss>.py`:

    from tests.support.loss_contract import Facts

    FACTS = {
        "mgd": Facts(
            exempt={"minimum": "the generation block is trained, so its output is not the teacher's at the start"},
            duplication=0.2,                  # relative tolerance: masks are drawn per image
            values={"mode": "channel"},       # another valid setting of a key that is neither number, flag nor levels
            context={"ratio": {"fm": True}},  # keys that must be set for `ratio` to have an effect
        )
    }

The name in `exempt` is the name of the check without `check_`; the text is the reason that pytest prints.

The test of a loss gets its inputs from `make_pair`, `make_inputs` and `make_loss`:

    pair = make_pair(teacher_channels=(8, 8, 8))
    loss = make_loss(FGD, pair, temperature=0.5)
    columns = loss(make_inputs(pair, boxes=BOXES["overlapping"], seed=3))
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
    """Return a small pair of detectors with the usual proportions; with `equal` the student is like the teacher."""
    if equal:
        student_channels, student_reg_max = teacher_channels, teacher_reg_max
    widths = tuple(student_channels), tuple(teacher_channels)
    # features inside the head, for losses with `head_split`
    head = [{f"{kind}{i}": c for i in range(len(strides)) for kind, c in (("cls", cls), ("box", 6))} for cls in (8, 10)]
    return PairSpec(*widths, tuple(strides), nc, student_reg_max, teacher_reg_max, head[equal], head[1])


def make_tails(pair: PairSpec) -> list[tuple[nn.Module, nn.Module]]:
    """Return the tails of the teacher's head: for each level its class branch and its box branch, frozen.

    In `make_outputs` they turn the teacher's `layers` into its scores and boxes.
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


def make_outputs(
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
    # transposed and not contiguous, like the recorders' outputs
    scores, boxes = scores.transpose(1, 2) * spread, boxes.transpose(1, 2)
    return DetectorOutputs(features, scores, boxes * spread if bins > 1 else boxes, pair.strides, bins, layers=layers)


def make_targets(
    pair: PairSpec, boxes: Sequence[ImageBoxes], image: tuple[int, int], rng: torch.Generator, per_box: int = 10
) -> Targets:
    """Return ground truth, assigned to the `per_box` points inside each box that are nearest to its centre."""
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


def make_inputs(
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
    """Return the inputs of the losses for one batch. The student's tensors are leaves with gradient.

    Args:
        pair: From `make_pair`; its default pair if absent.
        seed: Seed of all random numbers.
        boxes: Boxes of each image, xyxy pixels; their number is the batch size. `BOXES["typical"]`, repeated or cut to
            `batch` images, if absent.
        batch: Number of images if `boxes` is absent.
        image: Height and width in pixels.
        dtype: Dtype of both models' outputs, as under mixed precision; ground truth keeps the default.
        progress: Fraction of the training that is over.
        equal: Give the student the teacher's outputs, without adapters; `pair` must be equal too.
        spread: Factor of the logits, to saturate them.
        one2one: Give the teacher a second branch of class logits.
        teacher_grad: Let the teacher's tensors require a gradient, to prove that they get none.
    """
    pair = pair or make_pair(equal=equal)
    boxes = [BOXES["typical"][i % 2] for i in range(batch)] if boxes is None else boxes
    rng = torch.Generator().manual_seed(seed)
    teacher = make_outputs(pair, "teacher", len(boxes), image, rng, spread)
    student = teacher if equal else make_outputs(pair, "student", len(boxes), image, rng, spread)
    second = teacher.scores + torch.randn(teacher.scores.shape, generator=rng) if one2one else None
    targets = make_targets(pair, boxes, image, rng)
    student = _leaves(student, dtype, True)
    teacher = _leaves(replace(teacher, one2one_scores=second), dtype, teacher_grad)
    return LossInputs(student, teacher, targets, progress, None if equal else Align(pair, student))


class Align:
    """Real adapters, made on demand and kept in `adapters` by kind; the same pair gets the same weights."""

    def __init__(self, pair: PairSpec, student: DetectorOutputs):
        self.pair, self.student = pair, student
        self.adapters: dict[str, nn.ModuleList] = {}

    def __call__(self, kind: str, level: int) -> Tensor:
        if kind not in self.adapters:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(7)
                self.adapters[kind] = build_adapters(kind, self.pair)
        return self.adapters[kind][level](self.student.features[level].float())


def with_student(inputs: LossInputs, student: DetectorOutputs, pair: PairSpec) -> LossInputs:
    """Return the inputs with another student and an empty memo."""
    return LossInputs(student, inputs.teacher, inputs.targets, inputs.progress, inputs._align and Align(pair, student))


def duplicated(inputs: LossInputs, pair: PairSpec) -> LossInputs:
    """Return the inputs with every image twice."""

    def twice(outputs: DetectorOutputs) -> DetectorOutputs:
        second = outputs.one2one_scores
        return replace(
            outputs,
            features=tuple(_twice(f) for f in outputs.features),
            scores=_twice(outputs.scores),
            boxes=_twice(outputs.boxes),
            one2one_scores=None if second is None else _twice(second),
            layers={name: _twice(layer) for name, layer in outputs.layers.items()},
        )

    t = inputs.targets
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
    student = _leaves(twice(inputs.student), None, True)
    return LossInputs(student, twice(inputs.teacher), targets, inputs.progress, inputs._align and Align(pair, student))


def make_loss(cls: type[Loss], pair: PairSpec, **keys: Any) -> Loss:
    """Return the loss, built for the pair, with the same random parameters each time."""
    torch.manual_seed(0)
    loss = cls(**keys)
    loss.build(pair)
    if cls.head_split:
        loss.attach_teacher_head(make_tails(pair))
    return loss


def evaluate(loss: Loss, inputs: LossInputs, seed: int = 0) -> dict[str, Tensor]:
    """Return the columns of the loss with fixed random numbers."""
    torch.manual_seed(seed)
    return loss(inputs)


def leaves(outputs: DetectorOutputs) -> dict[str, Tensor]:
    """Return the tensors of a model's outputs by name."""
    named = {f"features of level {i}": f for i, f in enumerate(outputs.features)}
    named |= {"scores": outputs.scores, "boxes": outputs.boxes, **outputs.layers}
    return named if outputs.one2one_scores is None else named | {"one2one_scores": outputs.one2one_scores}


@contextmanager
def in_float64() -> Iterator[None]:
    """Compute everything in float64, even where the tested code calls `.float()`."""
    torch.set_default_dtype(torch.float64)
    try:
        with patch.object(torch.Tensor, "float", lambda tensor: tensor.double()):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def _leaves(outputs: DetectorOutputs, dtype: torch.dtype | None, grad: bool) -> DetectorOutputs:
    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().to(dtype or tensor.dtype, copy=True).requires_grad_(grad)

    second = None if outputs.one2one_scores is None else leaf(outputs.one2one_scores)
    features, layers = tuple(leaf(f) for f in outputs.features), {name: leaf(v) for name, v in outputs.layers.items()}
    return DetectorOutputs(
        features, leaf(outputs.scores), leaf(outputs.boxes), outputs.strides, outputs.reg_max, second, layers
    )


def _twice(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor]).detach()


def _centres(h: int, w: int, stride: int) -> Tensor:
    y, x = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
    return torch.stack([x, y], -1).view(-1, 2) * stride


# ---------------------------------------------------------------------------------------------------------- facts
@dataclass(frozen=True)
class Facts:
    """Exceptions of a loss; see the top of this file.

    Attributes:
        exempt: Checks that do not apply, by name, with the reason.
        minimum: Each column for a student that equals its teacher.
        duplication: Relative change allowed if every image is in the batch twice.
        values: Another valid setting of a constructor key, where doubling, halving and negating are invalid.
        context: For a key, other keys that must be set for it to have an effect.
    """

    exempt: dict[str, str] = field(default_factory=dict)
    minimum: float = 0.0
    duplication: float = 1e-4
    values: dict[str, Any] = field(default_factory=dict)
    context: dict[str, dict[str, Any]] = field(default_factory=dict)


def facts(cls: type[Loss]) -> Facts:
    """Return the entry of the loss in `FACTS` of its test module, or the default."""
    module = f"tests.losses.test_{cls.__module__.rsplit('.', 1)[-1]}"
    declared = getattr(import_module(module), "FACTS", {}) if find_spec(module) else {}
    return declared.get(cls.name, Facts())


# --------------------------------------------------------------------------------------------------------- checks
def check_columns(cls: type[Loss]) -> None:
    """The loss returns its columns, each a finite float32 scalar in the graph."""
    pair = make_pair()
    columns = evaluate(make_loss(cls, pair), make_inputs(pair))
    assert tuple(columns) == cls.columns
    for name, value in columns.items():
        assert value.shape == (), name
        assert value.dtype == torch.float32, name
        assert value.isfinite(), name
        assert value.requires_grad, name


def check_minimum(cls: type[Loss]) -> None:
    """A student that equals its teacher has the smallest possible loss and no gradient."""
    minimum = facts(cls).minimum
    pair = make_pair(equal=True)
    loss, inputs = make_loss(cls, pair), make_inputs(pair, equal=True)
    columns = evaluate(loss, inputs)
    for name, value in columns.items():
        assert value.item() == pytest.approx(minimum, abs=1e-5), name
    _backward(columns)
    far = make_inputs(pair, seed=1)
    apart = LossInputs(far.student, inputs.teacher, inputs.targets, inputs.progress)
    other = evaluate(loss, apart)
    _backward(other)
    for (name, here), there in zip(leaves(inputs.student).items(), leaves(apart.student).values(), strict=True):
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
    _finite(make_loss(cls, pair), make_inputs(pair, **EDGES[edge]))


def check_one_class(cls: type[Loss]) -> None:
    """With one class the loss is finite and not zero: it takes no softmax over a single class."""
    pair = make_pair(nc=1)
    for name, value in _finite(make_loss(cls, pair), make_inputs(pair)).items():
        assert value.item() != 0, name


def check_bins(cls: type[Loss], student: int, teacher: int) -> None:
    """The loss serves heads with any distance bins, or refuses them before the training and names another loss."""
    pair = make_pair(student_reg_max=student, teacher_reg_max=teacher)
    if cls.needs_bins and not pair.same_bins:
        with pytest.raises(PairError, match=f"{student} bins .* {teacher}.*{cls.instead}"):
            cls().build(pair)
        return
    for name, value in _finite(make_loss(cls, pair), make_inputs(pair)).items():
        assert value.item() != 0, name


def check_gradient(cls: type[Loss]) -> None:
    """Each column has a gradient into the student, on every level it reads, and none into the teacher."""
    pair = make_pair()
    loss, inputs = make_loss(cls, pair), make_inputs(pair, teacher_grad=True, one2one=True)
    columns = evaluate(loss, inputs)
    for name, column in columns.items():
        gradients = torch.autograd.grad(
            column, list(leaves(inputs.student).values()), retain_graph=True, allow_unused=True
        )
        assert any(g is not None and g.abs().max() > 0 for g in gradients), f"{name} does not reach the student"
    _backward(columns)
    reached = {k for k, v in leaves(inputs.student).items() if v.grad is not None and v.grad.abs().max() > 0}
    levels = {k for k in reached if k.startswith("features")}
    assert not levels or len(levels) == len(pair.strides), f"only {levels} of {len(pair.strides)} levels are reached"
    declared = {"features": bool(levels), "scores": "scores" in reached, "boxes": "boxes" in reached}
    assert {k for k, v in declared.items() if v} <= cls.reads, "it uses what it does not declare in `reads`"
    assert cls.head_split or not reached & inputs.student.layers.keys(), "it uses what `head_split` must declare"
    for name, tensor in leaves(inputs.teacher).items():
        assert tensor.grad is None or not tensor.grad.any(), f"the teacher's {name} get a gradient"
    modules = {"its own": loss}
    if cls.adapter is not None:
        assert isinstance(inputs._align, Align)
        assert set(inputs._align.adapters) == {cls.adapter}, "adapters that it uses are not the one that it declares"
        modules["the adapter's"] = inputs._align.adapters[cls.adapter]
    own = {id(p) for p in loss.self_trained()}
    for owner, module in modules.items():
        for name, parameter in module.named_parameters():
            assert id(parameter) in own or parameter.grad is not None, f"{owner} parameter {name} is never trained"


def check_reads(cls: type[Loss]) -> None:
    """The loss reads no more of the teacher than it declares, because the rest of the head is not computed."""
    pair = make_pair()
    inputs = make_inputs(pair, one2one=True)
    teacher = inputs.teacher
    nothing = teacher.scores.new_empty(len(teacher.scores), 0, 0)
    emptied = replace(
        teacher,
        scores=teacher.scores if "scores" in cls.reads else nothing,
        boxes=teacher.boxes if "boxes" in cls.reads else nothing,
        one2one_scores=teacher.one2one_scores if "one2one" in cls.reads else None,
    )
    whole = evaluate(make_loss(cls, pair), inputs)
    part = evaluate(
        make_loss(cls, pair), LossInputs(inputs.student, emptied, inputs.targets, inputs.progress, inputs._align)
    )
    assert {k: v.item() for k, v in part.items()} == {k: v.item() for k, v in whole.items()}


def check_self_trained(cls: type[Loss]) -> None:
    """`after_step` trains all parameters of `self_trained` and no others."""
    pair = make_pair()
    loss = make_loss(cls, pair)
    own = {id(p) for p in loss.self_trained()}
    assert own <= {id(p) for p in loss.parameters()}, "these must be in a checkpoint too"
    before = {name: p.detach().clone() for name, p in loss.named_parameters()}
    for seed in range(2):
        _backward(evaluate(loss, make_inputs(pair, seed=seed)))
        loss.after_step()
    for name, parameter in loss.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == (id(parameter) in own), f"{name} {'moved' if moved else 'was never trained'}"


def check_gradcheck(cls: type[Loss]) -> None:
    """The gradient along a random direction of each tensor equals the central difference in float64."""
    with in_float64():
        pair = make_pair((2, 3, 4), (4, 4, 6), student_reg_max=4, teacher_reg_max=4)
        loss = make_loss(cls, pair)
        inputs = make_inputs(pair, image=(64, 96), boxes=(((4, 6, 50, 40), (40, 20, 90, 60)), ((10, 8, 60, 60),)))
        tensors = leaves(inputs.student)

        def total(moved: dict[str, Tensor]) -> Tensor:
            *features, scores, boxes = [v for k, v in moved.items() if k not in inputs.student.layers]
            layers = {k: moved[k] for k in inputs.student.layers}
            student = replace(inputs.student, features=tuple(features), scores=scores, boxes=boxes, layers=layers)
            columns = evaluate(loss, with_student(inputs, student, pair))
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
    """Half-precision outputs give the same loss as the same numbers in float32."""
    pair = make_pair()
    loss = make_loss(cls, pair)
    half = make_inputs(pair, dtype=dtype, seed=2)
    student, teacher = _leaves(half.student, torch.float32, True), _leaves(half.teacher, torch.float32, False)
    align = half._align and Align(pair, student)
    exact = LossInputs(student, teacher, half.targets, half.progress, align)
    expected = evaluate(loss, exact)
    for name, value in _finite(loss, half).items():
        assert value.dtype == torch.float32, name
        assert value.item() == pytest.approx(expected[name].item(), rel=1e-4, abs=1e-7), name


def check_autocast(cls: type[Loss]) -> None:
    """A gradient that is computed inside autocast, as in the audit, is nearly the same."""
    pair = make_pair()
    loss, inputs = make_loss(cls, pair), make_inputs(pair)
    total = torch.stack(list(evaluate(loss, inputs).values())).sum()
    tensors = list(leaves(inputs.student).values())
    exact = torch.autograd.grad(total, tensors, retain_graph=True, allow_unused=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = torch.autograd.grad(total, tensors, allow_unused=True)
    for a, b in zip(exact, rounded, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a - b).abs().max() <= 0.05 * a.abs().max()


def check_duplication(cls: type[Loss]) -> None:
    """Every image twice in the batch gives the same loss: it is no sum over the batch."""
    pair = make_pair()
    loss, inputs = make_loss(cls, pair), make_inputs(pair)
    once = evaluate(loss, inputs)
    again = evaluate(loss, duplicated(inputs, pair))
    for name, value in once.items():
        assert again[name].item() == pytest.approx(value.item(), rel=facts(cls).duplication), name


def check_key(cls: type[Loss], key: str) -> None:
    """Every key changes the result."""
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
        pytest.fail(f"add another setting of '{key}' to FACTS in the loss's test module: values={{'{key}': ...}}")
    before = evaluate(make_loss(cls, pair, **context), make_inputs(pair, one2one=True))
    for other in others:
        try:
            loss = make_loss(cls, pair, **context | {key: other})
        except ValueError:
            continue  # out of range; the next candidate may not be
        after = evaluate(loss, make_inputs(pair, one2one=True))
        changed = [n for n in cls.columns if after[n].item() != pytest.approx(before[n].item(), rel=1e-5, abs=1e-9)]
        assert changed, f"{key}={other!r} computes what {key}={default!r} does"
        return
    pytest.fail(f"none of {others} is valid for '{key}'; add a setting to FACTS: values={{'{key}': ...}}")


def check_shapes(cls: type[Loss]) -> None:
    """A student with an extra row of cells on its finest level is refused, and the message names both shapes."""
    pair = make_pair()
    inputs = make_inputs(pair)
    rng = torch.Generator().manual_seed(5)
    h, w = inputs.student.shapes[0]
    first = torch.randn(2, pair.student_channels[0], h + 1, w, generator=rng)
    scores = torch.cat([inputs.student.scores, torch.randn(2, w, pair.nc, generator=rng)], 1)
    boxes = torch.cat([inputs.student.boxes, torch.rand(2, w, 4 * pair.student_reg_max, generator=rng)], 1)
    layers = dict(inputs.student.layers)
    layers |= {k: torch.randn(2, layers[k].shape[1], h + 1, w, generator=rng) for k in ("cls0", "box0")}
    features = (first, *inputs.student.features[1:])
    student = replace(inputs.student, features=features, scores=scores, boxes=boxes, layers=layers)
    with pytest.raises((ValueError, PairError)) as error:
        evaluate(make_loss(cls, pair), with_student(inputs, student, pair))
    shapes = set(re.findall(r"\(\d+(?:, \d+)+\)", str(error.value)))
    assert len(shapes) >= 2, f"the message must name both shapes: {error.value}"


def check_state(cls: type[Loss]) -> None:
    """The loss can be copied and pickled, and computes the same each time."""
    pair = make_pair()
    loss = make_loss(cls, pair)
    twins = copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), loss
    expected = evaluate(loss, make_inputs(pair))
    for twin in twins:
        assert evaluate(twin, make_inputs(pair)) == expected


def _backward(columns: dict[str, Tensor]) -> None:
    torch.stack(list(columns.values())).sum().backward()


def _finite(loss: Loss, inputs: LossInputs) -> dict[str, Tensor]:
    columns = evaluate(loss, inputs)
    for name, value in columns.items():
        assert value.isfinite(), f"{name} is {value.item()}"
        assert value.requires_grad, f"{name} is out of the graph"
    _backward(columns)
    for name, tensor in leaves(inputs.student).items():
        assert tensor.grad is None or tensor.grad.isfinite().all(), f"gradient of the student's {name}"
    for name, parameter in loss.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), f"gradient of {name}"
    return columns


def check_waits_for_nothing(cls: type[Loss]) -> None:
    """The loss asks no tensor for its numbers, which would make the host wait for the device.

    The tensors here have shapes and no numbers. Reading a number raises an error, and so does a shape that depends on
    one (boolean indexing, `unique`).
    """
    pair = make_pair()
    inputs = make_inputs(pair, seed=3)
    mode = FakeTensorMode()

    def fake(record: Any) -> Any:
        """Return a record whose tensors, including those of nested records, have no numbers."""

        def of(value: Any) -> Any:
            if isinstance(value, Tensor):
                return mode.from_tensor(value)
            if isinstance(value, dict):
                return {k: of(v) for k, v in value.items()}
            if isinstance(value, tuple):
                return tuple(of(v) for v in value)
            return fake(value) if is_dataclass(value) else value

        return replace(record, **{f.name: of(getattr(record, f.name)) for f in fields(record)})

    student = fake(inputs.student)
    with mode, patch.object(points, "_few_count", return_value=False):  # as on a GPU
        loss = make_loss(cls, pair)
        columns = loss(LossInputs(student, fake(inputs.teacher), fake(inputs.targets), 0.3, Align(pair, student)))
        torch.stack(list(columns.values())).sum().backward()
        loss.after_step()
