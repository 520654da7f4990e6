#!/usr/bin/env python3
"""Show the whole way in a few minutes on a processor: teacher, student alone, distilled student, ONNX file.

Nothing is downloaded: images are drawn (see make_shapes.py) and every model starts from random weights. So few steps
show that everything works and what it prints, not how much distillation helps: that takes longer trainings and several
seeds.

    make demo
    python scripts/demo.py --epochs 40 --imgsz 160
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]

TRAINING = {
    # Random weights learn nothing in a few hundred steps from mosaics, and Ultralytics' own choice of optimiser and
    # warm-up is meant for long trainings.
    "mosaic": 0.0,
    "scale": 0.2,
    "optimizer": "AdamW",
    "lr0": 0.002,
    "warmup_epochs": 1,
    "weight_decay": 0.0005,
    # One validation at the end is enough here.
    "val": False,
    "plots": False,
    "workers": 0,
    "cache": "ram",
    "pretrained": False,
    "device": "cpu",
    "exist_ok": True,
    "seed": 0,
}


class Row(NamedTuple):
    """One line of the closing table."""

    name: str
    weights: Path
    seconds: float
    map50_95: float
    map50: float


def offline(settings: Path) -> None:
    """Keep this process and its children from the network and from the user's own Ultralytics settings.

    Args:
        settings: Folder for settings, made if missing.
    """
    import matplotlib

    # Ultralytics asks a server for this font whenever it is missing, which costs seconds; any font will do.
    font = settings / "Ultralytics" / "Arial.ttf"
    font.parent.mkdir(parents=True, exist_ok=True)
    if not font.exists():
        shutil.copyfile(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", font)
    os.environ.update(
        YOLO_OFFLINE="1",
        YOLO_AUTOINSTALL="false",
        YOLO_CONFIG_DIR=str(settings),
        MPLBACKEND="Agg",
        # So that the package is found in a clone that is not installed.
        PYTHONPATH=os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    )


def yolo_kd(*arguments: str, log: Path | None = None) -> float:
    """Print and run one command of yolo-kd; a failure ends the demonstration.

    Args:
        *arguments: Words of the command.
        log: File for what the command prints, the terminal by default.

    Returns:
        The seconds it took.
    """
    print(f"\n$ yolo-kd {shlex.join(arguments)}" + (f" > {_short(log)} &" if log else ""), flush=True)
    start = time.perf_counter()
    with open(log, "w", encoding="utf-8") if log else nullcontext() as output:
        code = subprocess.run([sys.executable, "-m", "yolo_kd", *arguments], stdout=output, stderr=output).returncode
    if code:
        where = f", see {_short(log)}" if log else ""
        print(f"\nyolo-kd {arguments[0]} failed with exit code {code}{where}.", file=sys.stderr)
        raise SystemExit(code)
    return time.perf_counter() - start


def train(
    folder: Path, name: str, common: dict[str, object], quietly: bool = False, **keys: object
) -> tuple[Path, float]:
    """Train one model through the command line.

    Args:
        folder: Parent of the run's folder.
        name: Name of the run.
        common: Keys that all three trainings share.
        quietly: Write what it prints to a file beside the run's folder.
        **keys: Keys of this one.

    Returns:
        Its best checkpoint and the seconds it took.
    """
    given = {**keys, **common, "project": folder, "name": name}
    log = folder / f"{name}.log" if quietly else None
    seconds = yolo_kd("train", *(f"{key}={value}" for key, value in given.items()), log=log)
    best = folder / name / "weights" / "best.pt"
    if not best.is_file():
        raise SystemExit(f"the training reported success but left no {best}")
    return best, seconds


def validate(best: Path, data: Path, imgsz: int) -> tuple[float, float]:
    """Validate a checkpoint with plain Ultralytics and return mAP50-95 and mAP50."""
    from ultralytics import YOLO

    metrics = YOLO(best).val(
        data=str(data), imgsz=imgsz, split="val", device="cpu", workers=0, plots=False, verbose=False,
        project=str(best.parents[2] / "val"), name=best.parents[1].name, exist_ok=True,
    )  # fmt: skip
    return float(metrics.box.map), float(metrics.box.map50)


def table(rows: Sequence[Row]) -> str:
    """Return the closing table as text."""
    lines = [f"{'':<18} {'mAP50-95':>8} {'mAP50':>8} {'seconds':>8}  checkpoint"]
    lines += [f"{r.name:<18} {r.map50_95:>8.3f} {r.map50:>8.3f} {r.seconds:>8.0f}  {_short(r.weights)}" for r in rows]
    return "\n".join(lines)


def _short(path: Path) -> str:
    """Return a path relative to the working folder where that is shorter."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and run the demonstration."""
    summary = (__doc__ or "").split("\n\n")[0]
    parser = argparse.ArgumentParser(description=summary, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/demo"), help="where everything is written")
    parser.add_argument("--teacher", default="yolov8s.yaml", help="model YAML of the teacher")
    parser.add_argument("--student", default="yolov8n.yaml", help="model YAML of the student")
    parser.add_argument("--kd", default="default", help="recipe")
    parser.add_argument("--epochs", type=int, default=10, help="epochs of each student")
    parser.add_argument("--teacher-epochs", type=int, default=12, help="epochs of the teacher, which must know more")
    parser.add_argument("--imgsz", type=int, default=128, help="height and width of the images in pixels")
    parser.add_argument("--images", type=int, default=400, help="number of training images")
    parser.add_argument("--batch", type=int, default=8, help="images of one step")
    given = parser.parse_args(arguments)

    start = time.perf_counter()
    folder = given.folder.resolve()
    offline(folder / "settings")
    # Only after the switches are set, because both read them while they are imported.
    sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
    from make_shapes import make_shapes

    from yolo_kd.environment import cpu_has_bf16

    print(f"Drawing {given.images} images for training and 120 for validation ...", flush=True)
    data = make_shapes(folder / "data", train=given.images, val=120, imgsz=given.imgsz, seed=0)
    common: dict[str, object] = {
        **TRAINING,
        "data": data,
        "imgsz": given.imgsz,
        "batch": given.batch,
        "nbs": given.batch,
        # Processors with bfloat16 instructions train faster with them, others slower.
        "amp": "bf16" if cpu_has_bf16() else False,
    }

    rows = []

    def add(name: str, best: Path, seconds: float) -> None:
        rows.append(Row(name, best, seconds, *validate(best, data, given.imgsz)))

    # Ultralytics trains with one core less than there are, so the baseline gets a core of its own meanwhile.
    with ThreadPoolExecutor(1) as beside:
        alone = beside.submit(
            train, folder, "student-alone", common, quietly=True, kd="none", student=given.student, epochs=given.epochs
        )
        teacher, seconds = train(
            folder, "teacher", common, kd="none", student=given.teacher, epochs=given.teacher_epochs
        )
        add("teacher", teacher, seconds)
        add("student alone", *alone.result())
    student = {"student": given.student, "kd": given.kd, "epochs": given.epochs}
    distilled, seconds = train(folder, "student-distilled", common, teacher=teacher, **student)
    add("student distilled", distilled, seconds)
    yolo_kd("export", f"model={distilled}", "format=onnx", f"imgsz={given.imgsz}")
    exported = distilled.with_suffix(".onnx")
    if not exported.is_file():
        raise SystemExit(f"the export reported success but left no {exported}")

    print(f"\nValidation on {_short(data)}, split val, plain Ultralytics:\n\n{table(rows)}\n")
    print(f"ONNX file: {_short(exported)} ({exported.stat().st_size / 1e6:.1f} MB)")
    print(f"Everything took {time.perf_counter() - start:.0f} s.")
    print("One short training per arm is a demonstration, not evidence: that takes longer trainings and several seeds.")


if __name__ == "__main__":
    main()
