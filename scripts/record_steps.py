#!/usr/bin/env python3
r"""Record ten training steps of eight recipes exactly, to prove that a change of the code changed no number.

    python scripts/record_steps.py record before.json --material DIR
    python scripts/record_steps.py record after.json --material DIR
    python scripts/record_steps.py compare before.json after.json

The script uses nothing but the trainer's public keys, so that it runs on any revision: put another checkout first on
PYTHONPATH to record that one. The material (images, a teacher, a student) is made in DIR if DIR is empty, and must be
the same for both recordings. Everything runs in float32 in one thread of a processor.

Recorded at each step: the loss and every logged item as hexadecimal floats, and a digest of all trained weights and
the student's buffers. Recorded at each checkpoint: digests of the optimiser's state, which includes the adapters, and
of the averaged weights. Recorded at the end: a digest of the finished student.

A checkpoint of another revision can be resumed and recorded as well:

    python scripts/record_steps.py stop RUNS --material DIR               ends after the first of two epochs
    python scripts/record_steps.py stop RUNS --material DIR --inside      ends by a signal inside the second epoch
    python scripts/record_steps.py resume after.json --runs RUNS          works on a copy of RUNS
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

NAMES = {0: "circle", 1: "square", 2: "triangle"}

SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "threads": 1,
    "teacher_precision": "fp32",
    "teacher_channels_last": False,  # auto would let the clock decide
    "amp": False,
    "imgsz": 96,
    "epochs": 2,
    "batch": 4,
    "nbs": 4,
    "workers": 0,
    "seed": 3,
    "optimizer": "AdamW",
    "lr0": 0.001,
    "warmup_epochs": 0,
    "close_mosaic": 0,
    "val": False,  # the last epoch is validated nevertheless, after all its steps
    "plots": False,
    "exist_ok": True,
}

STEPS = 10
CASES = ("default", "fgd", "mgd", "sea", "crosskd", "ultralytics", "unlabeled_both", "keep_classes")


class Stopped(Exception):
    """Ends a training between two epochs."""


# ------------------------------------------------------------------------------------------------ material
def make_material(folder: Path, teacher_width: float = 0.25, student_width: float = 0.125, imgsz: int = 96) -> None:
    """Draw the data sets and make the models, unless the folder has them.

    Args:
        folder: Receives `data/`, `unlabeled/`, `new_class/`, `teacher.pt` and `student/yolov8n.yaml`.
        teacher_width: Width multiple of the teacher; that of YOLOv8n is 0.25.
        student_width: Width multiple of the student.
        imgsz: Height and width of the images in pixels.
    """
    if (folder / "teacher.pt").exists():
        return
    import torch
    from make_shapes import make_shapes
    from ultralytics.nn.tasks import DetectionModel, yaml_model_load

    count = STEPS // SETTINGS["epochs"] * SETTINGS["batch"]
    for seed, name in enumerate(("data", "unlabeled", "new_class")):
        data = make_shapes(folder / name, train=count, val=4, imgsz=imgsz, seed=seed)
    data.write_text(data.read_text().replace("square", "hexagon"))  # a class that the teacher does not have
    config = yaml_model_load("yolov8n.yaml") | {"nc": len(NAMES)}
    for key in ("yaml_file", "scale"):
        config.pop(key, None)
    for name, width in (("student", student_width), ("teacher", teacher_width)):
        file = folder / name / "yolov8n.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(config | {"scales": {"n": [0.33, width, 1024]}}))  # JSON is YAML
    torch.manual_seed(0)
    teacher = DetectionModel(str(file), nc=len(NAMES), verbose=False)
    spread_scores(teacher, sorted((folder / "data" / "images" / "train").iterdir())[:8])
    teacher.names, teacher.args = NAMES, {}
    whole = {"epoch": -1, "model": teacher.half(), "ema": None, "optimizer": None, "train_args": {}}
    torch.save(whole, folder / "teacher.pt")


def spread_scores(model: Any, files: list[Path]) -> None:
    """Give a random detector features of variance 1 and class probabilities between 0 and 1 on some images.

    Without this, all its probabilities are close to 0, and no detection of it counts as an object.
    """
    import cv2
    import torch

    pixels = torch.stack([torch.from_numpy(cv2.imread(str(file))[..., ::-1].copy()) for file in files])
    images = pixels.permute(0, 3, 1, 2).float() / 255
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.momentum = 1.0  # the statistics become those of the images
        model.train()(images)
        for norm in norms:
            norm.momentum = 0.03
        features = model.eval()(images)[1]["feats"]
        for branch, feature in zip(model.model[-1].cv3, features, strict=True):
            scores = branch(feature)
            scale, mean = 1 / scores.std((0, 2, 3)), scores.mean((0, 2, 3))
            branch[-1].weight.mul_(scale[:, None, None, None])
            branch[-1].bias.copy_((branch[-1].bias - mean) * scale - 1)


def keys_of(case: str, material: Path) -> dict[str, Any]:
    """Return the training keys of a case, all of plain types."""
    keys = {"data": material / "data" / "data.yaml", "model": material / "student" / "yolov8n.yaml", "kd": case}
    if case == "unlabeled_both":
        images = material / "unlabeled" / "images" / "train"
        keys |= {"kd": "default", "unlabeled": images, "unlabeled_mode": "both", "batch": 2 * SETTINGS["batch"]}
    if case == "keep_classes":
        data = material / "new_class" / "data.yaml"
        keys |= {"kd": "objectness", "keep_classes": "teacher", "model": material / "teacher.pt", "data": data}
    keys = {**SETTINGS, **keys, "teacher": material / "teacher.pt"}
    return {k: str(v) if isinstance(v, Path) else v for k, v in keys.items()}


# ------------------------------------------------------------------------------------------------ recording
def digest(tensors: Iterator[Any]) -> str:
    """Return a SHA-256 over all tensors, whatever their names and their order."""
    each = sorted(hashlib.sha256(t.detach().contiguous().cpu().numpy().tobytes()).hexdigest() for t in tensors)
    return hashlib.sha256("".join(each).encode()).hexdigest()


def tensors_in(tree: Any) -> Iterator[Any]:
    """Yield the tensors of nested mappings and sequences."""
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    if isinstance(tree, list | tuple):
        for item in tree:
            yield from tensors_in(item)
    elif hasattr(tree, "detach"):
        yield tree


def train(keys: dict[str, Any], stop: str | None = None) -> dict[str, Any]:
    """Train and return the record.

    Args:
        keys: Training keys.
        stop: "between" to end after the first epoch, "inside" to end by a signal inside the second one.
    """
    from ultralytics import YOLO

    from yolo_kd import DistillationTrainer

    trainer: Any = DistillationTrainer(overrides=keys)
    steps: list[dict[str, Any]] = []
    saved: list[dict[str, str]] = []

    def note_step(t: Any) -> None:
        trained = [p for group in t.optimizer.param_groups for p in group["params"]]
        items = {name: float(value).hex() for name, value in t.loss_items.items()}
        weights = digest(iter([*trained, *t.model.state_dict().values()]))
        steps.append({"loss": float(t.loss.detach()).hex(), **items, "weights": weights})
        if stop == "inside" and len(steps) == 7:
            signal.raise_signal(signal.SIGTERM)

    def note_checkpoint(t: Any) -> None:
        averaged = t.ema.ema.state_dict().values()
        saved.append({"optimizer": digest(tensors_in(t.optimizer.state_dict())), "average": digest(iter(averaged))})

    def end_epoch(_: Any) -> None:
        if stop == "between":
            raise Stopped

    trainer.add_callback("on_train_batch_end", note_step)
    trainer.add_callback("on_model_save", note_checkpoint)
    trainer.add_callback("on_fit_epoch_end", end_epoch)
    finished = None
    try:
        trainer.train()
        finished = digest(iter(YOLO(trainer.last).model.state_dict().values()))
    except (Stopped, SystemExit):
        if stop is None:
            raise
    return {"steps": steps, "saved": saved, "finished": finished}


def record(args: argparse.Namespace) -> dict[str, Any]:
    """Train all cases, or resume them, and return their records."""
    from yolo_kd import YoloKDError

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        runs = args.runs if args.verb == "stop" else Path(scratch)
        for case in args.cases:
            if args.verb == "resume":
                shutil.copytree(args.runs / case, runs / case)
                last = runs / case / "weights" / "last.pt"
                keys: dict[str, Any] = {"resume": str(last), "save_dir": str(runs / case)}
            else:
                keys = {**keys_of(case, args.material), "project": str(runs.resolve()), "name": case}
            stop = ("inside" if args.inside else "between") if args.verb == "stop" else None
            try:
                found[case] = train(keys, stop)
            except YoloKDError as error:
                if args.verb != "resume":
                    raise
                found[case] = {"steps": [], "refused": str(error)}
            print(f"{case}: {found[case].get('refused') or '{} steps'.format(len(found[case]['steps']))}", flush=True)
    return found


# ------------------------------------------------------------------------------------------------ comparison
def first_difference(one: Mapping[str, Any], two: Mapping[str, Any]) -> str | None:
    """Return where two records of a case differ first, or None if they are identical."""
    for number, (a, b) in enumerate(zip(one["steps"], two["steps"], strict=False), 1):
        names = [name for name in [*a, *(n for n in b if n not in a)] if a.get(name) != b.get(name)]
        if names:
            shown = ", ".join(f"{n} ({a.get(n, 'missing')[:20]} against {b.get(n, 'missing')[:20]})" for n in names)
            return f"step {number}: {shown}"
    if len(one["steps"]) != len(two["steps"]):
        return f"{len(one['steps'])} steps against {len(two['steps'])}"
    for key in ("saved", "finished", "refused"):
        if one.get(key) != two.get(key):
            return f"after the steps, '{key}': {one.get(key)} against {two.get(key)}"
    return None


def compare(one: Mapping[str, Any], two: Mapping[str, Any]) -> int:
    """Print the first difference of each case and return the number of cases that differ."""
    differing = 0
    for case in [*one, *(c for c in two if c not in one)]:
        if case not in one or case not in two:
            found: str | None = f"recorded in {'the second' if case in two else 'the first'} file only"
        else:
            found = first_difference(one[case], two[case])
        differing += found is not None
        print(f"{case}: {found or 'identical in {} steps'.format(len(one[case]['steps']))}")
    return differing


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("record", "stop", "resume"):
        added = verbs.add_parser(verb)
        added.set_defaults(inside=False)
        if verb != "stop":
            added.add_argument("out", type=Path, help="JSON file to write")
        if verb != "record":
            added.add_argument("runs" if verb == "stop" else "--runs", type=Path, help="folder of the stopped runs")
        if verb != "resume":
            added.add_argument("--material", type=Path, required=True, help="folder of images and models")
        if verb == "stop":
            added.add_argument("--inside", action="store_true", help="stop inside the second epoch")
        added.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    added = verbs.add_parser("compare")
    added.add_argument("files", type=Path, nargs=2)
    return parser.parse_args(arguments)


def main() -> int:
    """Do what the command line says."""
    args = parse()
    if args.verb == "compare":
        return int(compare(*(json.loads(file.read_text()) for file in args.files)) > 0)
    from demo import offline

    with tempfile.TemporaryDirectory() as settings:
        python_path = os.environ.get("PYTHONPATH")
        os.environ["YOLO_VERBOSE"] = "false"
        offline(Path(settings))
        if python_path is not None:
            os.environ["PYTHONPATH"] = python_path
        import torch

        import yolo_kd

        torch.set_num_threads(1)
        print(f"recording {Path(yolo_kd.__file__).parent}")
        if args.verb != "resume":
            args.material = args.material.resolve()
            make_material(args.material)
        found = record(args)
    if args.verb != "stop":
        args.out.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
