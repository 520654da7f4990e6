#!/usr/bin/env python3
r"""Compare ways to train with few labels and many unlabeled images. Every arm takes the same number of steps.

    python scripts/few_labels.py --data DATA --labels cfg/experiments/bccd_20_percent.txt --teacher teacher.pt \
        --student yolov8n.yaml --out runs/few20

DATA is a folder with data.yaml, images/ and labels/ in YOLO format. It is copied, since Ultralytics writes label
caches into it. The list names the training images that keep their labels, one stem per line. Arms:

    few        the few labels, the student alone
    few_kd     the few labels, distilled
    hard       also the teacher's detections above --hard as labels of the other images: plain pseudo-labels
    hard_kd    the same labels, distilled
    distill, pseudo, both   the few labels and unlabeled= with that mode
    all        all labels, the student alone
    all_kd     all labels, distilled
    none_distill, none_both   no label at all: every training image is unlabeled

The recipe of these arms is --kd. Its default has the losses of `default` but not its start, so that all arms start
alike. An arm with unlabeled images can set its own unlabeled_ratio=: both@4 has four of them for each labeled one.

A short list of images is repeated, so that an epoch of every arm has the same number of steps. A finished run is not
repeated, and an interrupted one continues. The table shows mean and standard deviation over the seeds, and the paired
differences to `hard` and `all` with their 95 % intervals.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from yolo_kd.compare.statistics import paired, points, spread
from yolo_kd.safe_loading.restricted import quiet

UNLABELED_ARMS = ("distill", "pseudo", "both")
ARMS = ("few", "few_kd", "hard", "hard_kd", *UNLABELED_ARMS, "all", "all_kd", "none_distill", "none_both")
SPLITS = ("val", "test")


def main() -> None:
    """Write the variants of the data set, train every arm, validate, and print the table."""
    args = parse()
    out = args.out.resolve()
    data = make_data(args, out / "data")
    runs = [(arm, seed) for seed in range(args.seeds) for arm in args.arms]
    with ThreadPoolExecutor(args.jobs) as workers:
        done = list(workers.map(lambda run: train(args, out, data, *run), runs))
    finished = [run for run, ok in zip(runs, done, strict=True) if ok]
    figures = {f"{arm} {seed}": evaluate(args, out / f"{arm}_{seed}", data["all"]) for arm, seed in finished}
    (out / "figures.json").write_text(json.dumps(figures, indent=1))
    print(table(args.arms, finished, figures))
    sys.exit(0 if all(done) else 1)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data set")
    parser.add_argument("--labels", type=Path, required=True, help="list of the images that keep their labels")
    parser.add_argument("--teacher", type=Path, required=True, help="teacher that was trained on all labels")
    parser.add_argument("--student", default="yolov8n.yaml", help="student: model YAML or checkpoint")
    parser.add_argument("--kd", default="objectness_cwd", help="recipe of the distilled arms")
    parser.add_argument("--arms", nargs="+", type=known_arm, default=list(ARMS), help="arms to train")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each arm")
    parser.add_argument("--hard", type=float, default=0.4, help="least confidence of a plain pseudo-label")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, one thread each")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("keys", nargs="*", help="keys of all trainings, such as epochs=30 imgsz=320")
    return parser.parse_args()


def known_arm(word: str) -> str:
    """Return the arm if its name exists.

    Raises:
        argparse.ArgumentTypeError: If it does not.
    """
    arm, _, ratio = word.partition("@")
    if arm not in ARMS or (ratio and arm not in UNLABELED_ARMS):
        raise argparse.ArgumentTypeError(f"'{word}' is not an arm. Arms: {', '.join(ARMS)}; both@4 for another ratio.")
    return word


def image_size(args: argparse.Namespace) -> int:
    """Return the image size of the trainings in pixels, which the teacher's detections and the validation share."""
    return next((int(key.partition("=")[2]) for key in args.keys if key.startswith("imgsz=")), 640)


# ------------------------------------------------------------------------------------------------------ the data
def make_data(args: argparse.Namespace, folder: Path) -> dict[str, Path]:
    """Write the data set's variants, and return their data YAMLs and the list `unlabeled` of images without labels."""
    names = {kind: folder / f"{kind}.yaml" for kind in ("all", "few", "hard", "none")}
    names |= {"unlabeled": folder / "unlabeled.txt", "everything": folder / "everything.txt"}
    if all(path.exists() for path in names.values()):
        return names
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(args.data, folder, copy_function=shutil.copyfile)
    for path in (folder, *folder.rglob("*")):
        path.chmod(path.stat().st_mode | 0o200)
    config = yaml.safe_load((folder / "data.yaml").read_text(encoding="utf-8"))
    images = sorted((folder / config["train"]).iterdir())
    chosen = set(args.labels.read_text(encoding="utf-8").split())
    if unknown := chosen - {image.stem for image in images}:
        sys.exit(f"{args.labels} names {len(unknown)} images that {args.data} does not have, such as {min(unknown)}.")
    few = [image for image in images if image.stem in chosen]
    unlabeled = [image for image in images if image.stem not in chosen]
    repeated = [few[i % len(few)] for i in range(len(images))]
    lists = {"all": images, "few_once": few, "few": repeated, "unlabeled": unlabeled, "everything": images}
    lists["hard"] = few + pseudo_labeled(args, unlabeled, folder)
    for name, paths in lists.items():
        (folder / f"{name}.txt").write_text("".join(f"{path}\n" for path in paths), encoding="utf-8")
    (folder / "few_once.yaml").write_text(described(config, folder, "few_once.txt"), encoding="utf-8")
    for name in ("all", "few", "hard"):
        names[name].write_text(described(config, folder, f"{name}.txt"), encoding="utf-8")
    names["none"].write_text(described({k: v for k, v in config.items() if k != "train"}, folder), encoding="utf-8")
    return names


def described(config: dict[str, Any], folder: Path, train: str | None = None) -> str:
    """Return the text of a data YAML with another training list."""
    return yaml.safe_dump({**config, "path": str(folder), **({"train": train} if train else {})}, sort_keys=False)


def pseudo_labeled(args: argparse.Namespace, unlabeled: list[Path], folder: Path) -> list[Path]:
    """Copy the unlabeled images and write the teacher's detections as their labels; return the copies."""
    from ultralytics import YOLO

    images, labels = folder / "hard" / "images", folder / "hard" / "labels"
    images.mkdir(parents=True)
    labels.mkdir()
    teacher = YOLO(args.teacher)
    copies = []
    for image in unlabeled:
        copies.append(Path(shutil.copyfile(image, images / image.name)))
        found = teacher.predict(image, conf=args.hard, imgsz=image_size(args), verbose=False)[0].boxes
        rows = zip(found.cls.tolist(), found.xywhn.tolist(), strict=True)
        text = "".join(f"{int(label)} {' '.join(f'{v:.6f}' for v in box)}\n" for label, box in rows)
        (labels / f"{image.stem}.txt").write_text(text, encoding="utf-8")
    return copies


# ------------------------------------------------------------------------------------------------------ the runs
def keys_of(args: argparse.Namespace, arm: str, data: dict[str, Path]) -> list[str]:
    """Return the keys with which an arm trains."""
    distilled = [f"teacher={args.teacher.resolve()}", f"kd={args.kd}"]
    if arm in ("few", "hard", "all"):
        return [f"data={data[arm]}", "kd=none"]
    if arm in ("few_kd", "hard_kd", "all_kd"):
        return [f"data={data[arm.removesuffix('_kd')]}", *distilled]
    mode, _, ratio = arm.partition("@")
    if mode in UNLABELED_ARMS:
        once = data["few"].with_name("few_once.yaml")
        unlabeled = [f"unlabeled={data['unlabeled']}", f"unlabeled_mode={mode}"]
        return [f"data={once}", *distilled, *unlabeled, *([f"unlabeled_ratio={ratio}"] if ratio else [])]
    mode = arm.removeprefix("none_")
    return [f"data={data['none']}", *distilled, f"unlabeled={data['everything']}", f"unlabeled_mode={mode}"]


def train(args: argparse.Namespace, out: Path, data: dict[str, Path], arm: str, seed: int) -> bool:
    """Train one arm with one seed, and return whether it has finished."""
    folder = out / f"{arm}_{seed}"
    done, last = folder / "done", folder / "weights" / "last.pt"
    if done.exists():
        return True
    words = [sys.executable, "-m", "yolo_kd", "train"]
    if last.exists():
        words += [f"resume={last}", *(["kd=none"] if arm in ("few", "hard", "all") else [])]
    else:
        words += [f"student={args.student}", *keys_of(args, arm, data), *args.keys, f"seed={seed}", "threads=1"]
        words += ["plots=False", "exist_ok=True", f"project={out}", f"name={arm}_{seed}"]
    print(f"{arm} seed {seed}: {'continues' if last.exists() else 'starts'}", flush=True)
    with open(out / f"{arm}_{seed}.log", "a", encoding="utf-8") as log:
        code = subprocess.run(words, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    if code.returncode == 0:
        done.touch()
    else:
        print(f"{arm} seed {seed} failed, see {log.name}", flush=True)
    return code.returncode == 0


def evaluate(args: argparse.Namespace, folder: Path, data: Path) -> dict[str, float]:
    """Return mAP50-95 of a run's best checkpoint on every split of the data set."""
    from ultralytics import YOLO

    kept = folder / "figures.json"
    if not kept.exists():
        config = yaml.safe_load(data.read_text(encoding="utf-8"))
        found = {}
        for split in (split for split in SPLITS if config.get(split)):
            keys = {"plots": False, "verbose": False, "workers": 0, "project": str(folder), "name": "val"}
            with quiet():
                metrics = YOLO(folder / "weights" / "best.pt").val(
                    data=str(data), imgsz=image_size(args), split=split, **keys
                )
            found[split] = float(metrics.box.map)
        kept.write_text(json.dumps(found))
    return json.loads(kept.read_text(encoding="utf-8"))


def table(arms: list[str], finished: list[tuple[str, int]], figures: dict[str, dict[str, float]]) -> str:
    """Return the Markdown table."""
    splits = [split for split in SPLITS if any(split in row for row in figures.values())]

    def values(arm: str, split: str) -> dict[int, float]:
        return {seed: figures[f"{arm} {seed}"][split] for name, seed in finished if name == arm}

    def difference(arm: str, other: str, split: str) -> str:
        found = paired(values(arm, split), values(other, split))
        if arm == other or found.mean is None:
            return "-"
        interval = "" if found.low is None or found.high is None else f" ({points(found.low)} to {points(found.high)})"
        return f"{points(found.mean)}{interval}"

    titles = ["arm", "seeds"]
    for split in splits:
        titles += [split, f"{split} over `hard`", f"{split} over `all`"]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for arm in arms:
        if not any(name == arm for name, _ in finished):
            continue
        cells = [f"`{arm}`", str(sum(name == arm for name, _ in finished))]
        for split in splits:
            s = spread(list(values(arm, split).values()))
            cells.append(f"{s.mean:.3f}" + ("" if s.sd is None else f" ± {s.sd:.3f}"))
            cells += [difference(arm, other, split) for other in ("hard", "all")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
