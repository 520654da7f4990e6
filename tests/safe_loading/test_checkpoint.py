"""Hostile files: nothing runs, nothing is written, memory stays bounded, and the error is one sentence."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import pickletools
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from ultralytics import YOLO
from ultralytics.data import dataset as ultralytics_dataset
from ultralytics.data.utils import load_dataset_cache_file, save_dataset_cache_file
from ultralytics.nn import tasks
from ultralytics.utils import torch_utils

from tests.support.hostile import ATTACKS, INSTRUCTIONS, MARKER, RUNS_CODE, WRITTEN, Call, archive, bomb, pickled
from tests.support.models import FAMILIES, narrow_checkpoint
from yolo_kd import DistillationTrainer, export_model
from yolo_kd.cli import main
from yolo_kd.errors import CheckpointError
from yolo_kd.safe_loading import pickle_scan
from yolo_kd.safe_loading.archive import inspect
from yolo_kd.safe_loading.checkpoint import load_checkpoint_file, load_detector
from yolo_kd.safe_loading.dataset import read_label_cache, restricted_data
from yolo_kd.safe_loading.pickle_scan import Refused
from yolo_kd.safe_loading.restricted import restricted_loading


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return narrow_checkpoint("yolov8n", tmp_path_factory.mktemp("good"))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory, good: Path) -> Path:
    """A folder with one file per attack, named after it."""
    folder = tmp_path_factory.mktemp("hostile")
    for name, (write, _) in ATTACKS.items():
        write(file_of(folder, name), good)
    return folder


def file_of(folder: Path, attack: str) -> Path:
    return folder / f"{re.sub(r'[^a-zA-Z0-9]', '_', attack)}.pt"


def listing(folder: Path) -> dict[str, int]:
    return {str(path): path.lstat().st_ctime_ns for path in folder.rglob("*")}


@pytest.fixture
def alone(tmp_path: Path, hostile: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Work in an empty folder, in which nothing may appear, without a way to install or fetch anything."""

    def forbidden(*words: Any, **keys: Any) -> None:
        raise AssertionError(f"tried to fetch or install {words}")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tasks, "check_requirements", forbidden)
    monkeypatch.setattr("ultralytics.utils.downloads.safe_download", forbidden)
    monkeypatch.setattr("ultralytics.utils.checks.check_requirements", forbidden)
    before = listing(hostile)
    yield
    assert not list(tmp_path.rglob("*"))
    assert not list(tmp_path.parent.glob(MARKER))
    assert listing(hostile) == before


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("attack", ATTACKS)
def test_the_loader_refuses(attack: str, hostile: Path) -> None:
    path = file_of(hostile, attack)
    with pytest.raises(CheckpointError, match=rf"(?s)^student={re.escape(str(path))}.*({ATTACKS[attack][1]})") as info:
        load_detector(path, role="student")
    assert len(str(info.value).splitlines()) == 1


DOORS = {
    "teacher": "train teacher={bad} student={good} data={data}",
    "student": "train teacher={good} student={bad} data={data}",
    "pretrained": "train teacher={good} student={good} pretrained={bad} data={data}",
    "resume": "train resume={bad}",
    "model": "export model={bad}",
}


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("attack", ["os.system", "builtins.eval", "file write", "nested pickle", "bomb", "expanded"])
def test_every_door_is_closed(
    door: str, attack: str, hostile: Path, good: Path, shapes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = file_of(hostile, attack)
    assert main(DOORS[door].format(bad=bad, good=good, data=shapes).split()) == 2
    err = capsys.readouterr().err
    assert re.search(rf"^error: {door}={re.escape(str(bad))} was refused: .*{ATTACKS[attack][1]}", err), err
    assert len(err.splitlines()) == 1


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("attack", ["os.system", "bomb"])
def test_python_is_a_door_too(attack: str, hostile: Path, good: Path, shapes: Path) -> None:
    bad, data = str(file_of(hostile, attack)), str(shapes)
    with pytest.raises(CheckpointError, match=r"teacher=.* was refused"):
        DistillationTrainer(overrides={"teacher": bad, "model": str(good), "data": data})
    with pytest.raises(CheckpointError, match=r"student=.* was refused"):
        DistillationTrainer(overrides={"kd": "none", "model": bad, "data": data})
    with pytest.raises(CheckpointError, match=r"resume=.* was refused"):
        DistillationTrainer(overrides={"resume": bad})
    with pytest.raises(CheckpointError, match=r"model=.* was refused"):
        export_model(bad)


@pytest.mark.usefixtures("alone")
def test_the_loads_of_ultralytics_are_looked_at(hostile: Path) -> None:
    """Resume, recovery and the final evaluation call these; none of them takes an argument for it."""
    bad = file_of(hostile, "os.system")
    with restricted_loading():
        for load in (tasks.load_checkpoint, tasks.torch_safe_load, YOLO):
            with pytest.raises(Refused, match=rf"{bad.name} was refused"):
                load(str(bad))
        assert torch_utils.strip_optimizer(bad) == {}


def test_a_bad_best_beside_the_checkpoint_to_resume(tmp_path: Path, good: Path, hostile: Path, shapes: Path) -> None:
    """When the training ends Ultralytics opens best.pt, whoever wrote it."""
    weights = tmp_path / "run" / "weights"
    weights.mkdir(parents=True)
    content = torch.load(good, weights_only=False)
    args = {"data": str(shapes), "save_dir": str(weights.parent), "epochs": 4}
    torch.save({**content, "epoch": 1, "optimizer": {}, "train_args": args}, weights / "last.pt")
    (weights / "best.pt").write_bytes(file_of(hostile, "os.system").read_bytes())
    with pytest.raises(CheckpointError, match=r"best\.pt was refused"):
        DistillationTrainer(overrides={"resume": str(weights / "last.pt"), "kd": "none"})
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["best.pt", "last.pt", "run", "weights"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's account of a process's peak")
@pytest.mark.e2e
def test_memory_stays_bounded(hostile: Path, good: Path) -> None:
    """The peak of each refusal, above what the process holds already; getrusage would count the parent's."""
    code = """
import json, re, sys
from pathlib import Path
from yolo_kd.safe_loading.checkpoint import load_detector
from yolo_kd.errors import CheckpointError
from yolo_kd.safe_loading import pickle_scan
load_detector(sys.argv[1], role="student")
status = lambda key: int(re.search(rf"{key}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
growth = {}
for path in sys.argv[2:]:
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    try:
        load_detector(path, role="student")
    except CheckpointError:
        growth[Path(path).stem] = round(status("VmHWM") - before, 1)
print(json.dumps(growth))
"""
    files = [str(file_of(hostile, attack)) for attack in ATTACKS]
    done = subprocess.run([sys.executable, "-c", code, str(good), *files], capture_output=True, text=True, check=True)
    growth = json.loads(done.stdout.splitlines()[-1])
    assert set(growth) == {Path(file).stem for file in files}
    print(growth)
    assert max(growth.values()) < 64, growth


def test_the_bomb_is_one(tmp_path: Path) -> None:
    """The test above would prove nothing with a file that no one can unpack."""
    path = bomb(tmp_path / "bomb.pt")
    assert path.stat().st_size < 1.2e6
    with zipfile.ZipFile(path) as file:
        assert sum(info.file_size for info in file.infolist()) > 10 * 2**30
        with file.open("x/data/0") as record:
            assert record.read(1 << 22) == bytes(1 << 22)


def test_the_attacks_run_where_they_are_trusted(hostile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So do the others above: what is refused there does harm."""
    monkeypatch.chdir(tmp_path)
    for attack in ("os.system", "builtins.eval", "builtins.exec", "nested pickle", "file write"):
        with pytest.raises(CheckpointError, match="holds no model"):
            load_checkpoint_file(file_of(hostile, attack), trust=True)
        (tmp_path / MARKER).unlink()


def test_ultralytics_own_restriction_would_build_what_is_refused_here(tmp_path: Path) -> None:
    """Names alone do not decide: a layer may be named, but not be called with a size."""
    path = archive(tmp_path / "x.pt", pickled({"model": Call(nn.Linear, 3, 5)}))
    checkpoint, _ = tasks.torch_safe_load(str(path), safe_only=True)
    assert checkpoint["model"].weight.shape == (5, 3)
    with pytest.raises(Refused, match="Linear"):
        inspect(path)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoints_of_every_family_pass(family: str, tmp_path: Path) -> None:
    path = narrow_checkpoint(family, tmp_path)
    assert load_detector(path, role="student").model.names == {0: "circle", 1: "square", 2: "triangle"}


@pytest.mark.parametrize("name", ["yolov8n.pt", "yolov8s.pt"])
def test_published_checkpoints_pass(name: str, shared: Path) -> None:
    inspect(shared / "weights" / name)
    assert len(load_detector(shared / "weights" / name, role="student").model.names) == 80


def test_an_instruction_reaches_only_the_step_of_the_table() -> None:
    """An instruction must not find a step by the likeness of their names, as POP_MARK once did."""
    walk = pickle_scan._Walk({})
    names = {name.strip("_") for name in dir(walk)} | {name.strip("_").lower() for name in vars(pickle_scan)}
    alike = {opcode.name for opcode in pickletools.opcodes if opcode.name.lower() in names}
    assert {"BUILD", "MARK", "REDUCE"} <= alike, "the test would prove nothing"
    assert pickle_scan._STEPS.keys() == WRITTEN
    assert {f"instruction {name}" for name in alike - WRITTEN} <= INSTRUCTIONS.keys()
    assert "instruction POP_MARK" in INSTRUCTIONS


def test_every_attack_that_runs_code_is_named() -> None:
    assert {"os.system", "builtins.eval", "file write", "nested pickle", "install"} <= set(RUNS_CODE)


# ---------------------------------------------------------------------------------------------------------- data sets
def test_a_label_cache_is_read_without_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with open("evil.cache", "wb") as file:
        np.save(file, {"labels": Call(os.system, f"touch {MARKER}")}, allow_pickle=True)
    with restricted_data(), pytest.raises(pickle.UnpicklingError, match="system"):
        ultralytics_dataset.load_dataset_cache_file(Path("evil.cache"))
    assert not Path(MARKER).exists()
    load_dataset_cache_file(Path("evil.cache"))
    assert Path(MARKER).exists()  # as Ultralytics would have done


def test_a_good_label_cache_is_read_as_ultralytics_reads_it(tmp_path: Path) -> None:
    labels = {"im_file": "a.jpg", "cls": np.zeros((2, 1), np.float32), "bboxes": np.ones((2, 4)), "shape": (3, 4)}
    content = {"labels": [labels], "hash": "x", "results": (1, 0, 0, 0, 1), "msgs": []}
    path = tmp_path / "labels.cache"
    save_dataset_cache_file("", path, content, "1.0")
    ours, theirs = read_label_cache(path), load_dataset_cache_file(path)
    assert ours.keys() == theirs.keys()
    np.testing.assert_equal(ours["labels"], theirs["labels"])


def test_the_scripts_of_shipped_data_files_are_left_alone() -> None:
    from ultralytics.data import utils
    from ultralytics.utils import ROOT

    with restricted_data() as left_out:
        assert "import" in utils.YAML.load(ROOT / "cfg" / "datasets" / "VOC.yaml")["download"]
        assert not left_out


def test_restrictions_last_until_the_last_holder_leaves() -> None:
    """Two trainings in one process overlap, and the one that began first ends first."""
    plain = ultralytics_dataset.load_dataset_cache_file, tasks.SAFE_LOAD
    first, second = restricted_loading(), restricted_loading()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert ultralytics_dataset.load_dataset_cache_file is read_label_cache
    assert tasks.SAFE_LOAD
    second.__exit__(None, None, None)
    assert (ultralytics_dataset.load_dataset_cache_file, tasks.SAFE_LOAD) == plain


def test_restrictions_end(good: Path) -> None:
    before = tasks._SafeLoad, tasks.SAFE_LOAD, torch_utils.torch_load, ultralytics_dataset.load_dataset_cache_file
    with contextlib.suppress(ZeroDivisionError), restricted_loading():
        assert tasks._SafeLoad is not before[0]
        raise ZeroDivisionError
    after = tasks._SafeLoad, tasks.SAFE_LOAD, torch_utils.torch_load, ultralytics_dataset.load_dataset_cache_file
    assert after == before
