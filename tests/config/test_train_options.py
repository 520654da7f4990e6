"""Command line, experiment file and mapping say the same things, and every mistake is reported."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from yolo_kd.config.class_options import CLASS_KEYS
from yolo_kd.config.command_line import parse_assignments
from yolo_kd.config.recipe import load_recipe
from yolo_kd.config.speed import SPEED_KEYS
from yolo_kd.config.train_options import CHANGEABLE, DEFAULT_RECIPE, OWN_KEYS, TrainOptions, parse_train, train_options
from yolo_kd.config.unlabeled import UNLABELED_KEYS
from yolo_kd.errors import ConfigError

BASE = {"student": "s.pt", "data": "d.yaml"}
WORDS = [f"{key}={value}" for key, value in BASE.items()]


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def _write(text: str) -> str:
        Path("e.yaml").write_text(text, encoding="utf-8")
        return "cfg=e.yaml"

    return _write


def mistakes(call, *arguments: Any) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as info:
        call(*arguments)
    return info.value.problems


def test_a_full_command_line():
    words = [
        "teacher=t.pt",
        *WORDS,
        "kd=ultralytics",
        "kd.ultralytics.dis=3",
        "epochs=2",
        "imgsz=[320,",
        "640]",
        "lr0=1e-3",
    ]
    options = parse_train([*words, "random_teacher=true"])
    assert options == TrainOptions(
        teacher="t.pt",
        student="s.pt",
        data="d.yaml",
        kd="ultralytics",
        kd_overrides={"ultralytics.dis": 3},
        random_teacher=True,
        keys={"epochs": 2, "imgsz": [320, 640], "lr0": 0.001},
        recipe=load_recipe("ultralytics", {"ultralytics.dis": 3}),
    )
    assert options.ultralytics == {"epochs": 2, "imgsz": [320, 640], "lr0": 0.001, "data": "d.yaml"}


def test_defaults():
    assert parse_train(["teacher=t.pt", *WORDS]).kd == DEFAULT_RECIPE
    assert parse_train(WORDS).kd == "none"
    assert parse_train([*WORDS, "kd=None"]) == parse_train([*WORDS, "teacher=none"]) == parse_train(WORDS)
    options = parse_train(["resume=last.pt", "teacher=moved.pt", "device=cpu"])
    assert options == TrainOptions(teacher="moved.pt", resume="last.pt", keys={"device": "cpu"})


def test_values_are_converted_as_ultralytics_does():
    options = parse_train([*WORDS, "epochs=1e2", "task=detect", "mode=train", "resume=false", "amp=BF16"])
    assert options.ultralytics == {"epochs": 100, "amp": "bf16", "data": "d.yaml"}
    assert options.resume is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*WORDS, "epoch=3"], "unknown key 'epoch'. Did you mean 'epochs'?"),
        ([*WORDS, "techer=t.pt"], "unknown key 'techer'. Did you mean 'teacher'?"),
        ([*WORDS, "zzzzz=1"], "unknown key 'zzzzz'. See 'yolo-kd train --help'"),
        ([*WORDS, "model=s.pt"], "key 'model' is not used here: write student= for the model that is trained."),
        ([*WORDS, "distill_model=t.pt"], "key 'distill_model' is not used here: write teacher= with kd=ultralytics"),
        ([*WORDS, "dis=3"], "key 'dis' is not used here: write kd=ultralytics kd.ultralytics.dis=..."),
        ([*WORDS, "task=segment"], "task=segment is not possible: this program does task=detect only. Leave it out."),
        ([*WORDS, "mode=val"], "mode=val is not possible: this program does mode=train only. Leave it out."),
        ([*WORDS, "epochs=ten"], "'epochs=ten' is of invalid type str."),
        ([*WORDS, "epochs=none"], "'epochs=None' is invalid."),
        ([*WORDS, "save=1"], "'save=1' is of invalid type int."),
        ([*WORDS, "lr0=5"], "'lr0=5' is an invalid value."),
        ([*WORDS, "trust_checkpoints=1"], "trust_checkpoints must be true or false, received 1."),
        ([*WORDS, "random_teacher=yes"], "random_teacher must be true or false, received 'yes'."),
        ([*WORDS, "kd=objectness"], "kd is given but no teacher. Add teacher=<model.pt>, or write kd=none"),
        ([*WORDS, "kd.objectness.weight=1"], "kd.objectness.weight is given but no teacher."),
        (
            [*WORDS, "kd=none", "teacher=t.pt"],
            "kd=none trains the student alone, but teacher=t.pt is given. Leave one out, or write teacher=none.",
        ),
        ([*WORDS, "kd=none", "kd.x.y=1"], "kd.x.y is given, but kd=none distils nothing. Leave one out."),
        (["data=d.yaml"], "student is missing. Add student=yolov8n.pt, or resume=<last.pt> to continue a run."),
        (["student=s.pt"], "data is missing. Add data=coco8.yaml, or resume=<last.pt> to continue a run."),
        (["resume=last.pt", "student=s.pt"], "student cannot be given with resume: it stands in the checkpoint."),
        (["resume=last.pt", "kd=ultralytics"], "kd cannot be given with resume: it stands in the checkpoint."),
        (["resume=last.pt", "kd.x.y=1"], "kd.x.y cannot be given with resume: the recipe stands in the checkpoint."),
        (["resume=true"], "name the checkpoint to continue: resume=runs/detect/train/weights/last.pt."),
        (["resume=3"], "resume must be the path of a file, received 3."),
        (["teacher=t.pt", *WORDS, "kd=objectnes"], "unknown recipe 'objectnes'. Did you mean 'objectness'?"),
        (
            ["teacher=t.pt", *WORDS, "kd.objectness.weight=-1"],
            "kd.objectness.weight on the command line: weight of loss 'objectness' must be a number of at least 0",
        ),
        (
            ["teacher=t.pt", *WORDS, "kd.fgd.weight=1"],
            "kd.fgd.weight on the command line: recipe 'default' has no loss",
        ),
        ([*WORDS, "cfg=missing.yaml"], "missing.yaml: no such file."),
    ],
)
def test_mistakes_on_the_command_line(words, message):
    problems = mistakes(parse_train, words)
    assert len(problems) == 1
    assert problems[0].startswith(message)


def test_all_mistakes_together():
    words = ["epoch=3", "lr0=x", "model=m.pt", "kd=objectness", "kd.objectness.lam_cls=-1", "stray", "random_teacher=1"]
    assert mistakes(parse_train, words) == (
        "'stray' is not key=value. Write stray=<value>.",
        "random_teacher must be true or false, received 1.",
        "unknown key 'epoch'. Did you mean 'epochs'?",
        "'lr0=x' is of invalid type str. Valid 'lr0' types are int (i.e. 'lr0=0') or float (i.e. 'lr0=0.5')",
        "key 'model' is not used here: write student= for the model that is trained.",
        "student is missing. Add student=yolov8n.pt, or resume=<last.pt> to continue a run.",
        "data is missing. Add data=coco8.yaml, or resume=<last.pt> to continue a run.",
        "kd is given but no teacher. Add teacher=<model.pt>, or write kd=none for the student alone.",
        "kd.objectness.lam_cls on the command line: lam_cls of loss 'objectness' must be a number of at least 0, "
        "received -1.",
    )


def test_an_experiment_file(experiment):
    word = experiment("teacher: t.pt\nstudent: s.pt\ndata: d.yaml\nkd: ultralytics\nkd.ultralytics.dis: 2\nepochs: 3\n")
    assert parse_train([word]) == TrainOptions(
        teacher="t.pt",
        student="s.pt",
        kd="ultralytics",
        data="d.yaml",
        kd_overrides={"ultralytics.dis": 2},
        keys={"epochs": 3},
        recipe=load_recipe("ultralytics", {"ultralytics.dis": 2}),
    )
    assert parse_train([word]) == train_options({"cfg": "e.yaml"}) == train_options({"cfg": Path("e.yaml")})


def test_the_command_line_wins(experiment):
    word = experiment("teacher: t.pt\nstudent: s.pt\ndata: d.yaml\nkd: ultralytics\nepochs: wrong\n")
    options = parse_train([word, "epochs=5", "teacher=none", "kd=none"])
    assert options == TrainOptions(student="s.pt", data="d.yaml", kd="none", keys={"epochs": 5})


def test_an_inline_recipe(experiment):
    word = experiment("teacher: t.pt\nstudent: s.pt\ndata: d.yaml\nkd:\n  losses:\n    objectness: {lam_cls: 2}\n")
    options = parse_train([word, "kd.objectness.lam_box=3"])
    assert options.kd == {"losses": {"objectness": {"lam_cls": 2}}}
    assert options.kd_overrides == {"objectness.lam_box": 3}


@pytest.mark.parametrize("none", ["none", "None", "'none'"])
def test_none_in_an_experiment_file(experiment, none):
    assert parse_train([experiment(f"teacher: None\nstudent: s.pt\ndata: d.yaml\nkd: {none}\n")]).kd == "none"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "e.yaml:1: an experiment must be a mapping of keys to values; the experiment file is empty."),
        ("- a", "e.yaml:1: an experiment must be a mapping of keys to values; received ['a']."),
        ("student: s.pt\ndata: [", "e.yaml:2: not valid YAML: "),
        ("student: s.pt\ndata: d.yaml\nepoch: 3", "e.yaml:3: unknown key 'epoch'. Did you mean 'epochs'?"),
        ("student: s.pt\ndata: d.yaml\ndata: d.yaml", "e.yaml:3: key 'data' is given twice, first in line 2."),
        ("student: s.pt\ndata: d.yaml\nlr0: 1e-3", "e.yaml:3: 1e-3 is read as text; write 1.0e-3."),
        ("student: s.pt\ndata: d.yaml\nlr0: x", "e.yaml:3: 'lr0=x' is of invalid type str."),
        ("student: s.pt\ndata: d.yaml\ncfg: f.yaml", "e.yaml:3: an experiment file cannot name another one with cfg"),
        ("student: s.pt\ndata: d.yaml\nmodel: m.pt", "e.yaml:3: key 'model' is not used here: write student="),
        ("student: s.pt\ndata: d.yaml\nkd:", "e.yaml:3: kd is empty. Write kd: none for the student alone"),
        ("student: 3\ndata: d.yaml", "e.yaml:1: student must be the path of a file, received 3."),
        ("student: s.pt\ndata: {a: 1}", "e.yaml:2: data must be the path of a file, received {'a': 1}."),
        ("student: s.pt\ndata: d.yaml\nkd: objectness", "e.yaml:3: kd is given but no teacher."),
        ("student: s.pt\ndata: d.yaml\nteacher: t.pt\nkd: objectnes", "e.yaml:4: unknown recipe 'objectnes'."),
        ("student: s.pt\ndata: d.yaml\nteacher: t.pt\nkd: {losses: {a: }}", "e.yaml:4: unknown loss 'a'."),
        (
            "student: s.pt\ndata: d.yaml\nteacher: t.pt\nkd:\n  losses:\n    objectness:\n      lam_cls: -1",
            "e.yaml:7: lam_cls of loss 'objectness' must be a number of at least 0",
        ),
        (
            "student: s.pt\ndata: d.yaml\nteacher: t.pt\nkd.objectness.weight: -1",
            "e.yaml:4: weight of loss 'objectness' must be a number of at least 0",
        ),
        (
            "student: s.pt\ndata: d.yaml\nteacher: t.pt\nkd: none",
            "e.yaml:4: kd=none trains the student alone, but teacher=t.pt is given. Leave one out",
        ),
    ],
)
def test_mistakes_in_an_experiment_file(experiment, text, message):
    problems = mistakes(parse_train, [experiment(text)])
    assert len(problems) == 1
    assert problems[0].startswith(message)


def test_a_folder_is_no_experiment_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert mistakes(parse_train, ["cfg=."]) == (".: is a folder, not a file.",)
    assert mistakes(train_options, {"cfg": 3}) == ("cfg must be the path of an experiment file, received 3.",)


def test_a_mapping():
    kd = {"losses": {"objectness": {"weight": 2}}}
    augmentations = [object()]
    options = train_options(
        {**BASE, "student": Path("s.pt"), "teacher": "t.pt", "kd": kd, "imgsz": [32, 64], "scale": (0.5, 2.0),
         "augmentations": augmentations, "resume": None}
    )  # fmt: skip
    assert options.kd == kd
    assert options.student == "s.pt"
    assert options.ultralytics == {
        "imgsz": [32, 64],
        "scale": (0.5, 2.0),
        "augmentations": augmentations,
        "data": "d.yaml",
    }
    assert train_options({**BASE, "kd": None, "teacher": None}) == train_options(BASE)
    assert train_options(
        {**BASE, "teacher": "t.pt", "kd": Path("cfg/kd") / "missing.txt"} | {"kd": "none", "teacher": None}
    )


def test_mistakes_in_a_mapping():
    assert mistakes(train_options, {**BASE, 3: 4, "teacher": "t.pt", "kd": {"losses": {"a": None}}})[0] == (
        "keys must be text, received 3."
    )
    (line,) = mistakes(train_options, {**BASE, "teacher": "t.pt", "kd": {"losses": {"a": None}}})
    assert line.startswith("kd.losses.a: unknown loss 'a'.")
    (line,) = mistakes(train_options, {**BASE, "teacher": "t.pt", "kd": 3})
    assert line.startswith("a recipe is a name, a path to a YAML file or a mapping, received 3.")
    (line,) = mistakes(train_options, {**BASE, "teacher": "t.pt", "kd.objectness.weight": -1})
    assert line.startswith("kd.objectness.weight: weight of loss 'objectness'")


def test_classes_are_read_with_the_other_keys(tmp_path):
    words = ["teacher=t.pt", "student=s.pt", "data=d.yaml"]
    kept = {"keep_conf": 0.05, "keep_blend": 0.65}
    found = parse_train([*words, "class_map={car:", "vehicle,", "truck: vehicle}"])
    assert found.class_options.to_keys() == {"class_map": {"car": "vehicle", "truck": "vehicle"}}
    assert parse_train([*words, "class_map={'car': 'a b'}"]).class_options.to_keys() == {"class_map": {"car": "a b"}}
    file = tmp_path / "experiment.yaml"
    file.write_text("class_map: {car: vehicle}\n")
    assert parse_train([*words, f"cfg={file}"]).class_options.to_keys() == {"class_map": {"car": "vehicle"}}
    assert parse_train([*words, f"cfg={file}", "class_map=index"]).class_options.to_keys() == {"class_map": "index"}
    assert parse_train([*words, "keep_classes=teacher"]).class_options.to_keys() == {"keep_classes": "teacher", **kept}
    assert parse_train(words).class_options.to_keys() == {}
    file.write_text("class_map: {car: [vehicle]}\nkeep_conf: 3\n")
    lines = mistakes(parse_train, [*words, f"cfg={file}"])
    assert [line.partition(" ")[2].split(":")[0].split(" must")[0] for line in lines] == ["class_map", "keep_conf"]
    assert "experiment.yaml:1" in lines[0]
    assert "experiment.yaml:2" in lines[1]


HELD_BY_THE_CHECKPOINT = {
    "student": "s.pt",
    "kd": "fgd",
    "inherit": "true",
    "random_teacher": "true",
    "class_map": "index",
    "keep_classes": "teacher",
    "keep_conf": "0.1",
    "keep_blend": "0.5",
    "unlabeled_ratio": "2",
    "unlabeled_mode": "both",
    "unlabeled_conf": "0.5",
    "unlabeled_low": "0.2",
    "unlabeled_iou": "0.5",
}


@pytest.mark.parametrize("key", HELD_BY_THE_CHECKPOINT)
def test_a_key_that_the_checkpoint_holds_is_refused_on_resume(key):
    with pytest.raises(ConfigError, match=f"{key} cannot be given with resume: it stands in the checkpoint"):
        parse_train(["resume=last.pt", f"{key}={HELD_BY_THE_CHECKPOINT[key]}"])


def test_every_key_is_refused_or_taken_anew_on_resume():
    assert set(OWN_KEYS) - {"kd.<loss>.<key>"} == CHANGEABLE | set(HELD_BY_THE_CHECKPOINT)


def test_own_keys_are_documented():
    assert set(OWN_KEYS) == {
        "teacher",
        "student",
        "data",
        "resume",
        "kd",
        "kd.<loss>.<key>",
        "cfg",
        "plugins",
        "inherit",
        "trust_checkpoints",
        "random_teacher",
        *CLASS_KEYS,
        *SPEED_KEYS,
        *UNLABELED_KEYS,
    }
    assert all(text and "\n" not in text for text in OWN_KEYS.values())


_KEYS = [
    "class_map",
    "teacher",
    "student",
    "data",
    "kd",
    "kd.objectness.weight",
    "resume",
    "epochs",
    "imgsz",
    "scale",
    "name",
    "x",
]
_WORD = st.one_of(
    st.text(max_size=8),
    st.builds(
        "{}={}".format, st.sampled_from(_KEYS), st.one_of(st.text(max_size=6), st.sampled_from(["[1,", "none", "1"]))
    ),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(_WORD, max_size=6))
@example(["a=" + "[" * 5000 + "]" * 5000])
@example(["a=0x" + "f" * 5000])
@example(["a='\\d'"])
@example(["epochs=0x" + "f" * 5000, *WORDS])
def test_any_words_are_options_or_a_config_error(words):
    for parse in (parse_assignments, parse_train):
        with suppress(ConfigError):
            parse(words)
