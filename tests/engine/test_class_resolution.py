"""The classes of a run: what is refused before anything is made, and whole trainings with other or more classes."""

from __future__ import annotations

import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ultralytics import YOLO
from ultralytics.engine.validator import BaseValidator
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import YAML

from tests.engine.test_trainer import interrupted, make, record_steps, rows_of
from tests.support.models import narrow_checkpoint
from yolo_kd.classes.mapping import ClassMap
from yolo_kd.cli import main
from yolo_kd.config.train_options import train_options
from yolo_kd.engine.class_resolution import check_same_classes
from yolo_kd.engine.components.keep_classes import KeepClasses
from yolo_kd.engine.trainer import DistillationTrainer
from yolo_kd.errors import ConfigError, PairError, YoloKDError
from yolo_kd.upstream.recorders import outputs_of

ROAD = {0: "Triangle", 1: "disc", 2: "ring", 3: "star"}
CLASS_FREE = {"losses": {"cwd": {}}}


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of four classes, two of which are the data set's circle."""
    return narrow_checkpoint("yolov8n", tmp_path_factory.mktemp("road"), width=0.25, nc=4, seed=1, names=ROAD)


def renamed(shapes: Path, folder: Path, *names: str) -> Path:
    """Return a data YAML of the same images under other class names."""
    data = yaml.safe_load(shapes.read_text())
    file = folder / "renamed.yaml"
    file.write_text(yaml.safe_dump({**data, "path": str(shapes.parent), "names": dict(enumerate(names))}))
    return file


def refused(folder: Path, shapes: Path, student: Path, **keys: Any) -> str:
    """Return what a trainer says before it has made anything."""
    with pytest.raises(YoloKDError) as error:
        make(folder / "out", shapes, student, **keys)
    assert error.value.exit_code == 2
    assert not (folder / "out").exists()
    return str(error.value)


# ---------------------------------------------------------------------------------------------- before the first batch


def test_nothing_matched(tmp_path: Path, shapes: Path, student: Path, road: Path) -> None:
    data = renamed(shapes, tmp_path, "a", "b", "c")
    text = refused(tmp_path, data, student, teacher=str(road))
    assert "none of the 3 classes" in text
    assert "(a, b, c)" in text
    assert "the teacher's 4 (Triangle, disc, ring, star)" in text
    assert "such as class_map='{Triangle: a}'" in text
    assert "class_map=index" not in text  # counts differ
    numbers = renamed(shapes, tmp_path, "0", "1", "2")
    assert "mere numbers are never matched" in refused(tmp_path, numbers, student, teacher=str(road))
    assert make(tmp_path / "free", data, student, teacher=str(road), kd=CLASS_FREE).plan is not None


@pytest.mark.parametrize(
    ("class_map", "message"),
    [
        ({"dics": "circle"}, r"the teacher has no class 'dics'\. Did you mean 'disc'\?"),
        ("{disc: cirkle}", r"the student has no class 'cirkle'\. Did you mean 'circle'\?"),
        ({"disc": "circle", 1: "square"}, "maps teacher class 1 'disc' twice"),
        ({}, "class_map must be index or a mapping"),
        ({"disc": None}, "class_map: 'disc' must be the name of a class or its index, received nothing"),
        ("disc", "class_map must be index or a mapping"),
        ("index", r"the teacher knows 4 \(.*\), the data set has 3"),
    ],
)
def test_class_maps_that_are_refused(
    tmp_path: Path, shapes: Path, student: Path, road: Path, class_map: Any, message: str
) -> None:
    assert re.search(message, refused(tmp_path, shapes, student, teacher=str(road), class_map=class_map))


@pytest.mark.e2e
def test_one_class_of_all(tmp_path: Path, shapes: Path, student: Path, road: Path) -> None:
    text = refused(tmp_path, shapes, student, teacher=str(road), single_cls=True)
    assert "single_cls makes one class of all" in text
    assert "'{Triangle: item}'" in text
    trainer = make(
        tmp_path,
        shapes,
        student,
        teacher=str(road),
        single_cls=True,
        class_map={"disc": "item", "ring": "item"},
        epochs=1,
    )
    trainer.train()
    assert trainer.plan.classes.sources == ((1, 2),)
    one = narrow_checkpoint("yolov8n", tmp_path, nc=1, names={0: "thing"}, file="one.pt")
    assert make(tmp_path / "one", shapes, student, teacher=str(one), single_cls=True).plan is not None


def test_without_a_teacher_classes_have_no_meaning(tmp_path: Path, shapes: Path, student: Path) -> None:
    for keys in ({"class_map": "index"}, {"keep_classes": "teacher"}):
        text = refused(tmp_path, shapes, student, kd="none", **keys)
        assert f"{next(iter(keys))} is about a teacher's classes, but none is given" in text


def test_equal_placeholders_are_paired_with_a_warning(
    tmp_path: Path, shapes: Path, student: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from ultralytics.utils import LOGGER

    numbers = {i: f"class{i}" for i in range(3)}
    teacher = narrow_checkpoint("yolov8n", tmp_path, names=numbers, file="numbers.pt")
    data = renamed(shapes, tmp_path, *(f"class_{i}" for i in range(3)))
    LOGGER.addHandler(caplog.handler)
    try:
        make(tmp_path / "a", data, student, teacher=str(teacher))
        said = caplog.text
        caplog.clear()
        make(tmp_path / "b", data, student, teacher=str(teacher), class_map="index")
        silent = caplog.text
    finally:
        LOGGER.removeHandler(caplog.handler)
    assert "matched by index because both lists are equal. Write class_map=index" in said
    assert "matched by index" not in silent


def test_keep_classes_that_are_refused(tmp_path: Path, shapes: Path, student: Path, teacher: Path, road: Path) -> None:
    new = renamed(shapes, tmp_path, "dot", "square", "wedge")
    keep = {"teacher": str(teacher), "keep_classes": "teacher"}
    cases: list[tuple[str, Path, Path, dict]] = [
        ("the teacher already has every class", shapes, student, {}),
        ("has random weights. Name a trained checkpoint", new, Path("yolov8n.yaml"), {}),
        ("lacks disc, ring, star", new, student, {"teacher": str(road)}),
        ("cannot be combined with single_cls", new, student, {"single_cls": True}),
        ("inherit is not compatible with keep_classes", new, student, {"inherit": True}),
        ("classes= cannot be combined", new, student, {"classes": [0]}),
        ("Remove pretrained=", new, student, {"pretrained": False}),
        ("needs a trained teacher", new, student, {"teacher": "yolov8n.yaml", "random_teacher": True}),
        ("keep_classes must be teacher", new, student, {"keep_classes": "student"}),
        ("keep_conf must be a number between 0 and 1", new, student, {"keep_conf": 2}),
        ("keep_blend must be a number above 0 and at most 1", new, student, {"keep_blend": 0}),
        ("cwd compares features, which do not change with freeze=22", new, student, {"kd": "objectness_cwd"}),
        ("class_map cannot be given with keep_classes", new, student, {"class_map": "index"}),
    ]
    for message, data, model, keys in cases:
        assert message in refused(tmp_path, data, model, **{**keep, **keys}), message
    all_new = renamed(shapes, tmp_path, "dot", "box", "wedge")
    text = refused(tmp_path, all_new, student, **keep, kd="fgd")
    assert "fgd needs labeled objects of the teacher's classes" in text


def test_classes_that_changed_are_named() -> None:
    then = ClassMap(("a", "b"), ("x", "y"), ((0,), (1,)))
    check_same_classes(then, ClassMap(("a", "b"), ("x", "y"), ((0,), (1,))))
    with pytest.raises(
        PairError, match=r"class 1 was 'y' \(of the teacher: b\) and is now 'z' \(of the teacher: nothing\)"
    ):
        check_same_classes(then, ClassMap(("a", "b"), ("x", "z"), ((0,), ())))
    with pytest.raises(PairError, match="class 2 was nothing and is now 'z'"):
        check_same_classes(then, ClassMap(("a", "b"), ("x", "y", "z"), ((0,), (1,), ())))
    with pytest.raises(PairError, match="they were a, b and are now a, b, c"):
        check_same_classes(then, ClassMap(("a", "b", "c"), ("x", "y"), ((0,), (1,))))


# ------------------------------------------------------------------------------------------------ whole trainings


@pytest.mark.e2e
def test_a_mapped_training_goes_on_as_it_began(tmp_path: Path, shapes: Path, student: Path, road: Path) -> None:
    """Shuffled, merged and missing classes, with terms that read scores, labels and the inside of the head."""
    recipe = {"losses": {"objectness": {}, "fgd": {}, "crosskd": {}}}
    mapping = {"disc": "circle", "ring": "circle"}
    keys = {"teacher": str(road), "kd": recipe, "class_map": mapping, "teacher_precision": "fp32"}
    last = interrupted(tmp_path, shapes, student, after=1, **keys)
    saved = yaml.safe_load((tmp_path / "run" / "kd.yaml").read_text())
    assert saved["class_options"]["class_map"] == {"disc": "circle", "ring": "circle"}
    assert saved["classes"]["sources"] == [[1, 2], [], [0]]
    other = renamed(shapes, tmp_path, "circle", "box", "triangle")
    with pytest.raises(PairError, match=r"class 1 was 'square' .* and is now 'box'"):
        DistillationTrainer(overrides={"resume": str(last), "data": str(other)})
    resumed = DistillationTrainer(overrides={"resume": str(last)})
    steps = record_steps(resumed)
    resumed.train()
    assert resumed.distillation.distiller.pair.nc == 2
    assert [row.term for row in resumed.distillation.audit_rows] == ["objectness", "fgd", "crosskd"]
    assert all(step[column] > 0 for step in steps for column in ("kcls_loss", "xcls_loss"))
    assert len(rows_of(resumed.save_dir)) == 4
    assert YOLO(resumed.best).names == {0: "circle", 1: "square", 2: "triangle"}


@pytest.mark.e2e
def test_the_same_classes_in_another_order_teach_the_same(
    tmp_path: Path, shapes: Path, student: Path, teacher: Path
) -> None:
    """A teacher whose classes were shuffled together with the rows of its head has the same terms in every step."""
    order = [2, 0, 1]
    checkpoint = torch.load(teacher, weights_only=False)
    model = checkpoint["model"]
    for branch in model.model[-1].cv3:
        for tensor in (branch[-1].weight, branch[-1].bias):
            tensor.data = tensor.data[order].clone()
    model.names = dict(enumerate(["triangle", "circle", "square"]))
    shuffled = tmp_path / "shuffled.pt"
    torch.save(checkpoint, shuffled)
    curves = []
    for name, file in (("plain", teacher), ("shuffled", shuffled)):
        trainer = make(tmp_path / name, shapes, student, teacher=str(file), teacher_precision="fp32", epochs=1)
        steps = record_steps(trainer)
        trainer.train()
        curves.append(steps)
    for a, b in zip(*curves, strict=True):
        assert a["kcls_loss"] > 0
        assert a == pytest.approx(b, rel=1e-4)


def check_between(start: Path, trained: Any, finished: Any, new: list[int]) -> None:
    """Check that a finished student was trained in its head only, and stands at 0.65 of the way that this has gone."""
    began, ended, found = (m.float().state_dict() for m in (YOLO(start).model, trained, finished))
    head = f"model.{len(trained.model) - 1}."
    ended = {name: tensor.half().float() if tensor.is_floating_point() else tensor for name, tensor in ended.items()}
    moved = 0
    for name, tensor in began.items():
        if not name.startswith(head):
            assert torch.equal(found[name], tensor), name
        elif tensor.is_floating_point() and tensor.shape == found[name].shape:
            torch.testing.assert_close(found[name], 0.35 * tensor + 0.65 * ended[name], rtol=2e-3, atol=2e-3, msg=name)
            moved += not torch.equal(found[name], tensor)
    assert moved > 10
    rows = f"{head}cv3.0.2.weight"
    assert torch.equal(found[rows][new], ended[rows][new])


@pytest.mark.e2e
@pytest.mark.parametrize("family", ["yolov8n", "yolo26n"])
def test_new_classes_beside_old_ones(
    family: str, tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Self-distillation: the run begins where the student was, goes on after an interruption, and ends plain."""
    own = narrow_checkpoint(family, tmp_path, names={0: "cat", 1: "Square", 2: "dog"}, seed=4, file="own.pt")
    data = renamed(shapes, tmp_path, "dot", "square", "wedge")
    names = {0: "cat", 1: "Square", 2: "dog", 3: "dot", 4: "wedge"}
    caches = {file: file.read_bytes() for file in shapes.parent.rglob("*.cache")}
    keys = {"teacher": str(own), "keep_classes": "teacher", "keep_conf": 0.001, "epochs": 3}
    trainer = make(tmp_path, data, own, **keys)
    seen: dict[str, Any] = {}

    def look(t: Any) -> None:
        images = torch.rand(2, 3, 64, 64)
        before, after = (outputs_of(m.eval()(images), m) for m in (YOLO(own).model.float(), t.ema.ema))
        seen["old"] = torch.allclose(after.scores[..., :3], before.scores, rtol=1e-3, atol=1e-3)
        seen["labels"] = {int(c) for label in t.train_loader.dataset.labels for c in label["cls"].flat}
        seen["val"] = {int(c) for label in t.test_loader.dataset.labels for c in label["cls"].flat}
        seen["kept"] = t.component(KeepClasses).kept

    def stop(t: Any) -> None:
        if t.epoch == 0:
            raise KeyboardInterrupt

    def ema_of(t: Any) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in t.ema.ema.state_dict().items()}

    def judge(validator: Any, trainer: Any = None, model: Any = None) -> Any:
        if trainer is not None:
            seen["judged"] = ema_of(trainer)
        return judged(validator, trainer, model)

    def compare(t: Any) -> None:
        """What validation saw is the student that would be handed out, and training goes on from the other."""
        expected = deepcopy(t.ema.ema)
        t.component(KeepClasses)._blend.apply(expected, new=[3, 4])
        for name, tensor in expected.state_dict().items():
            assert torch.equal(seen["judged"][name], tensor), name
        for name, tensor in seen["trained"].items():
            assert torch.equal(t.ema.ema.state_dict()[name], tensor), name
        seen["moved"] = sum(not torch.equal(seen["judged"][n], tensor) for n, tensor in seen["trained"].items())

    judged = BaseValidator.__call__
    monkeypatch.setattr(BaseValidator, "__call__", judge)
    trainer.add_callback("on_train_start", look)
    trainer.add_callback("on_fit_epoch_end", stop)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert seen["old"]
    assert seen["labels"] == seen["val"] == {1, 3, 4}
    assert seen["kept"].unlabeled == (0, 2)
    assert trainer.distillation.audit_rows
    head = len(trainer.model.model) - 1
    assert YAML.load(trainer.save_dir / "args.yaml")["freeze"] == head, "as it was decided, not as it was asked for"
    resumed = DistillationTrainer(overrides={"resume": str(trainer.last)})
    resumed.add_callback("on_train_start", look)
    resumed.add_callback("on_train_epoch_end", lambda t: seen.update(trained=ema_of(t)))
    resumed.add_callback("on_fit_epoch_end", compare)
    resumed.train()
    assert seen["moved"] > 10
    assert seen["kept"].confidence == 0.001  # also where Ultralytics replaces the criterion
    check_between(own, resumed.ema.ema, YOLO(resumed.last).model, new=[3, 4])
    assert len(rows_of(resumed.save_dir)) == 3
    assert {file: file.read_bytes() for file in caches} == caches
    best = YOLO(resumed.best)
    assert type(best.model) is DetectionModel
    assert best.names == names
    assert best.model.yaml["nc"] == 5
    assert best.model.model[-1].nc == 5
    assert best.predict(torch.zeros(1, 3, 64, 64), verbose=False)


@pytest.mark.e2e
def test_the_check_shows_which_class_is_which(
    tmp_path: Path, shapes: Path, student: Path, road: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"teacher={road}", f"student={student}", f"data={shapes}", "imgsz=64", "batch=8", "workers=0"]
    main(["check", *words, "class_map={disc: circle, ring: circle}"])
    text = capsys.readouterr().out
    assert "1 disc + 2 ring" in text
    assert "the teacher has 2 of the 3 classes" in text
    assert "would stop here" not in text
    new = renamed(shapes, tmp_path, "dot", "box", "wedge")
    own = [f"teacher={student}", f"student={student}", f"data={new}", "imgsz=64", "batch=8", "workers=0"]
    main(["check", *own, "keep_classes=teacher"])
    text = capsys.readouterr().out
    assert "3 dot" in text
    assert "would stop here" not in text
    assert main(["check", *words, "class_map={disk: circle}"]) == 1
    assert "Did you mean 'disc'?" in capsys.readouterr().out


def test_a_mistake_is_a_sentence_and_exit_code_2(
    tmp_path: Path, shapes: Path, student: Path, road: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", f"teacher={road}", f"student={student}", f"data={shapes}", f"project={tmp_path / 'out'}"]
    assert main([*words, "class_map={disk: circle}"]) == 2
    assert "error: class_map: the teacher has no class 'disk'. Did you mean 'disc'?" in capsys.readouterr().err
    assert main([*words, "keep_classes=true"]) == 2
    assert "keep_classes must be teacher, received True" in capsys.readouterr().err
    assert main(["train", "resume=last.pt", "class_map=index"]) == 2
    assert "class_map cannot be given with resume" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="is about a teacher's classes, but none is given"):
        train_options({"student": "s.pt", "data": "d.yaml", "keep_classes": "teacher"})
