"""Several processes at once: two that train one student together over gloo, and many that train beside each other."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import yolo_kd.losses  # noqa: F401  (registers the losses that ship with the package)
from tests.support.models import narrow_checkpoint
from yolo_kd.losses.base import registered

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[1]

PER_IMAGE = {"at", "cwd standardise=false", "mgd standardise=false", "mimic standardise=false", "objectness_l2"}
"""Means over images: two halves are worth what the whole is."""

COUNTS = "divided by a count or a sum of weights over the images of one process, as the native loss is"
STATISTICS = "means and deviations of each channel over the images of one process"
DIFFERING: dict[str, tuple[str, float]] = {
    "bckd": (COUNTS, 1.8),
    "crosskd": (f"{COUNTS}; the student's features take the teacher's scale by {STATISTICS}", 2.0),
    "cwd standardise=true": (STATISTICS, 0.02),
    "dfl": (COUNTS, 0.04),
    "fgd": (COUNTS, 0.01),
    "fgfi": (COUNTS, 0.02),
    "holistic": (f"the critic normalises its input by {STATISTICS}", 0.04),
    "ld": (COUNTS, 0.01),
    "mgd standardise=true": (STATISTICS, 0.001),
    "mimic standardise=true": (STATISTICS, 0.003),
    "objectness": (COUNTS, 0.02),
    "pkd": (STATISTICS, 0.003),
    "reviewkd": (f"its fusion modules have batch normalisation: {STATISTICS}", 0.02),
    "sea": ("anchors of each class are means over the images of one process, and classes absent there have none", 0.3),
    "structured": (f"the class term is {COUNTS}", 0.005),
    "ultralytics": (COUNTS, 0.002),
}
"""What differs, and by how much at most the value does on the halves of `tests/gloo.py`, which are very unequal."""


def two(job: str, *arguments: object) -> None:
    """Run a job of `tests/gloo.py` in two processes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "tests.support.gloo", job, *map(str, arguments)]
    started = []
    for rank in ("0", "1"):
        place = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        environment = {**os.environ, **place, "PYTHONPATH": str(ROOT)}
        started.append(
            subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    said = [process.communicate(timeout=900)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(text[-3000:] for text in said)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict[str, float]]]:
    """Return what two processes differ in from one, by kind of halves and loss."""
    folder = tmp_path_factory.mktemp("gloo")
    found = {}
    for halves in ("different", "equal"):
        two("losses", folder / halves, halves)
        found[halves] = json.loads((folder / halves).read_text())
    return found


def test_every_loss_is_in_one_list() -> None:
    names = [*PER_IMAGE, *DIFFERING]
    assert len(names) == len(set(names))
    assert {name.split()[0] for name in names} == set(registered())


def test_the_documentation_lists_them_all() -> None:
    told = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8").partition("(DDP).**")[2].partition("\n**")[0]
    listed = [line.split("`")[1] for line in told.splitlines() if line.startswith("| `")]
    assert listed == sorted({name.split()[0] for name in DIFFERING})
    before = told.partition("| Loss |")[0]
    assert all(f"`{name.split()[0]}`" in before for name in PER_IMAGE)


def test_every_variant_was_compared(compared: dict) -> None:
    for found in compared.values():
        assert set(found) == PER_IMAGE | set(DIFFERING)


@pytest.mark.parametrize("name", sorted(PER_IMAGE))
def test_two_halves_equal_the_whole(name: str, compared: dict) -> None:
    found = compared["different"][name]
    assert max(found["value"], found["student"], found["beside"]) < 1e-5


@pytest.mark.parametrize("name", sorted(DIFFERING))
def test_what_is_listed_differs_within_bounds(name: str, compared: dict) -> None:
    found, (_, bound) = compared["different"][name], DIFFERING[name]
    assert max(found["value"], found["student"], found["beside"]) > 1e-4, "it belongs into the other list"
    assert found["value"] < bound


@pytest.mark.parametrize("name", sorted(PER_IMAGE | set(DIFFERING)))
def test_processes_with_the_same_images_agree_with_one(name: str, compared: dict) -> None:
    """So nothing but those counts and statistics differs; the number of processes itself is no factor."""
    found = compared["equal"][name]
    assert max(found["value"], found["student"], found["beside"]) < 1e-5


@pytest.mark.parametrize("name", sorted(PER_IMAGE | set(DIFFERING)))
def test_no_term_is_zero_on_either(name: str, compared: dict) -> None:
    assert compared["different"][name]["smallest"] > 1e-4


# -------------------------------------------------------------------------------------------------------- training
@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> list[dict]:
    """Return what each of two processes noted in a real training of three epochs."""
    folder = tmp_path_factory.mktemp("together")
    teacher = narrow_checkpoint("yolov8n", folder, width=0.25, seed=1, file="teacher.pt")
    student = narrow_checkpoint("yolov8n", folder, seed=2, file="student.pt")
    two("train", folder / "seen", shapes, student, teacher)
    return [json.loads((folder / f"seen.{rank}").read_text()) for rank in (0, 1)]


def test_adapters_start_from_one_draw(trained: list[dict]) -> None:
    ours, theirs = ([before for before, _ in t["broadcast"]] for t in trained)
    assert ours != theirs  # each process drew its own
    assert [after for _, after in trained[0]["broadcast"]] == [after for _, after in trained[1]["broadcast"]] == ours
    assert trained[0]["start"] == trained[1]["start"]


def test_student_adapters_and_critic_stay_identical(trained: list[dict]) -> None:
    steps = [t["steps"] for t in trained]
    assert len(steps[0]) == 6
    assert steps[0] == steps[1]
    assert len({step["student"] for step in steps[0]}) == 6  # and they do move
    assert len({step["distiller"] for step in steps[0]}) == 6


def test_gradients_of_adapters_are_averaged(trained: list[dict]) -> None:
    ours, theirs = (t["reduced"] for t in trained)
    assert len(ours) == len(theirs) > 50
    assert sum(a[0] != b[0] for a, b in zip(ours, theirs, strict=True)) > 0.5 * len(ours)  # some parts start at zero
    for (a, whole), (b, same) in zip(ours, theirs, strict=True):
        assert whole == same
        assert math.isclose(a + b, whole, rel_tol=1e-3, abs_tol=1e-4)


def test_no_term_is_silently_zero_in_training(trained: list[dict]) -> None:
    for process in trained:
        assert process["audit"] == ["objectness", "ultralytics", "fgd", "holistic"]
        for step in process["columns"]:
            assert all(math.isfinite(v) and v != 0 for v in step.values()), step
    assert trained[0]["columns"] != trained[1]["columns"]  # each sees images of its own


def test_a_bad_batch_of_one_process_parts_nothing(trained: list[dict]) -> None:
    """The second process skips one batch; the steps compared above include that one."""
    assert [t["skipped"] for t in trained] == [0, 1]
