"""Training for new classes without forgetting the teacher's classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from ultralytics.utils import LOGGER, RANK, YAML
from ultralytics.utils.torch_utils import unwrap_model

from yolo_kd.config.class_options import ClassOptions
from yolo_kd.engine.class_resolution import kept_classes
from yolo_kd.engine.component import Component
from yolo_kd.engine.components.kept_head import KeptClasses, extend_head
from yolo_kd.engine.components.weight_blend import Blend, blend_checkpoint
from yolo_kd.safe_loading.checkpoint import LoadedDetector
from yolo_kd.upstream.heads import layers_before_head


class KeepClasses(Component):
    """Trains for the classes of the teacher and those of the data set.

    - The head has all classes, and labels are renumbered accordingly.
    - Only the head is trained, unless `freeze` is given.
    - The weights of the finished student are a blend of those before and after training, and so are the weights that
      are validated.

    Args:
        trainer: The host.
        options: The user's class options.
        teacher: The loaded teacher.
    """

    state_key = "yolo_kd_start"

    def __init__(self, trainer: Any, options: ClassOptions, teacher: LoadedDetector):
        super().__init__(trainer)
        self.options = options
        self.kept: KeptClasses | None = None
        self._teacher = teacher
        self._blend: Blend | None = None
        self._data_of_labels: dict[str, Any] = {}  # the data set with the classes of its label files

    def get_dataset(self, proceed: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Put the teacher's classes before the data set's."""
        self._data_of_labels = data = proceed()
        self.kept = kept = kept_classes(self.options, self._teacher, data, vars(self.trainer.args))
        return {**data, "names": kept.by_index, "nc": len(kept.names)}

    def build_dataset(self, proceed: Callable[..., Any], path: Any, mode: str, batch: int | None) -> Any:
        """Read labels with the data set's class indices, as in label caches, then renumber them."""
        assert self.kept is not None
        trainer = self.trainer
        run, trainer.data = trainer.data, self._data_of_labels
        try:
            dataset = proceed(path, mode, batch)
        finally:
            trainer.data = run
        dataset.data = run
        self.kept.renumber(dataset.labels)
        return dataset

    def get_model(self, proceed: Callable[..., nn.Module], cfg: Any, weights: Any, verbose: bool) -> nn.Module:
        """Initialise the old classes from the student's head, except in a resumed run."""
        assert self.kept is not None
        trainer = self.trainer
        model = proceed(cfg, weights, verbose)
        if trainer.resume:
            return model
        extend_head(model, weights, self.kept.names)
        if trainer.args.freeze is None:
            trainer.args.freeze = layers_before_head(model)
            if RANK in {-1, 0}:
                written = trainer.save_dir / "args.yaml"  # written before the model's layers could be counted
                YAML.save(written, {**YAML.load(written), "freeze": trainer.args.freeze})
                LOGGER.info(
                    f"Old classes are kept: only the head is trained (freeze={trainer.args.freeze}), and the finished "
                    f"student moves {self.options.keep_blend:.0%} of the way to its trained weights (keep_blend)"
                )
        return model

    def set_model_attributes(self, proceed: Callable[[], None]) -> None:
        """Hide old classes that the teacher detects from the task loss."""
        proceed()
        assert self.kept is not None
        self.trainer.distillation.protect(self.kept)

    def build_optimizer(self, proceed: Callable[[], torch.optim.Optimizer]) -> torch.optim.Optimizer:
        """Copy the student's weights before training, but not again when Ultralytics halves the batch."""
        if self._blend is None:
            student = unwrap_model(self.trainer.model)
            self._blend = Blend.of(student, self.options.keep_blend, self.trainer.freeze_layer_names)
        return proceed()

    def validate(self, proceed: Callable[[], Any]) -> Any:
        """Validate the blended student, so that `best.pt` is the best of the students that would be finished."""
        if self._blend is None or self.kept is None or self.trainer.ema is None:
            return proceed()
        with self._blend.applied(self.trainer.ema.ema, self.kept.new):
            return proceed()

    def finish_checkpoint(self, proceed: Callable[[dict], None], checkpoint: dict[str, Any]) -> None:
        """Blend the weights of a finished checkpoint."""
        proceed(checkpoint)
        if self._blend is not None and self.kept is not None:
            blend_checkpoint(checkpoint, self._blend, self.kept.new)

    def state_dict(self) -> Any:
        """Return the student's weights before training."""
        assert self._blend is not None
        return self._blend.start

    def load_state_dict(self, state: Any) -> None:
        """Restore the weights before training."""
        self._blend = Blend(state, self.options.keep_blend)
