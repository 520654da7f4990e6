"""`DistillationTrainer`: Ultralytics' detection trainer as a host of components. Overrides, nothing else."""

from __future__ import annotations

from typing import Any

import torch
from ultralytics.engine import trainer as engine
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils import DEFAULT_CFG

from yolo_kd.config.speed import Speed
from yolo_kd.distillation.distillation import Distillation
from yolo_kd.engine.component import Hosted
from yolo_kd.engine.components.distillation import DistillationComponent
from yolo_kd.engine.hosting import components_of
from yolo_kd.engine.plan import Plan
from yolo_kd.engine.resume import check_resumable, resumed_setup
from yolo_kd.engine.setup import Setup, read_request
from yolo_kd.environment import check_cpu_bf16, check_torchvision
from yolo_kd.safe_loading.restricted import restricted_loading
from yolo_kd.upstream.cpu_bf16 import is_cpu_bf16
from yolo_kd.upstream.run_folders import exclusive_run_folder, shared_data


class DistillationTrainer(Hosted, DetectionTrainer):
    """Trains a student detector under a frozen teacher.

    Use it as any Ultralytics trainer, with a few more keys::

        YOLO("yolov8n.pt").train(trainer=DistillationTrainer, teacher="yolov8s.pt", kd="objectness", data="coco8.yaml")

    The student stays a plain `DetectionModel`: distillation is a criterion object attached to it, and the teacher runs
    separately. With `kd="none"` and no teacher it is Ultralytics' own trainer, which makes it the baseline.

    Args:
        cfg: Ultralytics' defaults.
        overrides: Ultralytics' training keys and ours: `teacher` (checkpoint, or with `random_teacher` a model YAML),
            `kd` (recipe name, YAML file or mapping), `kd.<loss>.<key>` (changes to it), `trust_checkpoints`, and the
            other keys of `TrainOptions`. `kd` may also be `TrainOptions` or a `Setup`, which hold all of our keys.
        _callbacks: Ultralytics' callbacks.

    Attributes:
        plan: What to distil, None for the student alone.
        distillation: The step, None before the student is on its device and for the student alone.

    Raises:
        YoloKDError: For everything that can be known before the first batch, before any folder is made.
    """

    def __init__(self, cfg: Any = DEFAULT_CFG, overrides: dict | None = None, _callbacks: dict | None = None):
        check_torchvision()
        if is_cpu_bf16(overrides or {}):
            check_cpu_bf16()
        self._request = request = read_request(overrides or {})
        alone = request.options.speed if request.options else Speed()
        self.components = components_of(self, request.setup or Setup(alone=alone))
        with restricted_loading(request.trust), exclusive_run_folder():
            super().__init__(cfg, request.keys, _callbacks)
        if self.plan is not None:
            self.args.kd = self.plan.to_dict()

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
        request = self._request
        data = check_resumable(overrides, request.options, request.trust) if overrides.get("resume") else {}
        super().check_resume(overrides)
        state = getattr(self.args, "kd", None) if self.resume else None
        if state is not None:
            self.components = components_of(self, resumed_setup(state, request, data, vars(self.args)))

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
        with restricted_loading(self._request.trust), shared_data():
            return super().train()
