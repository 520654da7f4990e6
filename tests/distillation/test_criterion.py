"""One training step of every family as teacher and as student, and what the criterion must never become."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from ultralytics.cfg import get_cfg
from ultralytics.nn.tasks import DetectionModel

from tests.support.models import FAMILIES, narrow_model
from yolo_kd.config.recipe import load_recipe
from yolo_kd.config.speed import Speed
from yolo_kd.distillation.audit import measure
from yolo_kd.distillation.criterion import DistillationCriterion
from yolo_kd.distillation.distillation import Distillation
from yolo_kd.distillation.distiller import Distiller
from yolo_kd.distillation.observer import TEACHER_OUTPUTS
from yolo_kd.distillation.teacher import Teacher
from yolo_kd.errors import AuditError, PairError
from yolo_kd.safe_loading.checkpoint import LoadedDetector
from yolo_kd.upstream.pairing import pair_spec
from yolo_kd.upstream.recorders import AssignmentRecorder, outputs_of
from yolo_kd.upstream.task_loss import targets_of

RECIPE = {"losses": {"objectness": {}, "ultralytics": {}}}
CPU = torch.device("cpu")
PLAIN = Speed.of({"teacher_precision": "fp32", "teacher_channels_last": False})  # nothing is timed, on any machine


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, DetectionModel]:
    """Return one detector per family, made on demand."""
    folder = tmp_path_factory.mktemp("models")

    class Made(dict):
        def __missing__(self, family: str) -> DetectionModel:
            self[family] = narrow_model(family, folder)
            return self[family]

    return Made()


def make_batch(images: int = 2, size: int = 64) -> dict:
    torch.manual_seed(1)
    return {
        "img": torch.rand(images, 3, size, size),
        "bboxes": torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.3, 0.3, 0.2, 0.3]]),
        "cls": torch.tensor([[0.0], [2.0]]),
        "batch_idx": torch.tensor([0.0, 1.0]),
    }


def make_step(student: DetectionModel, teacher: DetectionModel, recipe: dict = RECIPE) -> tuple:
    """Attach a criterion to a copy of the student; return it with distiller, teacher, batch and distillation."""
    student = copy.deepcopy(student).train()
    student.args = get_cfg()
    frozen = Teacher(LoadedDetector(teacher, {}, Path("teacher.pt"), "0" * 64), CPU, PLAIN)
    distiller = Distiller(load_recipe(recipe), pair_spec(student, teacher))
    distillation = Distillation(student, frozen, distiller)
    student.criterion = DistillationCriterion(distillation)
    batch = make_batch()
    batch[TEACHER_OUTPUTS] = frozen(batch["img"])
    return student, distiller, frozen, batch, distillation


def check_one_step(student: DetectionModel, teacher: DetectionModel) -> None:
    student, distiller, frozen, batch, distillation = make_step(student, teacher)
    loss, items = student(batch)
    loss.sum().backward()
    assert list(items)[-3:] == ["kcls_loss", "kbox_loss", "dis_loss"]
    assert all(torch.isfinite(v) for v in items.values())
    assert all(items[c] > 0 for c in distiller.columns)
    assert [row.term for row in distillation.audit_rows] == ["objectness", "ultralytics"]
    assert all(row.gradient > 0 for row in distillation.audit_rows)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in distiller.trained_parameters())
    assert all(p.grad is None for p in frozen.runner.model.parameters())
    frozen.verify_untouched()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_as_teacher_and_student(family: str, models: dict) -> None:
    check_one_step(models[family], models[family])


@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        ("yolov8n", "yolo26n"),
        ("yolo11n", "yolov8n"),
        ("yolo26n", "yolo11n"),
        ("yolov10n", "yolov5n"),
        ("yolov9t", "yolov3"),
        ("yolo26n", "yolov10n"),
    ],
)
def test_across_families(teacher: str, student: str, models: dict) -> None:
    check_one_step(models[student], models[teacher])


def test_terms_are_times_the_batch_size_and_items_are_not(models: dict) -> None:
    student, distiller, _, batch, _ = make_step(models["yolov8n"], models["yolo11n"])
    loss, items = student(batch)
    assert loss.shape == (6,)
    for value, column in zip(loss[3:], distiller.columns, strict=True):
        assert value.item() == pytest.approx(2 * items[column].item(), rel=1e-6)


def test_one_to_many_branch_is_distilled(models: dict) -> None:
    """A term on the other branch of an end-to-end head could not reach the neck."""
    student, _, _, batch, _ = make_step(models["yolo26n"], models["yolo26n"], {"losses": {"objectness": {}}})
    predictions = student(batch["img"])
    assert set(predictions) == {"one2many", "one2one"}
    student.criterion.distillation.task_loss  # noqa: B018  (built before the task loss is taken out of the sum)
    loss, _ = student.criterion(predictions, batch)
    loss[3:].sum().backward()
    assert student.model[0].conv.weight.grad.abs().sum() > 0
    unused = [p.grad for p in student.model[-1].one2one_cv3.parameters() if p.grad is not None]
    assert all(g.abs().sum() == 0 for g in unused)


def test_criterion_copies_and_pickles_to_nothing(models: dict) -> None:
    student, *_, batch, _ = make_step(models["yolov8n"], models["yolov8n"])
    student(batch)
    assert copy.deepcopy(student).criterion is None
    buffer = io.BytesIO()
    torch.save(student, buffer)
    assert b"yolo_kd" not in buffer.getvalue()
    assert pickle.loads(pickle.dumps(student.criterion)) is None


def test_update_reaches_the_task_loss(models: dict) -> None:
    student, *_ = make_step(models["yolo26n"], models["yolo26n"])
    before = student.criterion.distillation.task_loss.o2m
    student.args.epochs = 10
    student.criterion.update()
    assert student.criterion.distillation.task_loss.o2m != before


def test_audit_names_a_term_without_gradient(models: dict) -> None:
    student, distiller, _, batch, _ = make_step(models["yolov8n"], models["yolov8n"])
    loss = distiller.terms["objectness"].loss
    forward = loss.forward
    loss.forward = lambda step: {k: v.detach() for k, v in forward(step).items()}
    with pytest.raises(AuditError, match="term 'objectness' has no gradient into the student"):
        student(batch)


def test_audit_names_a_term_that_is_not_finite(models: dict) -> None:
    student, distiller, _, batch, _ = make_step(models["yolov8n"], models["yolov8n"])
    loss = distiller.terms["ultralytics"].loss
    forward = loss.forward
    loss.forward = lambda step: {k: v * float("nan") for k, v in forward(step).items()}
    with pytest.raises(AuditError, match=r"term 'ultralytics' is not finite .*dis_loss = nan"):
        student(batch)


def test_audit_shares_are_ratios_of_gradients(models: dict) -> None:
    """Compare the audit's share with gradients taken one by one through separate graphs."""
    student, _, _, batch, distillation = make_step(models["yolov8n"], models["yolo11n"])
    student(batch)
    plain = copy.deepcopy(student)
    plain.load_state_dict(student.state_dict())

    def gradient(names: list[int]) -> float:
        predictions = student(batch["img"])
        loss, _ = student.criterion(predictions, batch)
        (loss[names].sum() / 2).backward(inputs=predictions["feats"])
        return torch.cat([f.grad.flatten() for f in predictions["feats"]]).norm().item()

    task = gradient([0, 1, 2])
    assert distillation.audit_rows[0].share == pytest.approx(gradient([3, 4]) / task, rel=0.05)
    assert distillation.audit_rows[1].share == pytest.approx(gradient([5]) / task, rel=0.05)


def test_audit_waits_for_a_batch_with_objects(models: dict) -> None:
    """A term that acts near objects has no gradient on a batch without any; that is no fault."""
    student, _, frozen, batch, distillation = make_step(models["yolov8n"], models["yolov8n"], {"losses": {"fgfi": {}}})
    empty = {**batch, "bboxes": torch.zeros(0, 4), "cls": torch.zeros(0, 1), "batch_idx": torch.zeros(0)}
    loss, items = student(empty)
    assert torch.isfinite(loss).all()
    assert items["fgfi_loss"] == 0
    assert not distillation.audit_rows
    batch[TEACHER_OUTPUTS] = frozen(batch["img"])
    student(batch)
    assert [row.term for row in distillation.audit_rows] == ["fgfi"]


def test_changed_teacher_is_noticed(models: dict) -> None:
    _, _, frozen, _, _ = make_step(models["yolov8n"], models["yolov8n"])
    frozen.verify_untouched()
    with torch.no_grad():
        next(frozen.runner.model.parameters())[0] += 1e-7
    with pytest.raises(AuditError, match="changed during training"):
        frozen.verify_untouched()


def test_teacher_is_fused_yet_equal(models: dict) -> None:
    """The fast teacher sees what the plain one sees, in training form, on both branches."""
    for family in ("yolov8n", "yolo26n"):
        model = models[family]
        frozen = Teacher(LoadedDetector(model, {}, Path("teacher.pt"), ""), CPU, PLAIN)
        images = make_batch()["img"]
        plain = copy.deepcopy(model).eval()
        with torch.no_grad():
            raw = plain(images)[1]
        raw_main = raw.get("one2many", raw)
        view = frozen(images)
        torch.testing.assert_close(view.scores, raw_main["scores"].transpose(1, 2), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(view.boxes, raw_main["boxes"].transpose(1, 2), rtol=1e-4, atol=1e-4)
        for ours, theirs in zip(view.features, raw_main["feats"], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert (view.one2one_scores is None) == ("one2one" not in raw)
        frozen.close()
        assert not any(m._forward_hooks for m in frozen.runner.model.modules())


def test_pair_with_other_classes_or_levels(models: dict, tmp_path: Path) -> None:
    with pytest.raises(PairError, match="trained on 3 classes, the student has 2, and the classes were not matched"):
        pair_spec(narrow_model("yolov8n", tmp_path, nc=2), models["yolov8n"])
    tiny = narrow_model("yolov3-tiny", tmp_path)
    with pytest.raises(PairError, match=r"stride 16 or 32, the teacher's 8, 16 or 32"):
        pair_spec(tiny, models["yolov8n"])


def shares(student: DetectionModel, distiller: Distiller, batch: dict) -> dict[str, float]:
    """Return every term's gradient over the task loss's on one batch, measured apart from the criterion."""
    predictions = student(batch["img"])
    native = student.init_criterion()
    tap = AssignmentRecorder(native)
    loss, _ = native(predictions, batch)
    view = outputs_of(predictions, student)
    steps = distiller.inputs(view, batch[TEACHER_OUTPUTS], targets_of(batch, tap.take()))
    tap.remove()
    rows, problems = measure(loss.sum() / len(batch["img"]), view, distiller, steps)
    assert not problems
    return {row.term: row.share for row in rows}


@pytest.mark.parametrize("family", ["yolov8n", "yolo26n"])
def test_the_first_measurement_sets_the_ratio(family: str, models: dict) -> None:
    recipe = {"losses": {"at": {"weight": "auto"}}}
    student, distiller, _, batch, _ = make_step(models[family], models["yolo11n"], recipe)
    student(batch)
    assert distiller.weight("at") != 1.0
    assert shares(student, distiller, batch)["at"] == pytest.approx(0.3, rel=1e-3)


def test_weights_that_set_themselves_reach_their_ratio(models: dict) -> None:
    """While student and adapters learn, and for several terms with ratios of their own."""
    losses = {"at": {"weight": "auto"}, "cwd": {"weight": "auto", "ratio": 0.6}, "objectness": {"weight": 0.5}}
    student, distiller, _, batch, _ = make_step(models["yolov8n"], models["yolo11n"], {"losses": losses})
    assert distiller.auto is not None
    optimizer = torch.optim.SGD([*student.parameters(), *distiller.parameters()], lr=1e-6)
    before = shares(student, distiller, batch)
    for _ in range(41):
        loss, items = student(batch)
        loss = loss.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = shares(student, distiller, batch)
    assert abs(before["at"] / 0.3 - 1) > 0.5, "the test would show nothing"
    assert after["at"] == pytest.approx(0.3, rel=0.1)
    assert after["cwd"] == pytest.approx(0.6, rel=0.1)
    assert items["at_w"] == distiller.weight("at")
    assert {"at_w", "cwd_w"} == set(items) - {"box_loss", "cls_loss", "dfl_loss", "l1_loss"} - {*distiller.columns}
    assert distiller.auto.steps == 41


def test_logged_weights_are_no_part_of_the_loss(models: dict) -> None:
    student, _, _, batch, distillation = make_step(
        models["yolov8n"], models["yolo11n"], {"losses": {"fgd": {"weight": "auto"}}}
    )
    loss, items = student(batch)
    assert loss.shape == (4,)
    assert loss[3].item() == pytest.approx(2 * items["fgd_loss"].item(), rel=1e-6)
    share = distillation.audit_rows[0].share
    assert share == pytest.approx(0.3, rel=1e-4), "the audit uses the first automatic weight"
    assert items["fgd_w"].item() != 1.0
    with torch.no_grad():
        student(batch)
    assert distillation.distiller.auto.steps == 1, "a pass without gradients is no training step"


def test_a_batch_without_objects_leaves_weights_alone(models: dict) -> None:
    losses = {"losses": {"fgfi": {"weight": "auto"}}}
    student, _, frozen, batch, _ = make_step(models["yolov8n"], models["yolov8n"], losses)
    empty = {**batch, "bboxes": torch.zeros(0, 4), "cls": torch.zeros(0, 1), "batch_idx": torch.zeros(0)}
    _, items = student(empty)
    assert items["fgfi_w"] == 1.0
    batch[TEACHER_OUTPUTS] = frozen(batch["img"])
    _, items = student(batch)
    assert items["fgfi_w"] != 1.0


def test_a_term_that_is_over_is_measured_no_more(models: dict) -> None:
    losses = {"losses": {"at": {"weight": "auto", "schedule": {"stop": 0.5}}}}
    student, distiller, _, batch, _ = make_step(models["yolov8n"], models["yolo11n"], losses)
    student(batch)
    weight = distiller.weight("at")
    student.criterion.progress = 0.6
    calls: list[int] = []
    distiller.losses["at"].register_forward_hook(lambda *_: calls.append(1))
    _, items = student(batch)
    assert not calls
    assert items["at_loss"] == 0
    assert items["at_w"] == weight


def test_shares_are_measured_at_the_outputs_where_freeze_stops_at_the_neck(models: dict) -> None:
    recipe = {"losses": {"objectness": {}}}
    student, _, _, batch, distillation = make_step(models["yolov8n"], models["yolo11n"], recipe)
    for layer in student.model[:-1]:
        layer.requires_grad_(False)
    student(batch)
    assert 0 < distillation.audit_rows[0].share < 100


def test_cosine_is_the_angle_between_gradients(models: dict) -> None:
    student, _, _, batch, distillation = make_step(models["yolov8n"], models["yolo11n"])
    student(batch)

    def gradient(names: list[int]) -> torch.Tensor:
        predictions = student(batch["img"])
        loss, _ = student.criterion(predictions, batch)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss[names].sum(), predictions["feats"])])

    task = gradient([0, 1, 2])
    for row, names in zip(distillation.audit_rows, ([3, 4], [5]), strict=True):
        assert row.cosine == pytest.approx(torch.cosine_similarity(gradient(names), task, dim=0).item(), abs=0.02)
