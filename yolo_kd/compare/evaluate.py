"""What a checkpoint is worth and what it costs: metrics by split, class and size, parameters, time of a picture.

All checkpoints of a comparison go through the same lines with the same settings. A result is kept under the hash of its
checkpoint and settings, so a comparison that is called again evaluates only what is new.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionValidator
from ultralytics.utils.ops import scale_boxes
from ultralytics.utils.torch_utils import get_flops, get_num_params

from yolo_kd.classes.match import indices_of
from yolo_kd.classes.names import short
from yolo_kd.compare.runs import fingerprint, write_text
from yolo_kd.compare.size_metrics import ImageResult, ap_by_size
from yolo_kd.errors import CheckpointError
from yolo_kd.safe_loading.checkpoint import load_checkpoint_file, load_detector, sha256
from yolo_kd.safe_loading.dataset import optional_train
from yolo_kd.safe_loading.restricted import quiet, restricted_loading
from yolo_kd.upstream.heads import strides_of

METRICS = ("mAP50-95", "mAP50", "precision", "recall")
# keys of a training that also change how a checkpoint is evaluated
_SETTINGS = ("imgsz", "batch", "device", "single_cls", "classes", "iou", "max_det", "agnostic_nms", "workers", "nms")
# latency: seconds for all files, rounds in which each file sees one picture
_BUDGET, _WARM_UP, _MIN_ROUNDS, _MAX_ROUNDS = 10.0, 5, 15, 500
_VERSION = 2  # of the files that results are kept in


class OtherClassesError(CheckpointError):
    """A model cannot be evaluated on a data set: it has neither the data set's classes nor as many."""


@dataclass(frozen=True)
class Settings:
    """How every checkpoint of a comparison is evaluated.

    Attributes:
        data: The data YAML.
        splits: The splits to evaluate on: val, and test where the data has one.
        keys: Ultralytics' validation keys.
        trust: Load checkpoints without restriction.
    """

    data: str
    splits: tuple[str, ...]
    keys: Mapping[str, Any]
    trust: bool = False

    @property
    def imgsz(self) -> int:
        """Side of the network's input in pixels."""
        return int(self.keys.get("imgsz", 640))


def settings_of(keys: Mapping[str, Any], data: Mapping[str, Any], trust: bool) -> Settings:
    """Return the settings of an evaluation from the keys of a training and the data set that they name."""
    given = {key: keys[key] for key in _SETTINGS if keys.get(key) is not None}
    if not isinstance(given.get("batch", 16), int) or given.get("batch", 16) < 1:
        given["batch"] = 16  # batch=-1 and fractions ask for a search that is meant for training
    splits = ("val", "test") if data.get("test") else ("val",)
    return Settings(str(keys["data"]), splits, given, trust)


class Recorder(DetectionValidator):
    """Ultralytics' validator, which also keeps every prediction and label in pixels of the picture's file.

    Where a model has the data set's classes at other indices (a teacher that knows more, or a student that kept its
    teacher's), labels are brought to its classes by name, and what is kept counts in the data set's.
    """

    images: list[ImageResult]
    index_of: list[int]  # of each class of the data set, its index in the model

    def init_metrics(self, model: torch.nn.Module) -> None:
        """Start anew."""
        super().init_metrics(model)
        self.images = []
        self.index_of = [*range(len(model.names))]  # type: ignore[arg-type]
        if self.args.single_cls:
            return
        theirs, ours = ([str(names[i]) for i in sorted(names)] for names in (model.names, self.data["names"]))  # type: ignore[index, arg-type]
        if (found := indices_of(ours, theirs)) is not None:
            self.index_of = found
        elif len(theirs) != len(ours):
            raise OtherClassesError(
                f"a model of {len(theirs)} classes ({short(theirs)}) cannot be evaluated on this data set: it does not "
                f"have the data set's {len(ours)} ({short(ours)})."
            )

    def preprocess(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Let labels count in the model's classes."""
        batch = super().preprocess(batch)
        table = torch.tensor(self.index_of, dtype=batch["cls"].dtype, device=batch["cls"].device)
        batch["cls"] = table[batch["cls"].long()]
        return batch

    def update_metrics(self, preds: list[dict[str, torch.Tensor]], batch: dict[str, Any]) -> None:
        """Keep predictions and labels of a batch, then do as Ultralytics does."""
        for i, pred in enumerate(preds):
            label = self._prepare_batch(i, batch)
            shape = tuple(int(x) for x in label["ori_shape"][:2])
            scaled = [
                scale_boxes(label["imgsz"], boxes.clone().float(), shape, label["ratio_pad"]).cpu().numpy()
                if len(boxes)
                else np.zeros((0, 4), np.float32)
                for boxes in (pred["bboxes"], label["bboxes"])
            ]
            classes = (pred["cls"] * 0 if self.args.single_cls else pred["cls"]).cpu().numpy().astype(int)
            ours = {c: i for i, c in enumerate(self.index_of)}
            known = np.array([c in ours for c in classes.tolist()], dtype=bool)
            self.images.append(
                ImageResult(
                    str(label["im_file"]),
                    (shape[0], shape[1]),
                    scaled[0][known],
                    pred["conf"].float().cpu().numpy()[known],
                    np.array([ours[c] for c in classes[known].tolist()], dtype=int),
                    scaled[1],
                    np.array([ours[c] for c in label["cls"].int().tolist()], dtype=int),
                )
            )
        super().update_metrics(preds, batch)


def evaluate(checkpoint: Path, settings: Settings, cache: Path) -> dict[str, Any]:
    """Evaluate a checkpoint on every split, or read what an earlier call kept.

    Args:
        checkpoint: A detector's checkpoint.
        settings: How to evaluate.
        cache: Folder for results.

    Returns:
        Plain data: `sha256`, `parameters`, `gflops`, `imgsz` and for each split `metrics`, `classes` (mAP50-95 by
        name, None where a class has no object), `sizes`.

    Raises:
        CheckpointError: If the checkpoint cannot be loaded.
        OtherClassesError: If it does not know the data set's classes.
    """
    digest = sha256(checkpoint)
    key = fingerprint([_VERSION, digest, settings.data, settings.splits, dict(settings.keys)])
    kept = cache / f"{key}.json"
    if kept.exists() and all(predictions_file(cache, key, split).exists() for split in settings.splits):
        return json.loads(kept.read_text(encoding="utf-8"))
    detector = load_detector(checkpoint, trust=settings.trust)
    result: dict[str, Any] = {
        "key": key,
        "sha256": digest,
        "parameters": get_num_params(detector.model),
        "gflops": round(float(get_flops(detector.model, settings.imgsz)), 3),
        "imgsz": settings.imgsz,
        "strides": list(strides_of(detector.model)),
        "splits": {},
    }
    for split in settings.splits:
        result["splits"][split], images = _validate(detector.path, settings, split)
        save_predictions(predictions_file(cache, key, split), images)
    write_text(kept, json.dumps(result, indent=1) + "\n")
    return result


def _validate(checkpoint: Path, settings: Settings, split: str) -> tuple[dict[str, Any], list[ImageResult]]:
    made: list[Recorder] = []

    def recorder(**arguments: Any) -> Recorder:
        made.append(Recorder(**arguments))
        return made[-1]

    scratch = tempfile.mkdtemp(prefix="yolo_kd-")
    try:
        with restricted_loading(settings.trust), optional_train(), quiet():
            metrics = YOLO(str(checkpoint), task="detect").val(
                validator=recorder, data=settings.data, split=split, plots=False, verbose=False, save_dir=scratch,
                **settings.keys,
            )  # fmt: skip
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    images = made[0].images
    names: list[str] = [metrics.names[c] for c in made[0].index_of]
    present = {int(c): i for i, c in enumerate(metrics.box.ap_class_index)}
    values = (metrics.box.map, metrics.box.map50, metrics.box.mp, metrics.box.mr)
    return {
        "images": len(images),
        "metrics": {name: round(float(value), 6) for name, value in zip(METRICS, values, strict=True)},
        "classes": {
            name: round(float(metrics.box.maps[c]), 6) if c in present else None
            for name, c in zip(names, made[0].index_of, strict=True)
        },
        "sizes": ap_by_size(images, range(len(names))),
    }, images


# ------------------------------------------------------------------------------------------------ predictions


def predictions_file(cache: Path, key: str, split: str) -> Path:
    """Return where the predictions of an evaluation are kept."""
    return cache / f"{key}-{split}.npz"


def save_predictions(file: Path, images: Sequence[ImageResult]) -> None:
    """Write predictions and labels to one file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial.npz")
    np.savez_compressed(
        partial,
        names=np.array([i.name for i in images]),
        shapes=np.array([i.shape for i in images], int).reshape(-1, 2),
        counts=np.array([[len(i.boxes), len(i.true_boxes)] for i in images], int).reshape(-1, 2),
        boxes=_stacked([i.boxes for i in images], np.float32, 4),
        scores=_stacked([i.scores for i in images], np.float32),
        classes=_stacked([i.classes for i in images], np.int64),
        true_boxes=_stacked([i.true_boxes for i in images], np.float32, 4),
        true_classes=_stacked([i.true_classes for i in images], np.int64),
    )
    partial.replace(file)


def _stacked(parts: Sequence[np.ndarray], dtype: Any, width: int = 0) -> np.ndarray:
    shape = (-1, width) if width else (-1,)
    return np.concatenate([np.zeros((0, *shape[1:]), dtype), *(np.asarray(p, dtype).reshape(shape) for p in parts)])


def load_predictions(file: Path) -> list[ImageResult]:
    """Read what `save_predictions` wrote, in the order of the pictures' names."""
    with np.load(file) as kept:
        data = {name: kept[name] for name in kept.files}
    ends = np.cumsum(data["counts"], axis=0)
    images = []
    for i, name in enumerate(data["names"]):
        (p1, t1), (p, t) = ends[i], data["counts"][i]
        mine, true = slice(p1 - p, p1), slice(t1 - t, t1)
        images.append(
            ImageResult(
                str(name), (int(data["shapes"][i][0]), int(data["shapes"][i][1])),
                data["boxes"][mine], data["scores"][mine], data["classes"][mine],
                data["true_boxes"][true], data["true_classes"][true],
            )
        )  # fmt: skip
    return sorted(images, key=lambda image: image.name)


# ------------------------------------------------------------------------------------------------ cost


def export_onnx(checkpoint: Path, file: Path, imgsz: int, trust: bool) -> Path:
    """Export a checkpoint to ONNX, or keep the file of an earlier call.

    Args:
        checkpoint: The checkpoint.
        file: The ONNX file; the hash of its checkpoint stands beside it.
        imgsz: Side of the input in pixels.
        trust: Load the checkpoint without restriction.
    """
    note = file.with_suffix(".json")
    made_from = {"checkpoint_sha256": sha256(checkpoint), "imgsz": imgsz}
    if file.exists() and note.exists() and json.loads(note.read_text(encoding="utf-8")) == made_from:
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    copy = file.with_suffix(".pt")  # Ultralytics writes beside the checkpoint
    shutil.copyfile(checkpoint, copy)
    try:
        with restricted_loading(trust), quiet():
            YOLO(str(copy), task="detect").export(format="onnx", imgsz=imgsz, device="cpu", verbose=False)
    finally:
        copy.unlink()
    write_text(note, json.dumps(made_from) + "\n")
    return file


def onnx_latency(
    files: Mapping[str, Path], budget: float = _BUDGET, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Return the median milliseconds that each ONNX file takes for one picture on one thread of the CPU.

    The files take turns in an order that changes from round to round, so that whatever else the machine does, and
    however regularly, meets all of them alike.

    Args:
        files: ONNX files by name.
        budget: Seconds to spend, about; there are at least 15 rounds.
        clock: Seconds, for tests.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    generator = np.random.default_rng(0)
    sessions = {}
    for name, file in files.items():
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        first = session.get_inputs()[0]
        shape = [d if isinstance(d, int) else 1 for d in first.shape]
        kind = np.float16 if "float16" in first.type else np.float32
        sessions[name] = (session, {first.name: generator.random(shape).astype(kind)})
    names = list(sessions)
    times: dict[str, list[float]] = {name: [] for name in names}

    def one_round() -> None:
        for name in generator.permutation(names):
            session, feed = sessions[name]
            began = clock()
            session.run(None, feed)
            times[name].append(clock() - began)

    for _ in range(_WARM_UP):
        one_round()
    spent = sum(map(sum, times.values())) / _WARM_UP
    for found in times.values():
        found.clear()
    for _ in range(min(max(int(budget / max(spent, 1e-9)), _MIN_ROUNDS), _MAX_ROUNDS)):
        one_round()
    return {name: round(statistics.median(found) * 1000, 3) for name, found in times.items()}


def audit_of(checkpoint: Path, trust: bool) -> list[dict[str, Any]]:
    """Return the audit of the first batch that a distilled checkpoint carries, empty where it carries none."""
    held, _ = load_checkpoint_file(checkpoint, trust=trust)
    rows = (held.get("yolo_kd") or {}).get("audit") or []
    keep = ("term", "value", "gradient", "share")
    return [
        {k: row.get(k) if k == "term" else _finite(row.get(k)) for k in keep} for row in rows if isinstance(row, dict)
    ]


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
