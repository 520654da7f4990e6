"""A batch in two parts: what has a task loss, what the terms see, and what pseudo-labels weigh."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ultralytics.cfg import get_cfg
from ultralytics.nn.tasks import DetectionModel

from tests.distillation.test_criterion import CPU, PLAIN
from tests.support.models import make_sure, narrow_model
from yolo_kd.classes.mapping import ClassMap
from yolo_kd.config.recipe import load_recipe
from yolo_kd.config.unlabeled import UnlabeledOptions
from yolo_kd.distillation.criterion import DistillationCriterion
from yolo_kd.distillation.distillation import Distillation
from yolo_kd.distillation.distiller import Distiller
from yolo_kd.distillation.finite_guard import FiniteGuard
from yolo_kd.distillation.observer import TEACHER_OUTPUTS
from yolo_kd.distillation.sub_batches import is_unlabeled_column, teacher_reads
from yolo_kd.distillation.teacher import Teacher
from yolo_kd.engine.components.kept_head import KeptClasses
from yolo_kd.safe_loading.checkpoint import LoadedDetector
from yolo_kd.unlabeled.dataset import UNLABELED_MARK
from yolo_kd.unlabeled.pseudo_labels import detect, labels_of, pseudo_labels
from yolo_kd.upstream.pairing import pair_spec
from yolo_kd.upstream.recorders import AssignmentRecorder, outputs_of
from yolo_kd.upstream.task_loss import branches_of, part_of, targets_of

TERMS = {"losses": {"objectness": {}, "ultralytics": {}, "fgd": {}, "bckd": {}}}
LABELLED, POOLED = 2, 3
FAMILIES = ["yolov8n", "yolo26n"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[DetectionModel, DetectionModel]]:
    """Return a student and a teacher that is sure of things, by family."""
    folder = tmp_path_factory.mktemp("models")
    return {
        family: (narrow_model(family, folder, seed=1), make_sure(narrow_model(family, folder, width=0.25, seed=2)))
        for family in FAMILIES
    }


class Setting:
    """A student with its criterion, and a batch of labeled images before those of a pool."""

    def __init__(
        self,
        models: tuple[DetectionModel, DetectionModel],
        mode: str = "distill",
        recipe: dict = TERMS,
        labeled: int = LABELLED,
        pooled: int = POOLED,
        **keys: Any,
    ):
        student, teacher = models
        torch.manual_seed(3)
        self.student = copy.deepcopy(student).train()
        self.student.args = get_cfg()
        self.pool = UnlabeledOptions(("x",), mode=mode, conf=0.5, low=0.2, **keys)
        self.distiller = Distiller(load_recipe(recipe), pair_spec(student, teacher))
        self.teacher = Teacher(LoadedDetector(teacher, {}, Path("teacher.pt"), ""), CPU, PLAIN)
        self.attach()
        self.labeled, self.pooled = labeled, pooled
        self.batch = {
            "img": torch.rand(labeled + pooled, 3, 64, 64),
            "bboxes": torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.3, 0.3, 0.2, 0.3]])[:labeled],
            "cls": torch.tensor([[0.0], [2.0]])[:labeled],
            "batch_idx": torch.tensor([0.0, 1.0])[:labeled],
            UNLABELED_MARK: (False,) * labeled + (True,) * pooled,
        }
        self.batch[TEACHER_OUTPUTS] = self.teacher(self.batch["img"])
        self.predictions = self.student(self.batch["img"])
        self.outputs = [b[k] for b in self.branches() for k in ("scores", "boxes")]

    def attach(self) -> None:
        self.distillation = Distillation(self.student, self.teacher, self.distiller, self.pool)
        self.criterion = DistillationCriterion(self.distillation)

    def branches(self) -> list[dict]:
        p = self.predictions
        return [p["one2many"], p["one2one"]] if "one2many" in p else [p]

    def run(self) -> tuple[torch.Tensor, dict]:
        return self.criterion(self.predictions, self.batch)

    def native(self, chosen: slice, labels: dict) -> tuple[torch.Tensor, dict]:
        """Return a fresh native loss on some of the images."""
        return self.student.init_criterion()(part_of(self.predictions, chosen), labels)

    @property
    def own(self) -> slice:
        return slice(0, self.labeled)

    @property
    def others(self) -> slice:
        return slice(self.labeled, self.labeled + self.pooled)


@pytest.mark.parametrize("family", FAMILIES)
def test_pool_images_have_no_task_loss(family: str, models: dict) -> None:
    s = Setting(models[family])
    loss, items = s.run()
    expected, own = s.native(s.own, {**s.batch, "img": s.batch["img"][s.own]})
    for name, value in own.items():
        assert items[name] == value
    torch.testing.assert_close(loss[:3], expected * (s.labeled + s.pooled) / s.labeled)
    gradients = torch.autograd.grad(loss[:3].sum(), s.outputs, allow_unused=True)
    for gradient in gradients:
        assert gradient[s.own].abs().sum() > 0
        assert (gradient[s.others] == 0).all(), "not a bit of a gradient"


def test_nor_has_the_rest_of_the_batch_a_say(models: dict) -> None:
    """The task loss on labeled images is the same whatever the pool images show."""
    one = Setting(models["yolov8n"])
    first = one.run()[1]
    for branch in one.branches():
        with torch.no_grad():
            branch["scores"][one.others] = 3.0
    second = one.run()[1]
    assert {n: first[n] for n in ("box_loss", "cls_loss", "dfl_loss")} == {
        n: second[n] for n in ("box_loss", "cls_loss", "dfl_loss")
    }
    assert first["kcls_pool"] != second["kcls_pool"]


@pytest.mark.parametrize("family", FAMILIES)
def test_terms_act_on_both_parts(family: str, models: dict) -> None:
    """Each part as a step of its own, with the teacher's detections as the pool's boxes."""
    s = Setting(models[family])
    loss, items = s.run()
    student, teacher = outputs_of(s.predictions, s.student), s.batch[TEACHER_OUTPUTS]
    found = detect(teacher.part(s.others), 0.5, 0.7)
    assert len(found) > 5
    labeled = {**s.batch, "img": s.batch["img"][s.own]}
    detected = {"img": s.batch["img"][s.others], **labels_of(found, (64, 64))}
    means = []
    for chosen, labels in ((s.own, labeled), (s.others, detected)):
        native = s.student.init_criterion()
        tap = AssignmentRecorder(native)
        native(part_of(s.predictions, chosen), labels)
        targets = targets_of(labels, tap.take())
        steps = s.distiller.inputs(student.part(chosen), teacher.part(chosen), targets)
        means.append(s.distiller(steps))
    for place, column in enumerate(s.distiller.columns):
        a, b = (mean[column] for mean in means)
        assert items[column] == pytest.approx(a.item(), rel=1e-5)
        assert items[f"{column.removesuffix('_loss')}_pool"] == pytest.approx(b.item(), rel=1e-5)
        expected = s.labeled * a + s.pooled * b
        assert loss[3 + place].item() == pytest.approx(expected.item(), rel=1e-5), column
        assert b != 0


def test_targets_are_the_certain_detections(models: dict) -> None:
    s = Setting(models["yolov8n"])
    found = detect(s.batch[TEACHER_OUTPUTS].part(s.others), 0.5, 0.7)
    targets = targets_of({"img": s.batch["img"][s.others], **labels_of(found, (64, 64))})
    torch.testing.assert_close(targets.boxes, found.boxes.clamp(0, 64), rtol=1e-4, atol=1e-3)
    assert torch.equal(targets.labels, found.labels)
    assert torch.equal(targets.image_index, found.image_index)


def slow_native(branch: Any, raw: dict, labels: dict, confidence: list[list[float]], ignored: torch.Tensor) -> tuple:
    """Return box, class and distance loss of one branch, written out: weights by confidence, masked background."""
    raw = {**raw, "scores": torch.where(ignored, torch.full_like(raw["scores"], -1e4), raw["scores"])}
    seen: list = []
    handle = branch.assigner.register_forward_hook(lambda m, i, o: seen.append(o))
    branch.loss(raw, labels)
    handle.remove()
    _, boxes, scores, foreground, index = seen[0]
    weights = torch.zeros(scores.shape[:2])
    for i in range(scores.shape[0]):
        for a in range(scores.shape[1]):
            if foreground[i, a]:
                weights[i, a] = confidence[i][int(index[i, a])]
    total = max(scores.sum().item(), 1)
    targets = scores * weights[..., None]
    logits = raw["scores"].transpose(1, 2)
    entries = F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="none")
    keep = ~ignored.transpose(1, 2)
    classes = (entries * keep).sum() / total
    from ultralytics.utils.tal import make_anchors

    points, stride = make_anchors(raw["feats"], branch.stride, 0.5)
    distances = raw["boxes"].transpose(1, 2).contiguous()
    box, dfl = branch.bbox_loss(
        distances, branch.bbox_decode(points, distances), points, boxes / stride, targets, total, foreground,
        torch.tensor([64.0, 64.0]), stride,
    )  # fmt: skip
    hyp = branch.hyp
    return box * hyp.box, classes * hyp.cls, dfl * hyp.dfl


@pytest.mark.parametrize("family", FAMILIES)
def test_pseudo_labels_equal_a_slow_computation(family: str, models: dict) -> None:
    s = Setting(models[family], "pseudo")
    loss, items = s.run()
    pseudo = pseudo_labels(s.batch[TEACHER_OUTPUTS].part(s.others), 0.2, 0.5, 0.7)
    assert pseudo.ignored.any()
    certain = pseudo.certain
    confidence = [certain.confidence[certain.image_index == i].tolist() for i in range(s.pooled)]
    assert min(len(c) for c in confidence) > 0
    labels = {"img": s.batch["img"][s.others], **labels_of(certain, (64, 64))}
    native = s.student.init_criterion()
    parts = [part_of(b, s.others) for b in s.branches()]
    slow = [
        torch.stack(slow_native(b, raw, labels, confidence, pseudo.ignored))
        for b, raw in zip(branches_of(native), parts, strict=True)
    ]
    gains = [native.o2m, native.o2o] if len(slow) == 2 else [1.0]
    expected = sum(g * v for g, v in zip(gains, slow, strict=True))
    own, _ = s.native(s.own, {**s.batch, "img": s.batch["img"][s.own]})
    torch.testing.assert_close(loss[:3], own + s.pooled * expected, rtol=1e-4, atol=1e-5)
    logged = torch.stack(
        [items[n] for n in ("box_pool", "cls_pool", next(k for k in items if k in ("dfl_pool", "l1_pool")))]
    )
    torch.testing.assert_close(logged, slow[-1].detach(), rtol=1e-4, atol=1e-5)
    assert "kcls_pool" not in items, "the terms leave the pool alone"
    wanted = torch.autograd.grad(loss[3:].sum(), s.outputs, allow_unused=True)
    assert all((g[s.others] == 0).all() for g in wanted if g is not None)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_ignored_has_no_gradient(family: str, models: dict) -> None:
    s = Setting(models[family], "pseudo")
    loss, _ = s.run()
    ignored = pseudo_labels(s.batch[TEACHER_OUTPUTS].part(s.others), 0.2, 0.5, 0.7).ignored
    assert 0 < ignored.float().mean() < 0.9
    for branch in s.branches():
        (gradient,) = torch.autograd.grad(loss[:3].sum(), branch["scores"], retain_graph=True)
        assert (gradient[s.others][ignored] == 0).all()
        assert (gradient[s.others][~ignored] != 0).all()


def test_confidence_weights_are_not_cancelled(models: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels that are all half as sure pull half as hard on boxes."""
    s = Setting(models["yolov8n"], "pseudo")
    values = []
    for factor in (1.0, 0.5):

        def halved(view: Any, *args: Any, by: float = factor) -> Any:
            found = pseudo_labels(view, *args)
            object.__setattr__(found.certain, "confidence", torch.full_like(found.certain.confidence, by))
            return found

        monkeypatch.setattr("yolo_kd.distillation.sub_batches.pseudo_labels", halved)
        values.append(s.run()[1])
    for name in ("box_pool", "dfl_pool"):
        assert values[1][name].item() == pytest.approx(0.5 * values[0][name].item(), rel=1e-4)
        assert values[0][name] > 0


def test_both_is_pseudo_and_terms(models: dict) -> None:
    recipe = {"losses": {"objectness": {}, "ultralytics": {}}}
    found = {mode: Setting(models["yolov8n"], mode, recipe).run() for mode in ("distill", "pseudo", "both")}
    both, items = found["both"]
    torch.testing.assert_close(both[:3], found["pseudo"][0][:3])
    torch.testing.assert_close(both[3:], found["distill"][0][3:])
    assert {"box_pool", "cls_pool", "dfl_pool", "kcls_pool", "kbox_pool", "dis_pool"} <= items.keys()


def test_the_task_loss_is_itself_again(models: dict) -> None:
    s = Setting(models["yolo26n"], "both")
    s.run()
    branches = branches_of(s.distillation.task_loss)
    s.distillation.close()
    assert len(branches) == 2
    for branch in branches:
        assert "loss" not in vars(branch)
        assert not branch.assigner._forward_hooks


def test_what_is_logged_of_the_teacher(models: dict) -> None:
    s = Setting(models["yolov8n"])
    items = s.run()[1]
    largest = s.batch[TEACHER_OUTPUTS].part(s.others).objectness.amax(1)
    assert items["pool_obj"] == pytest.approx(largest.mean().item())
    assert items["pool_none"] == 0
    unsure = Setting((models["yolov8n"][0], models["yolov8n"][0]))
    assert unsure.run()[1]["pool_none"] == 1
    assert all(is_unlabeled_column(n) == n.startswith("pool_") or n.endswith("_pool") for n in items)
    features = Setting(models["yolov8n"], recipe={"losses": {"at": {}}}).run()[1]
    assert "pool_obj" not in features, "scores are not computed for a column"


@pytest.mark.parametrize(
    ("mode", "reads", "needed"),
    [
        ("distill", {"features"}, {"features"}),
        ("distill", {"features", "targets"}, {"features", "targets", "scores", "boxes"}),
        ("pseudo", {"features"}, {"features", "scores", "boxes"}),
    ],
)
def test_of_the_teacher_nothing_else_is_computed(mode: str, reads: set, needed: set) -> None:
    assert teacher_reads(UnlabeledOptions(("x",), mode=mode), reads) == needed
    assert teacher_reads(None, reads) == reads


@pytest.mark.parametrize("mode", ["distill", "both"])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_single_label(family: str, mode: str, models: dict) -> None:
    s = Setting(models[family], mode, labeled=0)
    loss, items = s.run()
    task = loss[:3].detach()
    if mode == "distill":
        assert (task == 0).all()
        assert all(items[n] == 0 for n in items if n in ("box_loss", "cls_loss", "dfl_loss", "kcls_loss"))
    else:
        assert (task > 0).all()
    loss.sum().backward()
    assert s.student.model[0].conv.weight.grad.abs().sum() > 0
    assert [row.term for row in s.distillation.audit_rows] == ["objectness", "ultralytics", "fgd", "bckd"]
    assert items["fgd_pool"] > 0


def test_audit_and_weights_look_at_labeled_images(models: dict) -> None:
    """They find what they would find on these images alone."""
    s = Setting(models["yolov8n"], recipe={"losses": {"at": {"weight": "auto"}}})
    for module in s.student.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # or the other images would have a say
            module.eval()
    s.predictions = s.student(s.batch["img"])
    s.run()
    weight = s.distiller.weight("at").item()
    alone = Setting(models["yolov8n"], recipe={"losses": {"at": {"weight": "auto"}}})
    labeled = Distillation(s.student, alone.teacher, alone.distiller)
    images = s.batch["img"][s.own]
    batch = {k: v for k, v in s.batch.items() if k != UNLABELED_MARK}
    batch |= {"img": images, TEACHER_OUTPUTS: s.batch[TEACHER_OUTPUTS].part(s.own)}
    DistillationCriterion(labeled)(s.student(images), batch)
    assert weight == pytest.approx(alone.distiller.weight("at").item(), rel=1e-4)
    assert weight != 1.0
    ours, theirs = s.distillation.audit_rows[0], labeled.audit_rows[0]
    assert ours.value == pytest.approx(theirs.value, rel=1e-4)
    assert ours.cosine == pytest.approx(theirs.cosine, abs=1e-4)


def test_a_critic_learns_from_both_parts(models: dict) -> None:
    s = Setting(models["yolov8n"], recipe={"losses": {"holistic": {}}})
    s.run()
    seen = s.distiller.losses["holistic"].adversary._watched
    assert [len(student) for student, _, _ in seen] == [LABELLED, POOLED]
    s.predictions = s.student(s.batch["img"])
    s.run()
    assert len(s.distiller.losses["holistic"].adversary._watched) == 2, "the next batch begins anew"
    before = [p.clone() for p in s.distiller.losses["holistic"].self_trained()]
    s.distiller.after_step()
    assert any(
        not torch.equal(a, b) for a, b in zip(before, s.distiller.losses["holistic"].self_trained(), strict=True)
    )
    assert not s.distiller.losses["holistic"].adversary._watched


def test_a_bad_batch_leaves_finite_columns(models: dict) -> None:
    s = Setting(models["yolov8n"], "both")
    s.distillation.guard = guard = FiniteGuard()
    s.distillation.audits = False
    good = s.run()[1]
    s.predictions = s.student(s.batch["img"])
    with torch.no_grad():
        s.predictions["scores"][-1] = float("nan")
    loss, items = s.run()
    assert loss.sum() == 0
    assert items.keys() == good.keys()
    assert all(v.isfinite() for v in items.values())
    assert guard.skipped == 1


MERGED = ClassMap(("a", "b", "c"), ("new", "a or b", "c"), ((), (0, 1), (2,)))
"""The student's first class is not the teacher's, and its second is two of them."""


def mapped(models: dict, mode: str) -> Setting:
    s = Setting(models["yolov8n"], mode)
    pair = pair_spec(s.student, models["yolov8n"][1], nc=len(MERGED.matched))
    s.distiller = Distiller(load_recipe(TERMS), pair, MERGED)
    s.attach()
    return s


@pytest.mark.parametrize("mode", ["distill", "pseudo"])
def test_detections_count_in_the_students_classes(mode: str, models: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    s = mapped(models, mode)
    s.batch["cls"][:] = 1.0  # the labeled objects are of a class that both have
    handed: list = []
    real = labels_of
    monkeypatch.setattr(
        "yolo_kd.distillation.sub_batches.labels_of",
        lambda found, size: handed.append(found) or real(found, size),
    )
    items = s.run()[1]
    known = MERGED.teacher_outputs(s.batch[TEACHER_OUTPUTS].part(s.others))
    plain = detect(known, 0.5, 0.7) if mode == "distill" else pseudo_labels(known, 0.2, 0.5, 0.7).certain
    assert handed[0].labels.tolist() == [MERGED.matched[i] for i in plain.labels.tolist()]
    assert torch.equal(handed[0].boxes, plain.boxes)
    assert set(handed[0].labels.tolist()) == {1, 2}
    assert items["pool_obj"] == pytest.approx(known.objectness.amax(1).mean().item())


@pytest.mark.parametrize("chosen", [1, [0, 2], []])
def test_classes_leaves_out_the_same_on_the_pool(chosen: Any, models: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """`classes=` trains on labels of some classes; the teacher's detections of the others are none either."""
    s = Setting(models["yolov8n"], mode="both")
    s.student.args.classes = chosen
    found: list[dict] = []
    original = labels_of
    monkeypatch.setattr(
        "yolo_kd.distillation.sub_batches.labels_of", lambda *a: found.append(original(*a)) or found[-1]
    )
    loss, _ = s.run()
    everything = detect(s.batch[TEACHER_OUTPUTS].part(s.others), s.pool.conf, s.pool.iou).labels
    allowed = [chosen] if isinstance(chosen, int) else chosen
    expected = [c for c in everything.tolist() if c in allowed]
    assert found[0]["cls"].flatten().tolist() == expected
    assert len(expected) < len(everything)
    assert loss.isfinite().all()


def test_the_pool_says_nothing_of_a_class_that_the_teacher_does_not_know(models: dict) -> None:
    s = mapped(models, "both")
    loss, _ = s.run()
    (gradient,) = torch.autograd.grad(loss.sum(), s.predictions["scores"])
    assert (gradient[s.others][:, 0] == 0).all()
    assert (gradient[s.others][:, 1:] != 0).any()
    assert (gradient[s.own][:, 0] != 0).any()


def test_old_classes_are_shielded_on_labeled_images(models: dict) -> None:
    s = Setting(models["yolov8n"])
    s.batch["cls"][:] = 2.0
    kept = KeptClasses(("a", "b", "new"), 2, (2,), 0.05)
    s.distiller = Distiller(load_recipe(TERMS), pair_spec(s.student, models["yolov8n"][1], nc=2), kept.classes)
    teacher = s.batch[TEACHER_OUTPUTS]
    s.batch[TEACHER_OUTPUTS] = replace(teacher, scores=teacher.scores[..., :2])
    s.attach()
    s.distillation.protect(kept)
    loss, _ = s.run()
    (gradient,) = torch.autograd.grad(loss[:3].sum(), s.predictions["scores"])
    seen = (teacher.scores[s.own, :, :2].sigmoid() >= 0.05).any(-1)
    assert 0 < seen.float().mean() < 1
    old = gradient[s.own][:, :2].transpose(1, 2)
    assert (old[seen] == 0).all()
    assert (old[~seen] != 0).all()
    assert (gradient[s.others] == 0).all()
