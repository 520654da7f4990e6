"""Everything that a training needs and that is known before Ultralytics creates a folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from yolo_kd.engine.checks_before import check_models, check_unlabeled_images
from yolo_kd.engine.plan import Plan, make_plan
from yolo_kd.safe_loading.checkpoint import LoadedDetector
from yolo_kd.unlabeled.images import UnlabeledImages


@dataclass(frozen=True)
class Setup:
    """A plan, with the files that it names opened and checked once.

    Attributes:
        plan: What to distil, None for the student alone.
        teacher: The loaded teacher, None for the student alone.
        images: The unlabeled images, None without.
        labeled: Whether there are labeled training images.
    """

    plan: Plan | None = None
    teacher: LoadedDetector | None = None
    images: UnlabeledImages | None = None
    labeled: bool = True


def prepare(own: Mapping[str, Any], changes: Mapping[str, Any], keys: Mapping[str, Any], trust: bool) -> Setup:
    """Resolve and check a new training.

    Args:
        own: This package's keys, see `make_plan`.
        changes: Changes to the recipe, by `loss.key`.
        keys: Ultralytics' keys that the user gave.
        trust: Load checkpoints without restriction.

    Raises:
        YoloKDError: For every mistake that can be found now.
    """
    plan, teacher = make_plan(own, changes)
    teacher = check_models(plan, teacher, keys, trust)
    if plan is None or plan.unlabeled is None:
        return Setup(plan, teacher)
    return Setup(plan, teacher, *check_unlabeled_images(plan, keys))
