"""`DistillationTrainer`: Ultralytics' detection trainer as a host of components. Overrides, nothing else."""

from __future__ import annotations

from typing import Any

import torch
from ultralytics.engine import trainer as engine
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils import DEFAULT_CFG

from yolo_kd.config.class_options import CLASS_KEYS
from yolo_kd.config.speed import SPEED_KEYS, Speed
from yolo_kd.config.unlabeled import UNLABELED_KEYS
from yolo_kd.distillation.distillation import Distillation
from yolo_kd.engine.component import Component, Hosted
from yolo_kd.engine.components.distillation import DistillationComponent
from yolo_kd.engine.components.durability import Durability
from yolo_kd.engine.components.keep_classes import KeepClasses
from yolo_kd.engine.components.precision import Precision
from yolo_kd.engine.components.unlabeled import Unlabeled
from yolo_kd.engine.plan import Plan, is_resolved
from yolo_kd.engine.resume import check_resumable, resumed_setup
from yolo_kd.engine.setup import Setup, prepare
from yolo_kd.environment import check_cpu_bf16, check_torchvision
from yolo_kd.errors import ConfigError
from yolo_kd.safe_loading.restricted import restricted_loading
from yolo_kd.upstream.cpu_bf16 import is_cpu_bf16
from yolo_kd.upstream.run_folders import exclusive_run_folder, shared_data

_BASIC = ("teacher", "kd", "plugins", "inherit", "trust_checkpoints", "random_teacher")
OWN_KEYS = (*_BASIC, *SPEED_KEYS, *CLASS_KEYS, *UNLABELED_KEYS)


class DistillationTrainer(Hosted, DetectionTrainer):
    """Trains a student detector under a frozen teacher.

    Use it as any Ultralytics trainer, with a few more keys::

        YOLO("yolov8n.pt").train(trainer=DistillationTrainer, teacher="yolov8s.pt", kd="objectness", data="coco8.yaml")

    The student stays a plain `DetectionModel`: distillation is a criterion object attached to it, and the teacher runs
    separately. With `kd="none"` and no teacher it is Ultralytics' own trainer, which makes it the baseline.

    Args:
        cfg: Ultralytics' defaults.
        overrides: Ultralytics' training keys and ours: `teacher` (checkpoint, or with `random_teacher` a model YAML),
            `kd` (recipe name, YAML file or mapping; or a `Setup`), `kd.<loss>.<key>` (changes to it),
            `trust_checkpoints`, and the keys of `yolo_kd.config`: speed, classes and unlabeled images.
        _callbacks: Ultralytics' callbacks.

    Attributes:
        plan: What to distil, None for the student alone.
        distillation: The step, None before the student is on its device and for the student alone.

    Raises:
        YoloKDError: For everything that can be known before the first batch, before any folder is made.
    """

    def __init__(self, cfg: Any = DEFAULT_CFG, overrides: dict | None = None, _callbacks: dict | None = None):
        overrides = dict(overrides or {})
        self._given = {key: overrides.pop(key) for key in OWN_KEYS if key in overrides}
        changes = {k.removeprefix("kd."): overrides.pop(k) for k in [*overrides] if k.startswith("kd.")}
        if overrides.get("distill_model"):
            raise ConfigError(
                "distill_model= is Ultralytics' own distillation; write teacher= with kd=ultralytics instead."
            )
        check_torchvision()
        if is_cpu_bf16(overrides):
            check_cpu_bf16()
        kd = self._given.get("kd")
        record: Any = self._given
        if isinstance(kd, Setup) or is_resolved(kd):
            record = vars(kd.plan) if isinstance(kd, Setup) else kd
        self.trust_checkpoints = bool(record.get("trust_checkpoints", False))
        self._host(Setup(), Speed.of(self._given))
        if isinstance(kd, Setup):
            self._host(kd)
        elif not overrides.get("resume"):
            self._host(prepare(self._given, changes, overrides, self.trust_checkpoints))
        with restricted_loading(self.trust_checkpoints), exclusive_run_folder():
            super().__init__(cfg, overrides, _callbacks)
        if self.plan is not None:
            self.args.kd = self.plan.to_dict()

    def _host(self, setup: Setup, speed: Speed | None = None) -> None:
        """Host the components that a training needs, outermost first."""
        plan = setup.plan
        speed = speed or (plan.speed if plan else Speed())
        components: list[Component] = [Precision(self, speed.threads)]
        if plan is not None and plan.unlabeled is not None and setup.images is not None:
            components.append(Unlabeled(self, plan.unlabeled, setup.images, setup.labeled))
        if plan is not None and setup.teacher is not None:
            if plan.choice.keep_classes:
                components.append(KeepClasses(self, plan.choice, setup.teacher))
            components.append(DistillationComponent(self, plan, setup.teacher))
        self.components = (*components, Durability(self))  # innermost: it saves before the others clean up

    def component(self, kind: type) -> Any:
        """Return the component of a kind, None where it is not hosted."""
        return next((c for c in self.components if isinstance(c, kind)), None)

    @property
    def plan(self) -> Plan | None:
        """What to distil, None for the student alone."""
        component = self.component(DistillationComponent)
        return component.plan if component else None

    @property
    def distillation(self) -> Distillation | None:
        """The step, None before the student is on its device and for the student alone."""
        component = self.component(DistillationComponent)
        return component.distillation if component else None

    @property
    def alone(self) -> bool:
        """Whether the student trains without a teacher."""
        return self.plan is None

    def check_resume(self, overrides: dict) -> None:
        """Restore recipe and teacher from the checkpoint, and refuse a teacher that is not the same file."""
        data: dict[str, Any] = {}
        if overrides.get("resume"):
            data = check_resumable(overrides, self._given, self.trust_checkpoints)
        super().check_resume(overrides)
        state = getattr(self.args, "kd", None) if self.resume else None
        if state is not None:
            self._host(resumed_setup(state, self._given, data, vars(self.args), self.trust_checkpoints))

    # ------------------------------------------------------------------------------------------------ measuring

    def prepare_to_train(self) -> None:
        """Set everything up as for a training, and stop before its first batch."""
        self._setup_train()
        self.epoch = self.start_epoch
        self._model_train()

    def precision(self) -> Any:
        """Return the autocast context of a training step."""
        return engine.autocast(torch.bfloat16 if self.args.amp == "bf16" else self.amp, device=self.device.type)

    def plain_batch(self, batch: dict) -> dict:
        """Return a batch as Ultralytics' own trainer prepares it."""
        return DetectionTrainer.preprocess_batch(self, batch)

    # ------------------------------------------------------------------------------------------------ training

    def train(self) -> Any:
        """Train, with every checkpoint load restricted and shared files written whole."""
        with restricted_loading(self.trust_checkpoints), shared_data():
            return super().train()
