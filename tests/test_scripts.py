"""The scripts that the documentation quotes still run: their help, and the short ones in earnest."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import yaml
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionValidator

from tests.conftest import ROOT, load_script
from tests.support.models import narrow_checkpoint, narrow_yaml

# the hook of the documentation is no command
SCRIPTS = sorted(p.name for p in (ROOT / "scripts").glob("*.py") if p.name != "docs_hook.py")


def run(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / words[0]), *words[1:]]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


@pytest.mark.e2e
@pytest.mark.parametrize("name", SCRIPTS)
def test_help(name: str) -> None:
    found = run(name, "--help")
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip()


@pytest.mark.e2e
@pytest.mark.parametrize("unlabeled", [[], ["--unlabeled", "both"]])
def test_cost_of_recipes(unlabeled: list[str], tmp_path: Path) -> None:
    teacher = ["--teacher", str(narrow_checkpoint("yolov8n", tmp_path))] if unlabeled else []
    recipes = ["objectness", "crosskd", "mgd"]
    words = ["--imgsz", "64", "--batch", "2", "--rounds", "1", "--json", str(tmp_path / "figures.json")]
    found = run("bench_step.py", "--recipes", *recipes, *words, *teacher, *unlabeled)
    assert found.returncode == 0, found.stderr
    rows = ["student alone", "teacher, plain", "teacher, fast", "Ultralytics distill_model=", *recipes]
    assert [line.split("|")[1].strip() for line in found.stdout.splitlines() if line.startswith("| ")][1:] == rows
    figures = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert figures["Ultralytics distill_model="]["of_ultralytics"] == 1
    assert figures["mgd"]["modules_s"] > figures["objectness"]["modules_s"]  # generators against nothing


@pytest.mark.e2e
def test_profile_of_a_step() -> None:
    found = run("bench_step.py", "--recipes", "fgd", "--imgsz", "64", "--batch", "2", "--profile")
    assert found.returncode == 0, found.stderr
    assert "_PairMoments" in found.stdout


@pytest.mark.e2e
def test_strength_of_losses(shapes: Path, tmp_path: Path) -> None:
    teacher = narrow_checkpoint("yolov8n", tmp_path)
    words = ["--teacher", str(teacher), "--student", str(teacher), "--data", str(shapes), "--steps", "1"]
    found = run("measure_strength.py", *words, "--measure", "1", "--settings", "64x4", "--losses", "at", "crosskd")
    assert found.returncode == 0, found.stderr
    assert "| crosskd |" in found.stdout


@pytest.mark.e2e
def test_picture_of_masks(shapes: Path, tmp_path: Path) -> None:
    teacher, out = narrow_checkpoint("yolov8n", tmp_path), tmp_path / "masks.svg"
    found = run("gallery.py", "--teacher", str(teacher), "--data", str(shapes.parent), "--out", str(out))
    assert found.returncode == 0, found.stderr
    assert out.read_text().startswith("<?xml")


def test_hits_are_those_of_ultralytics_validation() -> None:
    script = load_script("agreement")
    rng = np.random.default_rng(3)
    centres, sizes = rng.uniform(20, 80, (40, 2)), rng.uniform(20, 40, (40, 2))
    boxes = np.concatenate([centres - sizes / 2, centres + sizes / 2], 1)
    rows = np.concatenate([boxes, np.sort(rng.uniform(size=(40, 1)))[::-1], rng.integers(0, 2, (40, 1))], 1)
    predicted, labels = rows[:25].astype(np.float32), rows[25:].astype(np.float32)
    labels[:8, :4] = predicted[:8, :4] + rng.normal(0, 2, (8, 4)).astype(np.float32)
    labels[:8, 5] = predicted[:8, 5]
    validator = DetectionValidator.__new__(DetectionValidator)
    validator.iouv = torch.linspace(0.5, 0.95, 10)
    iou = script.box_iou(torch.from_numpy(labels[:, :4]), torch.from_numpy(predicted[:, :4]))
    expected = validator.match_predictions(torch.from_numpy(predicted[:, 5]), torch.from_numpy(labels[:, 5]), iou)
    found = script.hits(predicted, labels)
    assert found[:, 0].sum() >= 8
    assert found.tolist() == expected.tolist()
    assert script.hits(predicted[:0], labels).shape == (0, 10)


@pytest.mark.e2e
def test_agreement_with_a_teacher(shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model agrees with itself, also where its classes stand at other indices; another one agrees less."""
    script = load_script("agreement")
    teacher = narrow_checkpoint("yolov8n", tmp_path, seed=1, file="teacher.pt")
    checkpoint = torch.load(teacher, weights_only=False)
    for branch in checkpoint["model"].model[-1].cv3:  # a random head sees all classes alike
        branch[-1].weight.data *= 50
        branch[-1].bias.data += torch.tensor([0.5, 1.5, 1.0]).half()
    for branch in checkpoint["model"].model[-1].cv2:  # and makes boxes as large as the image
        branch[-1].bias.data.view(4, 16)[:, 1] += 10
    torch.save(checkpoint, teacher)
    order = [2, 0, 1]
    for branch in checkpoint["model"].model[-1].cv3:
        for tensor in (branch[-1].weight, branch[-1].bias):
            tensor.data = tensor.data[order].clone()
    checkpoint["model"].names = dict(enumerate(["Triangle", "CIRCLE", "square"]))
    torch.save(checkpoint, tmp_path / "shuffled.pt")
    other = narrow_checkpoint("yolov8n", tmp_path, seed=7, file="other.pt")
    strange = narrow_checkpoint("yolov8n", tmp_path, seed=7, names={0: "a", 1: "b", 2: "c"}, file="strange.pt")
    words = ["--teacher", str(teacher), "--images", str(shapes.parent / "images" / "val"), "--imgsz", "64"]
    words += ["--conf", "0.004", "--json", str(tmp_path / "figures.json")]
    students = [str(teacher), str(tmp_path / "shuffled.pt"), str(other)]
    assert script.main([*words, *students]) == 0
    assert "| of the first |" in capsys.readouterr().out
    rows = json.loads((tmp_path / "figures.json").read_text())["students"]
    assert rows[students[0]]["map"] > 0.9
    assert rows[students[1]]["of_first"] == pytest.approx(1, abs=0.02)
    assert rows[students[2]]["of_first"] < 0.7
    assert script.main([*words, str(strange)]) == 2
    assert "has none of the teacher's classes (circle, square, triangle)" in capsys.readouterr().err


@pytest.mark.e2e
def test_few_labels_and_a_pool(shapes: Path, tmp_path: Path) -> None:
    teacher = narrow_checkpoint("yolov8n", tmp_path, sure=True)
    stems = sorted(image.stem for image in (shapes.parent / "images" / "train").iterdir())
    (tmp_path / "few.txt").write_text("".join(f"{stem}\n" for stem in stems[:3]))
    words = ["--data", str(shapes.parent), "--labels", str(tmp_path / "few.txt"), "--teacher", str(teacher)]
    words += ["--student", str(teacher), "--kd", "objectness", "--seeds", "1", "--out", str(tmp_path / "out")]
    arms = ["few", "hard", "both@2", "all", "none_distill"]
    words += ["--arms", *arms, "--", "epochs=1", "imgsz=64", "batch=8", "workers=0"]
    found = run("few_labels.py", *words)
    assert found.returncode == 0, found.stdout + found.stderr
    assert [line.split("`")[1] for line in found.stdout.splitlines() if line.startswith("| `")] == arms
    labels = list((tmp_path / "out" / "data" / "hard" / "labels").iterdir())
    assert len(labels) == len(stems) - 3
    assert any(path.read_text() for path in labels)
    steps = {len((tmp_path / "out" / "data" / f"{name}.txt").read_text().split()) for name in ("few", "all", "hard")}
    assert steps == {len(stems)}
    assert yaml.safe_load((tmp_path / "out" / "both@2_0" / "kd.yaml").read_text())["unlabeled"]["unlabeled_ratio"] == 2
    again = run("few_labels.py", *words)
    assert "starts" not in again.stdout
    assert again.stdout.splitlines()[-len(arms) :] == found.stdout.splitlines()[-len(arms) :]


@pytest.mark.e2e
def test_a_thinned_start_in_a_file(tmp_path: Path) -> None:
    teacher = narrow_checkpoint("yolov8n", tmp_path / "teacher", width=0.25)
    words = ["thin.py", "--student", str(narrow_yaml("yolov8n", tmp_path)), "--out", str(tmp_path / "thin.pt")]
    found = run(*words, "--teacher", str(teacher))
    assert found.returncode == 0, found.stderr
    assert "Inherited 355 of 355 tensors" in found.stdout
    small, large = (YOLO(path).model.float() for path in (tmp_path / "thin.pt", teacher))
    assert small.names == large.names
    assert torch.equal(small.model[0].conv.weight, large.model[0].conv.weight[::2])
    missing = run(*words, "--teacher", "no.pt")
    assert missing.returncode == 2
    assert missing.stderr.strip() == "teacher=no.pt does not exist."


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script that records training steps; it imports its neighbours, as it does when it is run."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return load_script("record_steps")


def test_the_first_difference_of_two_records_is_named(recorder: ModuleType) -> None:
    steps = [{"loss": (1.5).hex(), "weights": "a"}, {"loss": (1.25).hex(), "weights": "b"}]
    one = {"steps": steps, "saved": [], "finished": "c"}
    assert recorder.first_difference(one, one) is None
    other = {**one, "steps": [steps[0], {**steps[1], "loss": float(np.nextafter(1.25, 2)).hex()}]}
    assert recorder.first_difference(one, other).startswith("step 2: loss (0x1.4")
    assert recorder.first_difference(one, {**one, "steps": steps[:1]}) == "2 steps against 1"
    assert recorder.first_difference(one, {**one, "finished": "d"}) == "after the steps, 'finished': c against d"
    assert recorder.compare({"fgd": one, "mgd": one}, {"fgd": one}) == 1


def test_a_digest_knows_every_bit_and_no_order(recorder: ModuleType) -> None:
    a, b = torch.rand(3, 4), torch.arange(5)
    assert recorder.digest(iter([a, b])) == recorder.digest(iter([b.clone(), a.clone()]))
    changed = a.clone()
    changed[1, 2] = torch.nextafter(a[1, 2], torch.tensor(2.0))
    assert recorder.digest(iter([a, b])) != recorder.digest(iter([changed, b]))
    assert [*recorder.tensors_in({"x": [a, {"y": (b, 3)}], "z": "text"})] == [a, b]


@pytest.mark.e2e
@pytest.mark.slow
def test_recorded_steps_repeat_and_go_on(recorder: ModuleType, tmp_path: Path) -> None:
    recorder.make_material(tmp_path)
    keys = {**recorder.keys_of("ultralytics", tmp_path), "project": str(tmp_path / "runs")}
    whole = recorder.train({**keys, "name": "whole"})
    assert len(whole["steps"]) == recorder.STEPS
    assert {"loss", "box_loss", "dis_loss", "weights"} <= whole["steps"][0].keys()
    stopped = recorder.train({**keys, "name": "stopped"}, "inside")
    assert stopped["steps"] == whole["steps"][:7]
    resumed = recorder.train({"resume": str(tmp_path / "runs" / "stopped" / "weights" / "last.pt")})
    assert len(resumed["steps"]) == recorder.STEPS - 7


def test_interval_of_a_ratio(recorder: ModuleType) -> None:
    script = load_script("compare_checkouts")
    ratios = np.exp(np.random.default_rng(0).normal(0.01, 0.02, 20))
    logs = np.log(ratios)
    half = 2.0930 * logs.std(ddof=1) / np.sqrt(20)  # Student's t of 19 degrees of freedom
    expected = np.exp([logs.mean(), logs.mean() - half, logs.mean() + half])
    assert script.interval(ratios.tolist()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.e2e
@pytest.mark.long
def test_a_checkout_costs_what_it_costs(tmp_path: Path) -> None:
    words = ["--material", str(tmp_path / "material"), "--imgsz", "64", "--pairs", "2", "--rounds", "1"]
    found = run("compare_checkouts.py", str(ROOT), str(ROOT), *words, "--json", str(tmp_path / "ratios.json"))
    assert found.returncode == 0, found.stderr
    ratios = json.loads((tmp_path / "ratios.json").read_text())["ratios"]
    assert len(ratios) == 2
    assert all(0.5 < ratio < 2 for ratio in ratios)
