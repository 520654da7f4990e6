"""Checks unlabeled images: are they usable, and does the teacher recognise their content?"""

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
from yolo_kd.check.models import devices_of, evenly_spread
from yolo_kd.check.report import Report
from yolo_kd.classes.mapping import ClassMap
from yolo_kd.distillation.sub_batches import needs_detections
from yolo_kd.distillation.teacher import Teacher
from yolo_kd.engine.setup import Setup

IMAGES = 64
"""Largest number of images of each kind that the teacher runs on, evenly spread."""
FAR, SURE = 0.3, 0.01
"""Unlabeled images are foreign if the distributions of the teacher's confidence on both kinds of images differ by more
than the first and chance explains that with less than the second (two-sample Kolmogorov-Smirnov test)."""


def check_unlabeled(
    report: Report, setup: Setup, sets: Mapping[str, Any], keys: Mapping[str, Any], classes: ClassMap | None
) -> None:
    """Compare the teacher's confidence on unlabeled and on labeled images, and check its detections.

    Args:
        report: Receives findings and numbers.
        setup: The training, with unlabeled images.
        sets: Ultralytics' data sets; `val` serves for the comparison where no training image is labeled.
        keys: Ultralytics' keys of the training.
        classes: The class map, None if the classes do not match.
    """
    plan, teacher, images = setup.plan, setup.teacher, setup.images
    assert plan is not None
    assert plan.unlabeled is not None
    assert teacher is not None
    assert images is not None
    split = "train" if "train" in sets else "val"
    labeled = sets[split]
    device = select_device(devices_of(keys)[0], verbose=False)
    # where classes are kept, labels do not name all objects
    usable = classes if "val" in sets and not plan.choice.keep_classes else None
    judged = usable is not None and bool(usable.matched) and needs_detections(plan.unlabeled, plan.recipe.reads)
    frozen = Teacher(teacher, device, reads=("scores", "boxes") if judged else ("scores",))
    size = int(np.max(keys.get("imgsz") or 640))
    try:
        found, reference = (
            _confidence(frozen, files, size, labeled.cv2_flag, device) for files in (images.files, labeled.im_files)
        )
        if judged and usable is not None:
            check_certainty(report, plan.unlabeled, frozen, sets["val"], usable, device, keys.get("classes"))
    finally:
        frozen.close()
    test = ks_2samp(found, reference)
    medians = {"unlabeled": float(np.median(found)), split: float(np.median(reference))}
    numbers = {"confidence": medians, "distance": float(test.statistic), "p_value": float(test.pvalue)}
    report.facts["unlabeled"] = {"images": len(images.files), **plan.unlabeled.to_keys(), **numbers}
    if test.statistic > FAR and test.pvalue < SURE:
        text = (
            "the unlabeled images look foreign to the teacher: the median of its largest confidence on an image is "
            f"{medians['unlabeled']:.3f} there and {medians[split]:.3f} on {split} images (distance of the "
            f"distributions {test.statistic:.2f}, p = {test.pvalue:.2g}, {len(found)} and {len(reference)} images)."
        )
        report.add("warning", "unlabeled", text, "Check that the images show the teacher's classes.")


def _confidence(teacher: Teacher, files: Sequence[str], size: int, flag: int, device: torch.device) -> list[float]:
    """Return the teacher's largest class probability on each of the chosen images."""
    letterbox = LetterBox((size, size))
    found = []
    for index in evenly_spread(min(len(files), IMAGES), len(files)):
        image = imread(files[index], flags=flag)
        if image is not None:
            pixels = np.atleast_3d(letterbox(image=np.atleast_3d(image)))[..., ::-1].transpose(2, 0, 1)
            batch = torch.from_numpy(np.ascontiguousarray(pixels))[None].to(device).float() / 255
            found.append(teacher(batch).objectness.max().item())
    return found
