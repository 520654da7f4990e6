"""Measures a checkpoint: metrics by split, class and object size, parameters, and latency.

All checkpoints of a comparison are evaluated by the same code with the same settings. A result is kept in a file named
after the hash of its checkpoint and settings, so a comparison that is called again evaluates only new checkpoints.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
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
from yolo_kd.compare.records import METRICS, AuditRow, Evaluation, SplitResult
from yolo_kd.compare.runs import write_text
from yolo_kd.compare.size_metrics import ImageResult, ap_by_size
from yolo_kd.engine.run_files import write_atomically
from yolo_kd.errors import CheckpointError
from yolo_kd.safe_loading.checkpoint import load_checkpoint_file, load_detector, sha256
from yolo_kd.safe_loading.dataset import optional_train
from yolo_kd.safe_loading.restricted import quiet, restricted_loading

# keys of a training that also change how a checkpoint is evaluated
_SETTINGS = ("imgsz", "batch", "device", "single_cls", "classes", "iou", "max_det", "agnostic_nms", "workers", "nms")
_VERSION = 3  # of the files with results
_ARRAYS = ("boxes", "scores", "classes", "true_boxes", "true_classes")  # of an `ImageResult`


class OtherClassesError(CheckpointError):
    """A model has neither the classes of the data set nor the same number of classes."""


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
    def headline(self) -> str:
        """The split of the verdicts: test, or val where the data has no test split."""
        return "test" if "test" in self.splits else "val"

    @property
    def imgsz(self) -> int:
        """Side of the network's input in pixels."""
        return int(self.keys.get("imgsz", 640))


def settings_of(keys: Mapping[str, Any], data: Mapping[str, Any], trust: bool) -> Settings:
    """Return the settings of an evaluation from the keys of a training and the content of its data YAML."""
    given = {key: keys[key] for key in _SETTINGS if keys.get(key) is not None}
    if not isinstance(given.get("batch", 16), int) or given.get("batch", 16) < 1:
        given["batch"] = 16  # batch=-1 and fractions start a search that is meant for training
    splits = ("val", "test") if data.get("test") else ("val",)
    return Settings(str(keys["data"]), splits, given, trust)


class RecordingValidator(DetectionValidator):
    """Ultralytics' validator, which also keeps every prediction and label in pixels of the image file.

    A model may have the data set's classes at other indices: a teacher with more classes, or a student that kept the
    classes of its teacher. Labels are then mapped onto the model's classes by name, and predictions and labels are kept
    with the data set's indices.
    """

    images: list[ImageResult]
    index_of: list[int]  # index in the model, by index in the data set

    def init_metrics(self, model: torch.nn.Module) -> None:
        """Reset everything."""
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
        """Map labels onto the model's classes."""
        batch = super().preprocess(batch)
        table = torch.tensor(self.index_of, dtype=batch["cls"].dtype, device=batch["cls"].device)
        batch["cls"] = table[batch["cls"].long()]
        return batch

    def update_metrics(self, preds: list[dict[str, torch.Tensor]], batch: dict[str, Any]) -> None:
        """Keep predictions and labels of a batch, then update the metrics as Ultralytics does."""
        index_in_data = np.full(len(self.names), -1)
        index_in_data[self.index_of] = range(len(self.index_of))
        for i, pred in enumerate(preds):
            label = self._prepare_batch(i, batch)
            height, width = (int(x) for x in label["ori_shape"][:2])
            scaled = [
                scale_boxes(label["imgsz"], boxes.clone().float(), (height, width), label["ratio_pad"]).cpu().numpy()
                if len(boxes)
                else np.zeros((0, 4), np.float32)
                for boxes in (pred["bboxes"], label["bboxes"])
            ]
            confidences = pred["conf"].float().cpu().numpy()
            classes = pred["cls"] * 0 if self.args.single_cls else pred["cls"]
            ours, true = (index_in_data[found.int().cpu().numpy()] for found in (classes, label["cls"]))
            kept = ours >= 0
            name, shape = str(label["im_file"]), (height, width)
            image = ImageResult(name, shape, scaled[0][kept], confidences[kept], ours[kept], scaled[1], true)
            self.images.append(image)
        super().update_metrics(preds, batch)


def evaluate(checkpoint: Path, settings: Settings, cache: Path) -> Evaluation:
    """Evaluate a checkpoint on every split, or read the result of an earlier call.

    Args:
        checkpoint: A detector's checkpoint.
        settings: How to evaluate.
        cache: Folder for results.

    Raises:
        CheckpointError: If the checkpoint cannot be loaded.
        OtherClassesError: If it does not have the data set's classes.
    """
    digest = sha256(checkpoint)
    identity = [_VERSION, digest, settings.data, settings.splits, dict(settings.keys)]
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    kept = cache / f"{key}.json"
    if all(predictions_file(cache, key, split).exists() for split in settings.splits):
        with contextlib.suppress(OSError, ValueError):  # missing or damaged: evaluate again
            return Evaluation.from_json(kept.read_bytes())
    detector = load_detector(checkpoint, trust=settings.trust)
    parameters = get_num_params(detector.model)
    gflops = round(float(get_flops(detector.model, settings.imgsz)), 3)
    splits = {}
    for split in settings.splits:
        splits[split], images = _validate(detector.path, settings, split)
        save_predictions(predictions_file(cache, key, split), images)
    result = Evaluation(key=key, sha256=digest, parameters=parameters, gflops=gflops, splits=splits)
    write_text(kept, result.to_json())
    return result


def _validate(checkpoint: Path, settings: Settings, split: str) -> tuple[SplitResult, list[ImageResult]]:
    made: list[RecordingValidator] = []

    def validator(**arguments: Any) -> RecordingValidator:
        made.append(RecordingValidator(**arguments))
        return made[-1]

    with (
        tempfile.TemporaryDirectory(prefix="yolo_kd-", ignore_cleanup_errors=True) as scratch,
        restricted_loading(settings.trust),
        optional_train(),
        quiet(),
    ):
        metrics = YOLO(str(checkpoint), task="detect").val(
            validator=validator, data=settings.data, split=split, plots=False, verbose=False, save_dir=scratch,
            **settings.keys,
        )  # fmt: skip
    images = made[0].images
    names: list[str] = [metrics.names[c] for c in made[0].index_of]
    maps = {int(c): round(float(metrics.box.maps[c]), 6) for c in metrics.box.ap_class_index}
    numbers = (metrics.box.map, metrics.box.map50, metrics.box.mp, metrics.box.mr)
    result = SplitResult(
        images=len(images),
        metrics={name: round(float(number), 6) for name, number in zip(METRICS, numbers, strict=True)},
        classes={name: maps.get(c) for name, c in zip(names, made[0].index_of, strict=True)},
        sizes=ap_by_size(images, range(len(names))),
    )
    return result, images


# ------------------------------------------------------------------------------------------------ predictions


def predictions_file(cache: Path, key: str, split: str) -> Path:
    """Return the file with the predictions of an evaluation."""
    return cache / f"{key}-{split}.npz"


def save_predictions(file: Path, images: Sequence[ImageResult]) -> None:
    """Write predictions and labels to one file."""
    arrays: dict[str, Any] = {
        name: np.concatenate([getattr(image, name) for image in images]) for name in _ARRAYS if images
    }
    content = io.BytesIO()
    np.savez_compressed(
        content,
        names=np.array([i.name for i in images]),
        shapes=np.array([i.shape for i in images], int).reshape(-1, 2),
        counts=np.array([[len(i.boxes), len(i.true_boxes)] for i in images], int).reshape(-1, 2),
        **arrays,
    )
    write_atomically(file, content.getvalue())


def load_predictions(file: Path) -> list[ImageResult]:
    """Read what `save_predictions` wrote, sorted by image name."""
    with np.load(file) as kept:
        data = {name: kept[name] for name in kept.files}
    ends = np.cumsum(data["counts"], axis=0)[:-1]
    arrays = [np.split(data[name], ends[:, int(name.startswith("true"))]) for name in _ARRAYS if name in data]
    images = [
        ImageResult(str(name), (int(height), int(width)), *(array[i] for array in arrays))
        for i, (name, (height, width)) in enumerate(zip(data["names"], data["shapes"], strict=True))
    ]
    return sorted(images, key=lambda image: image.name)


def audit_of(checkpoint: Path, trust: bool) -> tuple[AuditRow, ...]:
    """Return the audit of the first batch that a distilled checkpoint holds, empty where it holds none."""
    content, _ = load_checkpoint_file(checkpoint, trust=trust)
    rows = (content.get("yolo_kd") or {}).get("audit") or []
    return tuple(
        AuditRow(term=str(row.get("term")), **{key: _finite(row.get(key)) for key in ("value", "gradient", "share")})
        for row in rows
        if isinstance(row, dict)
    )


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
