"""What every test needs: no network, no settings of the person who runs it, a tiny data set."""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
import signal
import tempfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


def _isolate() -> None:
    """Set the switches that Ultralytics reads while it is imported, hence before any test module is."""
    os.environ.setdefault("YOLO_OFFLINE", "1")
    os.environ.setdefault("YOLO_AUTOINSTALL", "false")
    os.environ.setdefault("MPLBACKEND", "Agg")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for subprocesses, as set_num_threads below for this one
    if "YOLO_CONFIG_DIR" not in os.environ:
        os.environ["YOLO_CONFIG_DIR"] = tempfile.mkdtemp(prefix="yolo_kd-tests-")
        _OWN.append(os.environ["YOLO_CONFIG_DIR"])
    # Plots ask for these fonts by name and wait seconds for a server when they are missing; any font will do.
    import matplotlib

    fonts = Path(os.environ["YOLO_CONFIG_DIR"]) / "Ultralytics"
    fonts.mkdir(parents=True, exist_ok=True)
    for name in ("Arial.ttf", "Arial.Unicode.ttf"):
        if not (fonts / name).exists():
            shutil.copyfile(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", fonts / name)

    # what runs in the background of a shell is born deaf to it, and so are its children
    signal.signal(signal.SIGINT, signal.default_int_handler)

    import torch

    torch.set_num_threads(1)  # the tensors of tests are small: more threads only wait for each other


_OWN: list[str] = []
_isolate()


def pytest_collection_finish() -> None:
    """Take what the imports made out of garbage collections, of which every teacher asks for one: each looks at all."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Undo that, and remove the settings folder, where it is ours."""
    gc.unfreeze()
    for folder in _OWN:
        shutil.rmtree(folder, ignore_errors=True)


def load_script(name: str) -> ModuleType:
    """Return `scripts/<name>.py` as a module; scripts are no package, so they cannot be imported by name."""
    spec = importlib.util.spec_from_file_location(f"scripts_{name}", ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path to the `data.yaml` of a tiny drawn set: 16 train, 8 val, 8 test images of 96 px, three classes."""
    folder = tmp_path_factory.mktemp("shapes")
    return load_script("make_shapes").make_shapes(folder, train=16, val=8, test=8, imgsz=96, seed=0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with public weights and data sets beside the repository; a test that asks for it skips without one."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs the folder of public weights and data beside the repository (../shared), which is absent")
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random detector of three classes."""
    from tests.support.models import narrow_checkpoint  # imports Ultralytics, which has to wait for the switches above

    return narrow_checkpoint("yolov8n", tmp_path_factory.mktemp("teacher"), width=0.25, seed=1)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smaller one."""
    from tests.support.models import narrow_checkpoint

    return narrow_checkpoint("yolov8n", tmp_path_factory.mktemp("student"), seed=2)


@pytest.fixture(scope="module")
def sure(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random detector that finds objects with probabilities from 0 to 1."""
    from tests.support.models import narrow_checkpoint

    return narrow_checkpoint("yolov8n", tmp_path_factory.mktemp("sure"), width=0.25, seed=1, sure=True)
