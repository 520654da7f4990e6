"""Finds problems in a data set that a training does not report, or only in passing."""

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
"""Pixels: an object with a shorter side at the training's image size is too small to learn from."""
ENDS = 1 << 16
"""Bytes at either end of a file that are compared before the whole file is."""


def check_dataset(
    report: Report, trace: Trace, data: Mapping[str, Any], keys: Mapping[str, Any], unlabeled: bool = False
) -> dict[str, Any]:
    """Scan the training and validation images as a training would, and report problems.

    Args:
        report: Receives findings, the table of classes and its numbers.
        trace: The current dry run.
        data: The data set as `read_dataset` returns it.
        keys: Ultralytics' keys of the training.
        unlabeled: Whether there are unlabeled images, so that training images need no labels.

    Returns:
        Ultralytics' data sets by split, `train` and `val`, where they are usable.
    """
    used = ("imgsz", "fraction", "single_cls", "classes")
    cfg = get_cfg(overrides={k: keys[k] for k in used if k in keys} | {"task": "detect"})
    validation = keys.get("split") or "val"
    sets = {}
    for split, paths in (("train", data["train"]), ("val", data[validation])):
        if split == "train" and unlabeled and not has_labels(paths):
            report.add("note", "data", "no training image has labels: training uses only the unlabeled images.")
            continue
        trace.split = split
        try:
            sets[split] = build_yolo_dataset(cfg, paths, 16, data, mode=split, stride=32)
        except Exception as error:  # Ultralytics raises many kinds for an unusable set
            report.add("error", "data", f"the {split} images cannot be used: {_short(error)}", "Repair the data set.")
        trace.split = ""
        trace.records[split] = records = sorted(trace.records.get(split, []), key=lambda r: r.file)
        _files(report, split, records)
        _boxes(report, split, records, int(np.max(cfg.imgsz)))
    _duplicates(report, trace.records)
    _classes(report, trace.records, {0: "object"} if cfg.single_cls else data["names"], bool(cfg.single_cls))
    return sets


def _short(error: Exception) -> str:
    text = str(error.__cause__ or error)
    return " ".join(text.split("See http")[0].split())[:300] or type(error).__name__


def _files(report: Report, split: str, records: Sequence[ImageRecord]) -> None:
    """Report refused images, images and labels that Ultralytics corrects, and missing labels."""
    if refused := [r for r in records if r.problem]:
        examples = some([f"{Path(r.file).name} ({r.problem[:90]})" for r in refused], 2)
        text = f"{len(refused)} of {len(records)} {split} images are left out, image or labels being wrong: {examples}."
        report.add("warning", "data", text, "Repair or remove them.")
    if repaired := [Path(r.file).name for r in records if "restored and saved" in r.remark]:
        text = f"{len(repaired)} {split} images are truncated JPEGs: {some(repaired)}."
        report.add("warning", "data", text, "Training will rewrite them in place. Keep a copy if you need one.")
    if repeated := [Path(r.file).name for r in records if "duplicate labels removed" in r.remark]:
        text = f"{len(repeated)} {split} label files contain a line twice, which counts once: {some(repeated)}."
        report.add("note", "data", text)
    good = [r for r in records if not r.problem]
    empty = [r for r in good if not len(r.boxes)]
    if missing := [r for r in good if not r.labeled]:
        text = (
            f"{percent(len(missing), len(records))} of the {split} images ({len(missing)}) have no label file and "
            f"count as background, such as {Path(missing[0].file).name} ({missing[0].label_file} does not exist)."
        )
        level = "warning" if len(missing) > 0.02 * len(records) else "note"
        report.add(level, "data", text, "If they show objects, label them or remove them.")
    if len(empty) > 0.5 * len(good):
        text = f"{percent(len(empty), len(good))} of the {split} images have no box at all."
        report.add("warning", "data", text, "Is the labels folder next to the images folder, with the same file names?")


def _boxes(report: Report, split: str, records: Sequence[ImageRecord], imgsz: int) -> None:
    """Report objects that are too small at the training's image size."""
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
        text = f"{share} are less than {TINY:g} px wide or high at imgsz={imgsz}."
        advice = f"Use a larger imgsz: at {needed}, all but 1 % reach {TINY:g} px."
        report.add(
            "warning", "data", text, advice if needed <= 4096 else "Check the labels: such boxes are often errors."
        )


def _duplicates(report: Report, records: Mapping[str, Sequence[ImageRecord]]) -> None:
    """Report images with equal content, within a split and across both."""
    equal = [[(s, r.file) for s, found in records.items() for r in found if not r.problem]]
    # the cheapest comparison first: most files differ in size, and most others at their ends
    for property_of in (lambda file: Path(file).stat().st_size, _ends, sha256):
        groups: dict[Any, list[tuple[str, str]]] = defaultdict(list)
        for i, files in enumerate(equal):
            for split, file in files:
                groups[i, property_of(file)].append((split, file))
        equal = [files for files in groups.values() if len(files) > 1]
    across = [files for files in equal if {split for split, _ in files} == {"train", "val"}]
    both = sum(split == "val" for files in across for split, _ in files)
    report.facts["duplicates"] = {"train_and_val": both}
    if both:
        pair = {split: Path(file).name for split, file in across[0]}
        total = len([r for r in records["val"] if not r.problem])
        text = (
            f"{both} of {total} val images ({percent(both, total)}) are also in train, such as {pair['val']} = "
            f"{pair['train']}, so accuracy will be overestimated."
        )
        report.add("warning", "data", text, "Remove them from train, or choose other val images.")
    for split in records:
        within = [copies for files in equal if len(copies := [Path(f).name for s, f in files if s == split]) > 1]
        report.facts["duplicates"][split] = surplus = sum(len(copies) - 1 for copies in within)
        if surplus:
            text = f"{surplus} {split} images are copies of others, such as {' = '.join(within[0][:2])}."
            report.add(
                "warning", "data", text, "Remove the copies; where their labels differ, they contradict each other."
            )


def _ends(file: str) -> bytes:
    """Return a hash of both ends of a file."""
    with open(file, "rb") as opened:
        head = opened.read(ENDS)
        opened.seek(max(Path(file).stat().st_size - ENDS, 0))
        return hashlib.sha256(head + opened.read(ENDS)).digest()


def _classes(
    report: Report, records: Mapping[str, Sequence[ImageRecord]], names: Mapping[int, str], single: bool
) -> None:
    """Report the number of boxes of each class, and classes without any."""
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
        if absent := [repr(str(names[i])) for i in names if not count[i]] if count.any() else []:
            consequence = "it cannot be learned" if split == "train" else "its accuracy cannot be measured"
            text = f"no {split} image shows {some(absent)}: {consequence}."
            report.add("warning", "classes", text, "Add images of it, or remove the class.")
