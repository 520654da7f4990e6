"""A batch with NaN or infinity leaves no trace in any gradient, is named and counted; too many stop the training."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.distillation.test_criterion import make_batch, make_step
from tests.support.models import narrow_model
from yolo_kd.distillation.finite_guard import LIMIT, FiniteGuard
from yolo_kd.distillation.observer import TEACHER_OUTPUTS
from yolo_kd.errors import NumbersError
from yolo_kd.structures import DetectorOutputs, tensors_of
from yolo_kd.upstream.task_loss import loss_names_of

RECIPE = {"losses": {"objectness": {}, "ultralytics": {}, "fgd": {}}}
LAZY = pytest.mark.parametrize("lazy", [False, True], ids=["asked at once", "decided on the device"])


def view(bad: str = "") -> DetectorOutputs:
    def tensor(name: str, *shape: int) -> Tensor:
        values = torch.ones(shape)
        if name == bad:
            values.view(-1)[0] = torch.inf
        return values

    return DetectorOutputs(
        (tensor("features", 1, 2, 2, 2),), tensor("scores", 1, 4, 3), tensor("boxes", 1, 4, 4), (8,), 1
    )


def toy(guard: FiniteGuard, value: float, teacher: DetectorOutputs | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Screen a loss of two components, the second of the given value."""
    x = torch.ones(3, requires_grad=True)
    loss = torch.stack([x.sum(), x.sum() * value])
    return guard.screen(loss, {"box_loss": loss[0].detach(), "k_loss": loss[1].detach()}, [x], teacher or view())


def state(bad: bool = False) -> Any:
    return lambda: {"layer.weight": torch.tensor([torch.nan if bad else 1.0]), "steps": torch.tensor(3)}


# ------------------------------------------------------------------------------------------------------- gradients
@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> dict[str, nn.Module]:
    folder = tmp_path_factory.mktemp("models")
    return {family: narrow_model(family, folder) for family in ("yolov8n", "yolo26n")}


def poison_term(student: Any, _batch: dict) -> None:
    """A term whose value and gradients into the neck and into its adapter are NaN."""
    term = student.criterion.distillation.distiller.losses["ultralytics"]
    forward = term.forward
    term.forward = lambda step: {k: (v - v).sqrt() / 0 * v for k, v in forward(step).items()}


def poison_teacher(_student: Any, batch: dict) -> None:
    for feature in batch[TEACHER_OUTPUTS].features:
        feature[0, 0, 0, 0] = torch.nan


def poison_task(student: Any, _batch: dict) -> None:
    """A loss of the student's own that is infinite, with NaN as its gradient."""
    native = student.criterion.distillation.task_loss

    def infinite(predictions: Any, batch: dict) -> tuple[Tensor, dict]:
        loss, items = native(predictions, batch)
        loss = 1 / (loss - loss).sqrt()
        return loss, dict(zip(items, loss.detach(), strict=True))

    infinite.loss_names = loss_names_of(native)  # type: ignore[attr-defined]
    student.criterion.distillation.task_loss = infinite


POISONS = {"a term": poison_term, "the teacher": poison_teacher, "the task": poison_task}
BLAMED = {"a term": "dis_loss (1x)", "the teacher": "the teacher's features (1x)", "the task": "box_loss (1x)"}


def micro_batches(
    students: dict, family: str, lazy: bool, poison: Any = None, batches: Sequence[int] = (0, 1, 2)
) -> tuple[dict, FiniteGuard]:
    """Sum the gradients of some batches, of which `poison` spoils the second, and return all gradients by name."""
    torch.manual_seed(0)
    student, distiller, frozen, _, _ = make_step(students[family], students["yolov8n"], RECIPE)
    guard = FiniteGuard(distiller.trained_parameters(), lazy)
    student.criterion.distillation.guard = guard
    student.criterion.distillation.audits = False
    for i in batches:
        batch = make_batch()
        batch["img"] = (batch["img"] + i / 3) % 1
        batch[TEACHER_OUTPUTS] = frozen(batch["img"])
        forwards = {name: loss.forward for name, loss in distiller.losses.items()}
        native = student.criterion.distillation.task_loss
        if i == 1 and poison is not None:
            poison(student, batch)
        loss, items = student(batch)
        loss.sum().backward()
        assert all(v.isfinite() for v in items.values())
        for name, forward in forwards.items():
            distiller.losses[name].forward = forward
        student.criterion.distillation.task_loss = native
    named = {**dict(student.named_parameters()), **{f"kd.{k}": v for k, v in distiller.named_parameters()}}
    return {k: v.grad for k, v in named.items() if v.grad is not None}, guard


@pytest.fixture(scope="module")
def without_second(students: dict) -> dict[str, dict]:
    """Gradients of the first and the third batch, of which the second never was, by family."""
    return {family: micro_batches(students, family, False, batches=(0, 2))[0] for family in students}


@LAZY
@pytest.mark.parametrize("family", ["yolov8n", "yolo26n"])
@pytest.mark.parametrize("poison", POISONS)
def test_only_the_bad_batch_is_lost_of_a_sum(
    students: dict, without_second: dict, family: str, poison: str, lazy: bool
) -> None:
    """The second of three batches is bad: what is left in every gradient is the sum of the other two."""
    hurt, guard = micro_batches(students, family, lazy, POISONS[poison])
    assert guard.skipped == 1
    assert BLAMED[poison] in guard.summary()
    assert any(k.startswith("kd.adapters") for k in hurt)
    assert hurt.keys() == without_second[family].keys()
    for name, gradient in hurt.items():
        assert gradient.isfinite().all(), name
        torch.testing.assert_close(gradient, without_second[family][name], rtol=1e-4, atol=1e-5, msg=name)


@LAZY
def test_a_good_batch_is_not_touched(students: dict, lazy: bool) -> None:
    ours, guard = micro_batches(students, "yolov8n", lazy)
    torch.manual_seed(0)
    student, _, frozen, _, _ = make_step(students["yolov8n"], students["yolov8n"], RECIPE)
    student.criterion.distillation.audits = False
    for i in range(3):
        batch = make_batch()
        batch["img"] = (batch["img"] + i / 3) % 1
        batch[TEACHER_OUTPUTS] = frozen(batch["img"])
        student(batch)[0].sum().backward()
    trained = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert len(trained) > 50
    for name, gradient in trained.items():
        assert torch.equal(ours[name], gradient), name
    assert guard.skipped == 0
    assert guard.summary() == ""


def test_without_a_guard_a_bad_term_spoils_everything(students: dict) -> None:
    """The tests above can fail: this is what they keep out."""
    student, _, _, batch, _ = make_step(students["yolov8n"], students["yolov8n"], RECIPE)
    student.criterion.distillation.audits = False
    poison_term(student, batch)
    (student(batch)[0].sum() * 0).backward()
    assert student.model[0].conv.weight.grad.isnan().all()


@LAZY
def test_hooks_of_adapters_go(lazy: bool) -> None:
    parameter = nn.Parameter(torch.ones(2))
    guard = FiniteGuard([parameter], lazy)
    assert parameter._backward_hooks
    guard.close()
    assert not parameter._backward_hooks


# ----------------------------------------------------------------------------------------------- names and counts
@LAZY
def test_names_counts_and_what_is_logged(lazy: bool) -> None:
    guard = FiniteGuard(lazy=lazy)
    loss, items = toy(guard, 2.0)
    assert loss.tolist() == [3, 6]
    assert {k: v.item() for k, v in items.items()} == {"box_loss": 3, "k_loss": 6}
    loss, items = toy(guard, torch.nan)
    assert loss.tolist() == [0, 0]
    assert {k: v.item() for k, v in items.items()} == {"box_loss": 3, "k_loss": 6}  # what was logged last
    toy(guard, -torch.inf, view("scores"))
    said, broken = guard.end_epoch(4, state(), True)
    assert said == (
        "epoch 5: 2 batches were skipped because of NaN or infinity in k_loss (2x), the teacher's scores (1x)."
    )
    assert not broken
    assert guard.end_epoch(5, state(), True) == ("", False)
    toy(guard, torch.nan)
    assert guard.end_epoch(6, state(), True)[0].startswith("epoch 7: 1 batch was skipped")
    assert guard.summary().startswith("3 batches were skipped in total because of NaN or infinity in k_loss (3x)")
    assert guard.skipped == 3


@LAZY
def test_the_teacher_is_not_blamed_for_a_good_batch(lazy: bool) -> None:
    guard = FiniteGuard(lazy=lazy)
    toy(guard, 1.0, view("boxes"))  # no term of this recipe reads them
    assert guard.summary() == ""


@LAZY
def test_many_in_a_row_are_an_error_that_names_the_term(lazy: bool) -> None:
    guard = FiniteGuard(lazy=lazy)
    for _ in range(LIMIT - 1):
        guard.check(state(), True)
        toy(guard, torch.nan)
    toy(guard, 1.0)  # one good batch, and the count starts over
    for _ in range(LIMIT - 1):
        toy(guard, torch.nan)
        guard.check(state(), True)
    toy(guard, torch.nan)
    while guard._screened % LIMIT:  # on a device it is looked at once in a while
        toy(guard, torch.nan)
    with pytest.raises(NumbersError, match=r"the last \d+ batches in a row .* in k_loss .*weights are still finite"):
        guard.check(state(), True)


@LAZY
def test_broken_weights_are_left_to_the_checkpoint_where_there_is_one(lazy: bool) -> None:
    guard = FiniteGuard(lazy=lazy)
    for _ in range(LIMIT):
        toy(guard, torch.nan)
    guard.check(state(bad=True), recoverable=True)
    with pytest.raises(NumbersError, match=r"no longer finite \(layer.weight\).*lr0="):
        guard.check(state(bad=True), recoverable=False)
    assert guard.end_epoch(1, state(bad=True), True)[1]
    guard.check(state(), True)  # restored: the count starts over


@LAZY
def test_broken_weights_at_the_end_of_the_first_epoch(lazy: bool) -> None:
    guard = FiniteGuard(lazy=lazy)
    toy(guard, torch.nan)
    with pytest.raises(NumbersError, match=r"epoch 1: 1 batch was .*no earlier epoch"):
        guard.end_epoch(0, state(bad=True), False)


# ------------------------------------------------------------------------------------------------------- the step
def gradients(value: float) -> Iterator[nn.Parameter]:
    for v in (1.0, value):
        parameter = nn.Parameter(torch.ones(2))
        parameter.grad = torch.full((2,), v)
        yield parameter


def norm_of(parameters: list[nn.Parameter]) -> Tensor:
    return nn.utils.clip_grad_norm_(parameters, 10.0)


def test_an_overflowed_gradient_stops_the_step() -> None:
    guard = FiniteGuard()
    toy(guard, 1.0)
    good, bad = list(gradients(2.0)), list(gradients(torch.inf))
    assert guard.allows_step(norm_of(good), good, scaled=False)
    assert not guard.allows_step(norm_of(bad), bad, scaled=False)
    assert guard.summary() == "1 batch was skipped in total because of NaN or infinity in the gradient (1x)."


def test_a_step_of_nothing_but_bad_batches_is_none() -> None:
    guard = FiniteGuard()
    nothing = list(gradients(0.0))
    nothing[0].grad.zero_()  # type: ignore[union-attr]
    assert not guard.allows_step(norm_of(nothing), nothing, scaled=False)
    assert guard.skipped == 0  # the batches have been counted


def test_on_a_device_the_gradient_is_emptied_without_asking() -> None:
    guard = FiniteGuard(lazy=True)
    toy(guard, 1.0)
    good, bad = list(gradients(2.0)), list(gradients(torch.nan))
    assert guard.allows_step(norm_of(good), good, scaled=False)
    assert good[1].grad.tolist() == [2, 2]  # type: ignore[union-attr]
    assert guard.allows_step(norm_of(bad), bad, scaled=False)
    assert not any(p.grad.any() for p in bad)  # type: ignore[union-attr]
    assert "the gradient (1x)" in guard.summary()


def test_a_gradient_scaler_is_left_to_its_own() -> None:
    guard = FiniteGuard(lazy=True)
    toy(guard, 1.0)
    bad = list(gradients(torch.inf))
    before = [p.grad.clone() for p in bad]  # type: ignore[union-attr]
    assert guard.allows_step(torch.tensor(torch.inf), bad, scaled=True)
    assert all(torch.equal(p.grad, b) for p, b in zip(bad, before, strict=True))
    assert guard.summary() == ""


def test_a_scaler_skips_an_overflow_and_steps_over_an_empty_batch() -> None:
    """As on a GPU with float16: the scale falls where a gradient overflows, not where a batch was left out."""
    guard = FiniteGuard(lazy=True)
    parameter = nn.Parameter(torch.ones(3))
    optimizer, scaler = torch.optim.SGD([parameter], lr=0.1), torch.amp.GradScaler("cpu", init_scale=1024.0)

    def step(value: float, overflow: float = 1.0) -> None:
        optimizer.zero_grad()
        out = parameter * 1.0
        loss = (out * value).sum().view(1)
        loss, _ = guard.screen(loss, {"k_loss": loss.detach()[0]}, [out], view())
        scaler.scale(loss.sum()).backward()
        parameter.grad *= overflow  # type: ignore[operator]
        scaler.unscale_(optimizer)
        assert guard.allows_step(norm_of([parameter]), [parameter], scaled=True)
        scaler.step(optimizer)
        scaler.update()

    step(torch.nan)
    assert parameter.tolist() == [1, 1, 1]
    assert scaler.get_scale() == 1024
    step(1.0, overflow=torch.inf)
    assert parameter.tolist() == [1, 1, 1]
    assert scaler.get_scale() == 512
    step(1.0)
    assert parameter.tolist() == pytest.approx([0.9] * 3)
    assert guard.summary() == "1 batch was skipped in total because of NaN or infinity in k_loss (1x)."


@LAZY
def test_gradients_that_always_overflow_are_an_error(lazy: bool) -> None:
    guard = FiniteGuard(lazy=lazy)
    for _ in range(LIMIT):
        guard.check(state(), True)
        toy(guard, 1.0)
        bad = list(gradients(torch.nan))
        guard.allows_step(norm_of(bad), bad, scaled=False)
    with pytest.raises(NumbersError, match=rf"the last {LIMIT} steps in a row .* the gradient \({LIMIT}x\)"):
        guard.check(state(), True)


class NoItem(torch.utils._python_dispatch.TorchDispatchMode):
    """Fails where the host asks for a value, as it would have to wait for a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "_local_scalar_dense" not in str(func), "the host asks for a value"
        return func(*args, **(kwargs or {}))


def test_no_step_waits_for_the_device() -> None:
    guard = FiniteGuard(lazy=True)
    toy(guard, 1.0)
    with NoItem():
        for value in (1.0, torch.nan):
            guard.check(state(), True)
            loss, _ = toy(guard, value)
            loss.sum().backward()
            parameters = list(gradients(value))
            guard.allows_step(norm_of(parameters), parameters, scaled=False)
    with NoItem(), pytest.raises(AssertionError, match="asks for a value"):
        guard.skipped  # noqa: B018  (the mode above does see it)


# -------------------------------------------------------------------------------------------------------- teacher
@pytest.mark.parametrize("bad", ["features", "scores", "boxes"])
def test_a_teacher_that_starts_with_nan_is_refused(bad: str) -> None:
    with pytest.raises(
        NumbersError, match=re.escape(f"the teacher t.pt returns NaN or infinity on the first batch (in its {bad})")
    ):
        FiniteGuard().admit(view(bad), "t.pt")


def test_later_batches_of_the_teacher_are_not_admitted_again() -> None:
    guard = FiniteGuard()
    guard.admit(view(), "t.pt")
    guard.admit(view("scores"), "t.pt")


def test_tensors_are_found_in_any_nesting() -> None:
    a, b, c = torch.zeros(1), torch.ones(1), torch.ones(2)
    assert [t.shape for t in tensors_of({"x": [a, {"y": b}], "z": (c, "text", None)})] == [a.shape, b.shape, c.shape]


def test_a_good_batch_on_a_cpu_costs_nothing(students: dict) -> None:
    """Processor time of the guard's calls against that of a step, which is tiny here: 64 px, two images."""
    student, distiller, _, batch, _ = make_step(students["yolov8n"], students["yolov8n"], RECIPE)
    guard, spent = FiniteGuard(distiller.trained_parameters()), []
    screen = guard.screen

    def timed(*arguments: Any) -> Any:
        start = time.process_time()
        try:
            return screen(*arguments)
        finally:
            spent.append(time.process_time() - start)

    guard.screen = timed  # type: ignore[method-assign]
    student.criterion.distillation.guard = guard
    steps = []
    for _ in range(7):
        start = time.process_time()
        student(batch)[0].sum().backward()
        guard.check(state(), True)
        guard.allows_step(torch.tensor(1.0), [], False)
        steps.append(time.process_time() - start)
    assert statistics.median(spent) < 0.005 * statistics.median(steps)


def test_errors_have_an_exit_code_of_a_failed_result() -> None:
    assert NumbersError.exit_code == 1
