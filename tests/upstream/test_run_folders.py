"""Trainings that start at the same moment get folders of their own, and a label cache is never read half-written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ultralytics.cfg import get_save_dir
from ultralytics.data import dataset
from ultralytics.data.utils import load_dataset_cache_file
from ultralytics.engine import trainer as engine
from ultralytics.utils.dist import generate_ddp_command

from tests.engine.test_trainer import make
from tests.support.models import narrow_checkpoint
from yolo_kd.errors import ConfigError
from yolo_kd.upstream.run_folders import claim, exclusive_run_folder, keep_folder, save_cache, shared_data

ROOT = Path(__file__).parents[2]


def arguments(project: Path, **keys: Any) -> SimpleNamespace:
    given = {"project": str(project), "name": "run", "task": "detect", "mode": "train", "exist_ok": False}
    return SimpleNamespace(**{**given, **keys})


# --------------------------------------------------------------------------------------------------------- folders
def test_names_are_ultralytics_own(tmp_path: Path) -> None:
    names = [claim(get_save_dir, arguments(tmp_path)).name for _ in range(3)]
    assert names == ["run", "run-2", "run-3"]
    assert get_save_dir(arguments(tmp_path)).name == "run-4"


@pytest.mark.parametrize("keys", [{"exist_ok": True}, {"save_dir": "given"}])
def test_a_folder_that_the_user_chose_stays_shared(tmp_path: Path, keys: dict) -> None:
    keys = {k: str(tmp_path / v) if k == "save_dir" else v for k, v in keys.items()}
    folders = {claim(get_save_dir, arguments(tmp_path, **keys)) for _ in range(2)}
    assert len(folders) == 1
    assert not folders.pop().exists()


def test_a_process_that_another_started_takes_what_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("yolo_kd.upstream.run_folders.RANK", 1)
    assert not claim(get_save_dir, arguments(tmp_path)).exists()


def test_between_looking_and_making(tmp_path: Path) -> None:
    """Another process makes the folder after we found its name free, three times in a row."""
    taken: list[Path] = []

    def overtaken(args: Any, name: str | None = None) -> Path:
        folder = get_save_dir(args, name)
        if len(taken) < 3:
            folder.mkdir(parents=True)
            taken.append(folder)
        return folder

    ours = claim(overtaken, arguments(tmp_path))
    assert ours.name == "run-4"
    assert ours not in taken


def test_threads_at_the_same_moment(tmp_path: Path) -> None:
    barrier = Barrier(16)

    def start(_: int) -> list[Path]:
        barrier.wait()
        return [claim(get_save_dir, arguments(tmp_path)) for _ in range(10)]

    with ThreadPoolExecutor(16) as pool:
        folders = [folder for some in pool.map(start, range(16)) for folder in some]
    assert len(set(folders)) == 160


def test_what_is_replaced_comes_back(tmp_path: Path) -> None:
    """Also when two trainings overlap in one process and the first is the first to end."""
    before = engine.get_save_dir, engine.generate_ddp_command, dataset.save_dataset_cache_file
    first, second = exclusive_run_folder(), exclusive_run_folder()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert engine.get_save_dir is not before[0]
    assert engine.get_save_dir(arguments(tmp_path)).is_dir()
    second.__exit__(None, None, None)

    @shared_data()
    def fail() -> None:
        assert dataset.save_dataset_cache_file is not before[2]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (engine.get_save_dir, engine.generate_ddp_command, dataset.save_dataset_cache_file) == before


def test_a_launch_of_several_processes_does_not_free_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ultralytics removes the folder before it starts them; in between another training could take its name."""
    monkeypatch.setattr("ultralytics.utils.dist.generate_ddp_file", lambda trainer: "file.py")
    folder = claim(get_save_dir, arguments(tmp_path))
    trainer = SimpleNamespace(resume=False, save_dir=folder, world_size=2)
    command, file = keep_folder(generate_ddp_command, trainer)
    assert "torch.distributed.run" in command
    assert file == "file.py"
    assert trainer.save_dir == folder
    assert folder.is_dir()


def started_together(
    folder: Path, script: str, arguments: list[tuple[object, ...]], stderr: int | None = None
) -> list[subprocess.Popen[str]]:
    """Start a process for each tuple of arguments, and let all go on once the last one is ready."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "YOLO_VERBOSE": "false"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", script, *map(str, given)],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=environment,
        )
        for given in arguments
    ]
    while len(list(folder.glob("ready-*"))) < len(arguments):
        assert all(p.poll() is None for p in started)
        time.sleep(0.01)
    (folder / "go").touch()
    return started


START = """
import sys, time, json
from pathlib import Path
import tests.conftest
from tests.engine.test_trainer import make
folder, data, model, teacher, me = sys.argv[1:]
(Path(folder) / f"ready-{me}").touch()
while not (Path(folder) / "go").exists():
    time.sleep(0.001)
keys = {"teacher": teacher, "kd": "objectness", "exist_ok": False}
print(json.dumps([str(make(Path(folder) / "project", Path(data), Path(model), **keys).save_dir) for _ in range(5)]))
"""


@pytest.mark.e2e
def test_trainers_at_the_same_moment(tmp_path: Path, shapes: Path) -> None:
    model = narrow_checkpoint("yolov8n", tmp_path, seed=1)
    started = started_together(tmp_path, START, [(tmp_path, shapes, model, model, me) for me in range(3)])
    folders = [folder for p in started for folder in json.loads(p.communicate()[0].splitlines()[-1])]
    assert len(set(folders)) == 15
    for folder in folders:
        assert f"save_dir: {folder}\n" in (Path(folder) / "args.yaml").read_text()


@pytest.mark.e2e
def test_a_trainer_still_makes_nothing_when_the_device_is_wrong(tmp_path: Path, shapes: Path) -> None:
    model = narrow_checkpoint("yolov8n", tmp_path, seed=1)
    with pytest.raises(ConfigError, match="device=7 is not here"):
        make(tmp_path / "project", shapes, model, teacher=str(model), kd="objectness", exist_ok=False, device="7")
    assert not (tmp_path / "project").exists()


# ---------------------------------------------------------------------------------------------------- label caches
def test_a_cache_is_what_ultralytics_reads(tmp_path: Path) -> None:
    path = tmp_path / "labels.cache"
    save_cache("train: ", path, {"labels": [1, 2]}, "1.0")
    assert load_dataset_cache_file(path) == {"labels": [1, 2], "version": "1.0"}
    assert [p.name for p in tmp_path.iterdir()] == ["labels.cache"]


def test_the_old_cache_is_there_until_the_new_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real, seen = tmp_path / "labels.cache", np.save, []
    save_cache("", path, {"n": 1}, "1.0")

    def slow(file: Any, x: Any) -> None:
        file.write(b"\x93NUMPY half")
        file.flush()
        seen.append(load_dataset_cache_file(path))
        file.seek(0)
        real(file, x)

    monkeypatch.setattr(np, "save", slow)
    save_cache("", path, {"n": 2}, "1.0")
    assert [x["n"] for x in (*seen, load_dataset_cache_file(path))] == [1, 2]


def test_a_folder_that_cannot_be_written_to_is_a_warning(tmp_path: Path) -> None:
    save_cache("", tmp_path / "absent" / "labels.cache", {"n": 1}, "1.0")
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_fails_half_way_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "labels.cache"
    save_cache("", path, {"n": 1}, "1.0")

    def full(file: Any, _: Any) -> None:
        file.write(b"some")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    save_cache("", path, {"n": 2}, "1.0")
    assert load_dataset_cache_file(path)["n"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["labels.cache"]


LOOP = """
import sys, time
from pathlib import Path
import tests.conftest
import numpy as np
from ultralytics.data import dataset
from ultralytics.data.utils import load_dataset_cache_file
from yolo_kd.upstream.run_folders import shared_data
path, me = Path(sys.argv[1]), int(sys.argv[2])
(path.parent / f"ready-{me}").touch()
while not (path.parent / "go").exists():
    time.sleep(0.001)
read, end = 0, time.monotonic() + 3
with shared_data():
    while time.monotonic() < end:
        rows = [me] * 20000
        dataset.save_dataset_cache_file("", path, {"labels": rows, "hash": me}, "1")
        for _ in range(3):
            found = load_dataset_cache_file(path)
            assert found["version"] == "1" and found["labels"] == [found["hash"]] * 20000
            read += found["hash"] != me
print(read)
"""


@pytest.mark.e2e
def test_processes_that_write_and_read_one_cache(tmp_path: Path) -> None:
    """Whatever is read is whole and from one writer, and each does see what the other wrote."""
    path = tmp_path / "labels.cache"
    started = started_together(tmp_path, LOOP, [(path, me) for me in range(2)], stderr=subprocess.PIPE)
    said = [p.communicate() for p in started]
    assert [p.returncode for p in started] == [0, 0], said
    assert all(int(out.split()[-1]) > 0 for out, _ in said)
    assert {p.name for p in tmp_path.iterdir()} == {"labels.cache", "go", "ready-0", "ready-1"}
