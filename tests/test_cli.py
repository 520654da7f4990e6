"""The command line: what it prints, what it refuses, and that a refusal leaves nothing behind."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ultralytics.cfg import DEFAULT_CFG_DICT
from ultralytics.nn.tasks import SegmentationModel

from tests.models import narrow_checkpoint, narrow_yaml
from yolo_kd.checkpoints import load_detector, restricted_loading
from yolo_kd.cli import main
from yolo_kd.errors import CheckpointError

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line and return exit code, output and error lines."""

    def runner(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(words)
        out, err = capsys.readouterr()
        return code, out, err

    return runner


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Checkpoints and data files, good and bad."""
    folder = tmp_path_factory.mktemp("files")
    paths = {
        "folder": folder,
        "text": folder / "text.pt",
        "empty": folder / "empty.pt",
        "foreign": folder / "foreign.pt",
    }
    paths["good"] = narrow_checkpoint("yolov8n", folder, file="good.pt")
    paths["two"] = narrow_checkpoint("yolov8n", folder, nc=2, names={0: "a", 1: "b"}, file="two.pt")
    paths["text"].write_text("not a pickle")
    paths["empty"].touch()
    torch.save({"weights": torch.zeros(3)}, paths["foreign"])
    segment = SegmentationModel(str(narrow_yaml("yolov8n-seg", folder / "seg")), nc=3, verbose=False)
    segment.args = dict(DEFAULT_CFG_DICT)
    paths["segment"] = folder / "segment.pt"
    torch.save({"epoch": -1, "model": segment, "train_args": {}}, paths["segment"])
    paths["noval"] = folder / "noval.yaml"
    paths["noval"].write_text(f"path: {folder}\ntrain: images\nnames: [circle, square, triangle]\n")
    paths["gone"] = folder / "gone.yaml"
    paths["gone"].write_text(f"path: {folder}\ntrain: images\nval: nowhere\nnames: [circle, square, triangle]\n")
    return {name: str(path) for name, path in paths.items()}


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.marker}",)


BAD = [
    (["train", "teacher={folder}/no.pt"], "teacher={folder}/no.pt does not exist."),
    (["train", "teacher={folder}/god.pt"], "Did you mean 'good.pt'?"),
    (["train", "teacher={text}"], "teacher={text} is not a loadable checkpoint"),
    (["train", "teacher={empty}"], "teacher={empty} is not a loadable checkpoint"),
    (["train", "teacher={foreign}"], "is not an Ultralytics checkpoint: it holds no model"),
    (["train", "teacher={folder}"], "is not a checkpoint: it must end in .pt"),
    (["train", "teacher={segment}"], "is a model for the task 'segment'; a detector"),
    (["train", "teacher={two}"], "knows 2 classes, data={shapes} has 3."),
    (
        ["train", "teacher=yolov8n-p6.yaml", "random_teacher=true"],
        "levels of stride 8, 16 or 32, the teacher's 8, 16, 32",
    ),
    (["train", "teacher=yolov8s.yaml"], "its weights would be random and teach nothing"),
    (["train", "teacher=rtdetr-l.yaml", "random_teacher=true"], "it ends in RTDETRDecoder"),
    (["train", "teacher={good}", "student={folder}/no.pt"], "student={folder}/no.pt does not exist."),
    (["train", "teacher={good}", "student={segment}"], "student={segment} is a model for the task 'segment'"),
    (["train", "teacher={good}", "student=yolov9000.yaml"], "student=yolov9000.yaml does not exist"),
    (["train", "teacher={good}", "data={folder}/no.yaml"], "data={folder}/no.yaml cannot be used"),
    (["train", "teacher={good}", "data={noval}"], "'val:' key missing"),
    (["train", "teacher={good}", "data={gone}"], "images not found"),
    (["train", "teacher={good}", "kd=objectnes"], "unknown recipe 'objectnes'. Did you mean 'objectness'?"),
    (["train", "teacher={good}", "kd.objectness.weight=-1"], "must be a number of at least 0"),
    (["train", "teacher={good}", "kd.objectness.wieght=1"], "Did you mean 'weight'?"),
    (["train", "teacher={good}", "kd=none"], "kd=none trains the student alone"),
    (["train", "teacher={good}", "epoch=3"], "Did you mean 'epochs'?"),
    (["train", "teacher={good}", "epochs=3", "epochs=4"], "key 'epochs' is given twice"),
    (["train", "teacher={good}", "distill_model=x.pt"], "kd=ultralytics"),
    (["train", "teacher={good}", "epochs"], "'epochs' is not key=value"),
    (["train", "teacher={good}", "task=segment"], "task=segment is not possible"),
    (["train", "resume={good}"], "was not written by a distillation"),
    (["train", "resume={folder}/last.pt"], "resume={folder}/last.pt does not exist"),
    (["train", "resume={good}", "kd=none"], "is a finished training"),
    (["export", "model={segment}"], "is a model for the task 'segment'"),
    (["export", "model={folder}/no.pt"], "does not exist"),
    (["export", "model={good}", "format=onx"], "Did you mean 'onnx'?"),
    (["export"], "no model: add model=<checkpoint>"),
    (["trian"], "unknown verb 'trian'. Did you mean 'train'?"),
    (["teacher=a.pt", "student=b.pt"], "A verb comes first"),
    (["losses", "fdg"], "unknown loss 'fdg'. Did you mean 'fgd'?"),
    (["recipes", "objectnes"], "unknown recipe 'objectnes'. Did you mean 'objectness'?"),
    (["losses", "a", "b"], "takes at most one name"),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=[" ".join(words) for words, _ in BAD])
def test_bad_input_is_a_sentence(
    words: list[str], message: str, run: Run, files: dict, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {**files, "shapes": str(shapes)}
    words = [w.format(**names) for w in words]
    if words[0] == "train" and not any(w.startswith("resume=") for w in words):
        defaults = {"student": files["good"], "data": str(shapes), "project": str(tmp_path / "out")}
        words += [f"{k}={v}" for k, v in defaults.items() if not any(w.startswith(f"{k}=") for w in words)]
    before = {p: p.stat().st_mtime_ns for p in Path(files["folder"]).rglob("*")}
    code, _, err = run(*words)
    assert code == 2
    assert message.format(**names) in err
    assert err.startswith("error: ")
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())
    assert {p: p.stat().st_mtime_ns for p in Path(files["folder"]).rglob("*")} == before


def test_a_recipe_with_mistakes_names_them_all(run: Run, files: dict, shapes: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("losses:\n  objectness:\n    weight: 1e-3\n    lam_cls: -1\n  fdg:\n")
    code, _, err = run(
        "train", f"teacher={files['good']}", f"student={files['good']}", f"data={shapes}", f"kd={recipe}"
    )
    assert code == 2
    assert [line.split(": ")[1] for line in err.splitlines()] == [f"{recipe}:3", f"{recipe}:5", f"{recipe}:4"] or (
        len(err.splitlines()) == 3
    )


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_checkpoint_that_runs_code_is_refused_by_name(
    role: str, run: Run, files: dict, shapes: Path, tmp_path: Path
) -> None:
    marker, bad = tmp_path / "ran", tmp_path / "bad.pt"
    torch.save({"model": Evil(marker), "train_args": {}}, bad)
    given = {"teacher": files["good"], "student": files["good"], role: str(bad)}
    code, _, err = run("train", *(f"{k}={v}" for k, v in given.items()), f"data={shapes}", f"project={tmp_path}")
    assert code == 2
    assert f"{role}={bad} was refused" in err
    assert ".system" in err
    assert "trust_checkpoints=true" in err
    assert not marker.exists()


def test_a_pickle_without_a_zip_is_refused(tmp_path: Path) -> None:
    marker, bad = tmp_path / "ran", tmp_path / "bad.pt"
    bad.write_bytes(pickle.dumps(Evil(marker)))
    with pytest.raises(CheckpointError):
        load_detector(bad)
    assert not marker.exists()


def test_a_download_that_fails_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from ultralytics.nn import tasks

    def offline(*_args: object, **_keys: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tasks, "torch_safe_load", offline)
    with pytest.raises(CheckpointError, match=r"teacher=yolov8s.pt is not here and could not be downloaded"):
        load_detector("yolov8s.pt", role="teacher")


def test_trust_is_explicit_and_ends(files: dict, tmp_path: Path) -> None:
    from ultralytics.nn import tasks

    before = tasks.SAFE_LOAD
    with restricted_loading(trust=True):
        assert tasks.SAFE_LOAD is False
    with restricted_loading():
        assert tasks.SAFE_LOAD is True
    assert tasks.SAFE_LOAD is before
    marker, bad = tmp_path / "ran", tmp_path / "bad.pt"
    torch.save({"model": Evil(marker), "train_args": {}}, bad)
    with pytest.raises(CheckpointError, match="holds no model"):
        load_detector(bad, trust=True)
    assert marker.exists()  # that is what trust means


def test_a_good_file_passes_the_restricted_loader(files: dict) -> None:
    detector = load_detector(files["good"])
    assert len(detector.sha256) == 64
    assert not detector.model.training
    assert zipfile.is_zipfile(detector.path)


def test_help_version_losses_recipes(run: Run) -> None:
    code, out, _ = run("help")
    assert code == 0
    assert "yolo-kd train" in out
    assert run("--help")[1] == out
    assert run()[1] == out
    assert run("version")[1].startswith("yolo-kd ")
    code, out, _ = run("losses")
    assert code == 0
    assert {"objectness", "objectness_l2", "ultralytics"} <= {line.split()[0] for line in out.splitlines() if line}
    code, out, _ = run("losses", "objectness")
    assert any(line.split()[:2] == ["lam_cls", "1.0"] and "class term" in line for line in out.splitlines())
    assert "weight (a number, or auto" in out
    code, out, _ = run("recipes")
    assert {"objectness", "ultralytics"} <= {line.split()[0] for line in out.splitlines() if line}
    assert "losses:" in run("recipes", "objectness")[1]


def test_every_key_of_every_loss_has_a_meaning(run: Run) -> None:
    from yolo_kd.losses.base import parameters, registered

    for name, loss in registered().items():
        code, out, _ = run("losses", name)
        assert code == 0
        table = out[out.index("key ") :].split("\n\n")[0].splitlines()[1:]
        assert [line.split()[0] for line in table] == list(parameters(loss))
        assert all(len(line.split()) > 4 for line in table), name


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(CheckpointError):
        main(["export", "model=nowhere/no.pt", "--debug"])


@pytest.mark.e2e
def test_train_and_export_from_the_command_line(
    run: Run, files: dict, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two commands of the README, and the same from an experiment file."""
    monkeypatch.chdir(tmp_path)
    teacher = narrow_checkpoint("yolo11n", tmp_path, width=0.25, seed=4)
    experiment = tmp_path / "experiment.yaml"
    experiment.write_text(
        f"teacher: {teacher}\nstudent: {files['good']}\ndata: {shapes}\nkd:\n  losses:\n    objectness: {{weight: 2}}\n"
        f"epochs: 9\nimgsz: 64\nplots: false\nproject: {tmp_path}/runs\nname: kd\n"
    )
    assert main(["train", f"cfg={experiment}", "epochs=1", "kd.objectness.weight=0.5"]) == 0
    best = tmp_path / "runs" / "kd" / "weights" / "best.pt"
    assert best.exists()
    assert "weight: 0.5" in (tmp_path / "runs" / "kd" / "kd.yaml").read_text()
    assert main(["export", f"model={best}", "format=onnx", "imgsz=64"]) == 0
    assert best.with_suffix(".onnx").exists()
    assert best.with_suffix(".parity.json").exists()


@pytest.mark.e2e
def test_self_distillation_is_a_warning(files: dict, shapes: Path, tmp_path: Path) -> None:
    from ultralytics.utils import LOGGER

    lines: list[str] = []
    LOGGER.addFilter(lambda record: lines.append(record.getMessage()) or True)
    try:
        words = [f"teacher={files['good']}", f"student={files['good']}", f"data={shapes}", f"project={tmp_path}"]
        assert main(["train", *words, "epochs=1", "imgsz=64", "plots=false"]) == 0
    finally:
        LOGGER.filters.pop()
    assert any("this is self-distillation" in line for line in lines)
