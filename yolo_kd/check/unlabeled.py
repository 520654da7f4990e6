"""The unlabelled pool: can it be used, and does the teacher know what is on its images?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import ks_2samp
from ultralytics.data.augment import LetterBox
from ultralytics.utils.patches import imread
from ultralytics.utils.torch_utils import select_device

from yolo_kd.check.certainty import check_certainty
from yolo_kd.check.models import devices_of
from yolo_kd.check.report import Report, number
from yolo_kd.classes.mapping import ClassMap
from yolo_kd.distillation.sub_batches import needs_detections
from yolo_kd.distillation.teacher import Teacher
from yolo_kd.engine.setup import Setup

IMAGES = 64
"""Images of each kind that the teacher is tried on, at most, evenly spread."""
FAR, SURE = 0.3, 0.01
"""The pool is foreign if the two distribution functions of the teacher's confidence are further apart than the one and
chance would do that less often than the other (two-sample Kolmogorov-Smirnov test)."""


def check_unlabeled(
    report: Report,
    setup: Setup,
    sets: Mapping[str, Any],
    keys: Mapping[str, Any],
    classes: ClassMap | None,
) -> None:
    """Report problems of the pool, whether its images look to the teacher like the labelled ones, and its certainty.

    Args:
        report: Receives findings and numbers.
        setup: The training, with unlabeled images.
        sets: Ultralytics' data sets: `train`, or without labelled images `val` is compared with.
        keys: Ultralytics' keys of the training.
        classes: Which class is which, if that is known.
    """
    plan, teacher, images = setup.plan, setup.teacher, setup.images
    assert plan is not None
    assert plan.unlabeled is not None
    assert teacher is not None
    assert images is not None
    report.facts["pool"] = {"images": len(images.files), **plan.unlabeled.to_keys()}
    split = "train" if "train" in sets else "val"
    labelled = sets[split]
    device = select_device(devices_of(keys)[0], verbose=False)
    reads = plan.recipe.reads
    # where classes are kept, labels do not name all objects
    judged = needs_detections(plan.unlabeled, reads) and "val" in sets and not plan.choice.keep_classes
    judged = judged and classes is not None and bool(classes.matched)
    seen = Teacher(teacher, device, reads=("scores", "boxes") if judged else ("scores",))
    size = int(np.max(keys.get("imgsz") or 640))
    try:
        pool, known = (
            _confidence(seen, files, size, labelled.cv2_flag, device) for files in (images.files, labelled.im_files)
        )
        if judged and classes is not None:
            check_certainty(report, plan.unlabeled, seen, sets["val"], classes, device, keys.get("classes"))
    finally:
        seen.close()
    test = ks_2samp(pool, known)
    report.facts["pool"] |= {
        "confidence": {"pool": float(np.median(pool)), split: float(np.median(known))},
        "distance": float(test.statistic),
        "p_value": float(test.pvalue),
    }
    if test.statistic > FAR and test.pvalue < SURE:
        text = (
            "the unlabelled images look foreign to the teacher: its most confident detection on an image is "
            f"{number(float(np.median(pool)))} in the median there and {number(float(np.median(known)))} on {split} "
            "images "
            f"(distance of the distributions {test.statistic:.2f}, p = {test.pvalue:.2g}, {len(pool)} and {len(known)} "
            "images)."
        )
        report.add("warning", "pool", text, "Look at the images: does the teacher know what is on them?")


def _confidence(
    teacher: Teacher, files: Sequence[str], size: int, flag: int, device: torch.device, batch: int = 8
) -> np.ndarray:
    """Return the teacher's largest class probability on images that are spread evenly over a list, (N,)."""
    chosen = [files[int(i)] for i in np.linspace(0, len(files) - 1, min(len(files), IMAGES))]
    letterbox = LetterBox((size, size))
    found = []
    for start in range(0, len(chosen), batch):
        pixels = []
        for file in chosen[start : start + batch]:
            image = imread(file, flags=flag)
            if image is None:
                continue
            image = letterbox(image=image if image.ndim == 3 else image[..., None])
            image = image if image.ndim == 3 else image[..., None]
            pixels.append(torch.from_numpy(np.ascontiguousarray(image[..., ::-1].transpose(2, 0, 1))))
        if pixels:
            view = teacher(torch.stack(pixels).to(device).float() / 255)
            found.append(view.objectness.amax(-1).cpu().numpy())
    return np.concatenate(found)
