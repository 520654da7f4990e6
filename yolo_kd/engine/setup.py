"""Everything that a training needs and that is known before Ultralytics creates a folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ultralytics.utils import RANK

from yolo_kd.config.command_line import NO_RECIPE
from yolo_kd.config.speed import Speed
from yolo_kd.config.train_options import TrainOptions, train_options
from yolo_kd.engine.checks_before import check_models, check_unlabeled_images
from yolo_kd.engine.plan import Plan, is_record, make_plan
from yolo_kd.errors import ConfigError
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
        alone: How a student without a teacher is trained fast.
    """

    plan: Plan | None = None
    teacher: LoadedDetector | None = None
    images: UnlabeledImages | None = None
    labeled: bool = True
    alone: Speed = field(default_factory=Speed)

    @property
    def speed(self) -> Speed:
        """How the training is made fast."""
        return self.alone if self.plan is None else self.plan.speed

    @property
    def trusts(self) -> bool:
        """Whether checkpoints are loaded without restriction."""
        return self.plan is not None and self.plan.trust_checkpoints


@dataclass(frozen=True)
class Request:
    """What a trainer was asked to do, from whichever way in.

    Attributes:
        keys: Ultralytics' keys.
        options: All keys as they were read; None in a process of multi-GPU training, which receives a record, and for a
            setup that is prepared already.
        setup: The training with its files opened, None for a run that is resumed.
        trust: Load checkpoints without restriction.
    """

    keys: dict[str, Any]
    options: TrainOptions | None
    setup: Setup | None
    trust: bool


def read_request(overrides: Mapping[str, Any]) -> Request:
    """Read the keys that a trainer is constructed with.

    Args:
        overrides: Ultralytics' keys and ours. `kd` may hold all of ours: `TrainOptions` from a command line, a `Setup`,
            or a plan's record.

    Raises:
        YoloKDError: For every mistake that can be found now.
    """
    keys = {key: value for key, value in overrides.items() if key != "kd"}
    kd = overrides.get("kd")
    if isinstance(kd, Setup):
        return Request(keys, None, kd, kd.trusts)
    if is_record(kd):
        plan = Plan.from_dict(kd)
        setup = None if keys.get("resume") else _opened(plan, None, keys, plan.trust_checkpoints, plan.speed)
        return Request(keys, None, setup, plan.trust_checkpoints)
    options = kd if isinstance(kd, TrainOptions) else _options(overrides)
    keys = {**options.ultralytics, "task": "detect", "mode": "train"}
    if options.resume is not None:
        return Request({**keys, "resume": options.resume}, options, None, options.trust_checkpoints)
    return Request({**keys, "model": options.student}, options, prepare(options), options.trust_checkpoints)


def prepare(options: TrainOptions) -> Setup:
    """Resolve a new training, and open and check its files.

    Raises:
        YoloKDError: For every mistake that can be found now.
    """
    plan, teacher = make_plan(options)
    keys = {**options.ultralytics, "model": options.student}
    return _opened(plan, teacher, keys, options.trust_checkpoints, options.speed)


def _options(overrides: Mapping[str, Any]) -> TrainOptions:
    """Return the options of Python keywords, which name the student `model`."""
    if overrides.get("distill_model"):
        raise ConfigError(
            "distill_model= is Ultralytics' own distillation; write teacher= with kd=ultralytics instead."
        )
    keys = {key: value for key, value in overrides.items() if key != "model"}
    if not keys.get("resume"):
        keys["student"] = overrides.get("model")
        if keys.get("kd") is None and keys.get("teacher") is None:
            if RANK == -1:
                raise ConfigError("no teacher: add teacher=<checkpoint>, or kd=none to train the student alone.")
            keys["kd"] = NO_RECIPE  # a process of multi-GPU training whose parent has no plan
    return train_options(keys)


def _opened(
    plan: Plan | None, teacher: LoadedDetector | None, keys: Mapping[str, Any], trust: bool, speed: Speed
) -> Setup:
    """Open and check the files of a plan."""
    teacher, data = check_models(plan, teacher, keys, trust)
    if plan is None or plan.unlabeled is None:
        return Setup(plan, teacher, alone=speed)
    return Setup(plan, teacher, *check_unlabeled_images(plan, data, keys))
