"""The command line: what it prints, what it refuses, and that a refusal leaves nothing behind."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support.models import narrow_checkpoint
from yolo_kd.cli import main
from yolo_kd.errors import CheckpointError
from yolo_kd.safe_loading.checkpoint import load_detector
from yolo_kd.safe_loading.restricted import restricted_loading

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
    """A good checkpoint; bad input is the business of test_bad_input.py."""
    return {"good": str(narrow_checkpoint("yolov8n", tmp_path_factory.mktemp("files"), file="good.pt"))}


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.marker}",)


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
    verbs = [line.split()[0] for line in out.split("\n\n")[1].splitlines()]
    assert verbs == ["train", "check", "compare", "export", "losses", "recipes", "schema", "version", "help"]
    assert run("--help")[1] == out
    assert run()[1] == out
    assert run("version")[1].startswith("yolo-kd ")
    code, out, _ = run("losses")
    assert code == 0
    assert {"objectness", "objectness_l2", "ultralytics"} <= {line.split()[0] for line in out.splitlines() if line}
    code, out, _ = run("losses", "objectness")
    assert "  lam_cls=  " in out
    assert "(default 1.0)" in out
    assert "a number of at least 0 or auto" in out
    code, out, _ = run("recipes")
    assert {"objectness", "ultralytics"} <= {line.split()[0] for line in out.splitlines() if line}
    assert "losses:" in run("recipes", "objectness")[1]


def test_every_key_of_every_loss_has_a_meaning(run: Run) -> None:
    from yolo_kd.losses.base import parameters, registered

    for name, loss in registered().items():
        code, out, _ = run("losses", name)
        assert code == 0
        block = out.partition("\nKeys:\n")[2].partition("\n\n")[0]
        rows = [line for line in block.splitlines() if line[2] != " "]
        assert [line.split()[0] for line in rows] == [f"{key}=" for key in parameters(loss)]
        assert all(len(line.split()) > 3 for line in rows), name


@pytest.mark.parametrize("verb", ["train", "check", "compare", "export"])
def test_help_of_a_verb_explains_its_keys(verb: str, run: Run) -> None:
    from yolo_kd.config.train_options import OWN_KEYS

    code, out, _ = run(verb, "--help")
    assert code == 0
    keys = {line.split()[0] for line in out.splitlines() if line.startswith("  ") and line[2:3].strip()}
    expected = {"model", "format", "images"} if verb == "export" else {*OWN_KEYS, "data", "resume"}
    assert {f"{key}=" for key in expected} <= keys
    assert max(map(len, out.splitlines())) <= 120


@pytest.mark.parametrize("verb", ["losses", "recipes", "schema", "version", "help"])
def test_help_of_a_verb_without_keys(verb: str, run: Run) -> None:
    code, out, _ = run(verb, "--help")
    assert code == 0
    assert out.startswith(f"yolo-kd {verb}: ")


def test_schemas_are_printed(run: Run) -> None:
    code, out, _ = run("schema", "recipe")
    assert code == 0
    assert json.loads(out)["title"] == "yolo-kd recipe"
    assert json.loads(run("schema", "experiment")[1])["properties"]["epochs"]["type"] == "integer"
    code, _, err = run("schema", "recipes")
    assert code == 2
    assert "write yolo-kd schema recipe or experiment, received recipes" in err


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
