"""Problems of a data set that a training would only mention in passing, or not at all."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ultralytics.cfg import get_cfg
from ultralytics.data import build_yolo_dataset

from yolo_kd.check.dryrun import ImageRecord, Trace
from yolo_kd.check.report import Report, percent, some
from yolo_kd.safe_loading.checkpoint import sha256
from yolo_kd.unlabeled.images import has_labels

TINY = 4.0
"""Pixels: an object whose shorter side is below this at the training's image size leaves next to nothing to learn."""
PIECE = 1 << 16


def check_dataset(
    report: Report, trace: Trace, data: Mapping[str, Any], keys: Mapping[str, Any], pooled: bool = False
) -> dict[str, Any]:
    """Scan the training and validation images as a training would, and report what is wrong with them.

    Args:
        report: Receives findings, the table of classes and its numbers.
        trace: The present dry run.
        data: What `plan.read_dataset` returned.
        keys: Ultralytics' keys of the training.
        pooled: There is a pool of unlabelled images, so training images need no labels.

    Returns:
        Ultralytics' data set by split, `train` and `val`, without those that cannot be used.
    """
    used = ("imgsz", "fraction", "single_cls", "classes")
    cfg = get_cfg(overrides={k: keys[k] for k in used if k in keys} | {"task": "detect"})
    validation = keys.get("split") or "val"
    sets = {}
    for split, paths in (("train", data["train"]), ("val", data[validation])):
        if split == "train" and pooled and not has_labels(paths):
            report.add("note", "data", "no training image has labels: training sees unlabelled images only.")
            continue
        trace.split = split
        try:
            sets[split] = build_yolo_dataset(cfg, paths, 16, data, mode=split, stride=32)
        except Exception as error:  # whatever Ultralytics raises on a set that it cannot use
            report.add("error", "data", f"the {split} images cannot be used: {_short(error)}", "Mend the data set.")
        trace.split = ""
        records = sorted(trace.records.get(split, []), key=lambda r: r.file)
        trace.records[split] = records
        _files(report, split, records)
        _boxes(report, split, records, int(np.max(cfg.imgsz)))
    _duplicates(report, trace.records)
    _classes(report, trace.records, {0: "object"} if cfg.single_cls else data["names"], bool(cfg.single_cls))
    return sets


def _short(error: Exception) -> str:
    text = str(error.__cause__ or error)
    return " ".join(text.split("See http")[0].split())[:300] or type(error).__name__


def _files(report: Report, split: str, records: Sequence[ImageRecord]) -> None:
    """Report what is refused, put right, or without labels."""
    if not records:
        return
    refused = [r for r in records if r.problem]
    if refused:
        examples = some([f"{Path(r.file).name} ({r.problem[:90]})" for r in refused], 2)
        text = f"{len(refused)} of {len(records)} {split} images are left out, image or labels being wrong: {examples}."
        report.add("warning", "data", text, "Mend or remove them.")
    mended = [r for r in records if "restored and saved" in r.remark]
    if mended:
        text = f"{len(mended)} {split} images are truncated JPEGs: {some([Path(r.file).name for r in mended])}."
        report.add("warning", "data", text, "Training will write them anew, in place. Keep a copy if you need one.")
    repeated = [r for r in records if "duplicate labels removed" in r.remark]
    if repeated:
        files = some([Path(r.file).name for r in repeated])
        text = f"{len(repeated)} {split} label files hold a line twice, which counts once: {files}."
        report.add("note", "data", text)
    good = [r for r in records if not r.problem]
    missing = [r for r in good if not r.labelled]
    empty = [r for r in good if not len(r.boxes)]
    if missing:
        text = (
            f"{percent(len(missing), len(records))} of the {split} images ({len(missing)}) have no label file and "
            f"count as background, such as {Path(missing[0].file).name} ({missing[0].label_file} is not there)."
        )
        level = "warning" if len(missing) > 0.02 * len(records) else "note"
        report.add(level, "data", text, "If they show objects, label them or take them out.")
    if len(empty) > 0.5 * len(good):
        text = f"{percent(len(empty), len(good))} of the {split} images have no box at all."
        report.add("warning", "data", text, "Is the folder of labels beside the folder of images, with the same names?")


def _boxes(report: Report, split: str, records: Sequence[ImageRecord], imgsz: int) -> None:
    """Report objects that are too small to see at the training's image size."""
    sides = [
        r.boxes[:, 2:] * np.array([r.shape[1], r.shape[0]]) * imgsz / max(r.shape) for r in records if len(r.boxes)
    ]
    if not sides:
        return
    shorter = np.concatenate(sides).min(1)
    tiny = int((shorter < TINY).sum())
    report.facts.setdefault("tiny_boxes", {})[split] = {"below_px": TINY, "count": tiny, "of": len(shorter)}
    if tiny > max(0.01 * len(shorter), 1):
        needed = int(np.ceil(imgsz * TINY / max(float(np.quantile(shorter, 0.01, method="lower")), 1e-3) / 32) * 32)
        share = f"{percent(tiny, len(shorter))} of the {split} boxes ({tiny})"
        text = f"{share} are under {TINY:g} px wide or high at imgsz={imgsz}."
        advice = f"A larger imgsz would help (all but 1 % reach {TINY:g} px at {needed})." if needed <= 4096 else ""
        report.add("warning", "data", text, advice or "Look at the labels: such boxes are often a slip.")


def _duplicates(report: Report, records: Mapping[str, Sequence[ImageRecord]]) -> None:
    """Report images that occur twice, inside a split and across both, by their content."""
    alike: dict[Any, list[tuple[str, str]]] = {
        None: [(s, r.file) for s, found in records.items() for r in found if not r.problem]
    }
    # the cheap questions first: most files differ in size already, and most others in their ends
    for ask in (lambda file: Path(file).stat().st_size, _ends, sha256):
        parted: dict[Any, list[tuple[str, str]]] = defaultdict(list)
        for key, files in alike.items():
            for split, file in files if len(files) > 1 else ():
                parted[key, ask(file)].append((split, file))
        alike = parted
    twice = [files for files in alike.values() if len(files) > 1]
    across = [files for files in twice if {split for split, _ in files} == {"train", "val"}]
    both = sum(split == "val" for files in across for split, _ in files)
    report.facts["duplicates"] = {"train_and_val": both}
    if both:
        pair = {split: Path(file).name for split, file in across[0]}
        total = len([r for r in records["val"] if not r.problem])
        text = (
            f"{both} of {total} val images ({percent(both, total)}) are in train as well, such as {pair['val']} = "
            f"{pair['train']}: results will look better than they are."
        )
        report.add("warning", "data", text, "Take them out of train or choose other val images.")
    for split in records:
        inside = [[f for s, f in files if s == split] for files in twice]
        surplus = sum(len(files) - 1 for files in inside if len(files) > 1)
        report.facts["duplicates"][split] = surplus
        if surplus:
            example = next(files for files in inside if len(files) > 1)
            copies = " = ".join(Path(f).name for f in example[:2])
            text = f"{surplus} {split} images are copies of others, such as {copies}."
            report.add("warning", "data", text, "Remove the copies; where their labels differ they teach both.")


def _ends(file: str) -> bytes:
    """Return both ends of a file."""
    with open(file, "rb") as opened:
        head = opened.read(PIECE)
        opened.seek(max(Path(file).stat().st_size - PIECE, 0))
        return hashlib.sha256(head + opened.read(PIECE)).digest()


def _classes(
    report: Report, records: Mapping[str, Sequence[ImageRecord]], names: Mapping[int, str], single: bool
) -> None:
    """Report how often each class occurs, and those that never do."""
    counts = {}
    for split, found in records.items():
        classes = np.concatenate([r.classes for r in found if not r.problem] or [np.zeros(0, int)])
        counts[split] = np.bincount(np.zeros_like(classes) if single else classes, minlength=len(names))
    if not counts:
        return
    images = {split: sum(not r.problem for r in found) for split, found in records.items()}
    report.facts["classes"] = [
        {"index": i, "name": name, **{split: int(c[i]) for split, c in counts.items()}} for i, name in names.items()
    ]
    report.facts["images"] = images
    rows = [("class", *(f"{split} boxes" for split in counts))]
    rows += [(f"{i} {name}", *(str(c[i]) for c in counts.values())) for i, name in [*names.items()][:12]]
    if len(names) > 12:
        rows.append((f"... {len(names) - 12} more", *("" for _ in counts)))
    rows.append(("images", *(str(n) for n in images.values())))
    report.tables["classes"] = rows
    for split, count in counts.items():
        absent = [names[i] for i in names if not count[i]] if count.any() else []
        if absent:
            text = f"no {split} image shows {some([repr(str(n)) for n in absent])}."
            consequence = "nobody can learn it there" if split == "train" else "its accuracy will not be measured"
            report.add("warning", "classes", f"{text[:-1]}: {consequence}.", "Add images of it, or remove the class.")
