"""`KeepTrainer`: a trainer whose student gets classes beside its old ones and does not forget these."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from ultralytics.utils import LOGGER, RANK, YAML
from ultralytics.utils.torch_utils import unwrap_model

from yolo_kd.config.class_options import ClassOptions
from yolo_kd.engine.components.kept_head import KeptClasses, extend_head
from yolo_kd.engine.components.unlabeled import PoolTrainer
from yolo_kd.engine.components.weight_blend import Blend, blend_checkpoint
from yolo_kd.upstream.heads import layers_before_head

START_STATE = "yolo_kd_start"  # key of the student's start inside the optimiser's state dict


class KeepTrainer(PoolTrainer):
    """Trains for the classes of a teacher and those of the data set, where that was asked for.

    - The head has all classes, and labels count in them.
    - Only the head is trained, unless `freeze` says otherwise.
    - The finished student stands between its start and what training made of it, and so does the one that is validated.
    """

    _kept: KeptClasses | None = None
    _blend: Blend | None = None
    _data_of_labels: dict[str, Any] | None = None  # the data set with its own classes, where the run has more

    @property
    def choice(self) -> ClassOptions:
        """What the user said about classes."""
        return ClassOptions()

    def kept_classes(self, data: dict[str, Any]) -> KeptClasses:
        """Return the classes of the run, from those of the data set."""
        raise NotImplementedError

    def get_dataset(self) -> dict[str, Any]:
        """Put the teacher's classes before the data set's where they are kept."""
        data = super().get_dataset()
        if not self.choice.keep_classes:
            return data
        self._kept = self.kept_classes(data)
        self._data_of_labels = data
        return {**data, "names": self._kept.by_index, "nc": len(self._kept.names)}

    def labelled_dataset(self, img_path: Any, mode: str, batch: int | None) -> Any:
        """Read labels in the data set's own classes, as its label cache holds them, then count as the run does."""
        if self._kept is None or self._data_of_labels is None:
            return super().labelled_dataset(img_path, mode, batch)
        run = self.data
        self.data = self._data_of_labels
        try:
            dataset = super().labelled_dataset(img_path, mode, batch)
        finally:
            self.data = run
        dataset.data = run
        self._kept.renumber(dataset.labels)
        return dataset

    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> Any:
        """Let old classes start from the student's own where they are kept; a resumed run has them already."""
        model = super().get_model(cfg, weights, verbose)
        if self._kept is None or self.resume:
            return model
        extend_head(model, weights, self._kept.names)
        if self.args.freeze is None:
            self.args.freeze = layers_before_head(model)
            if RANK in {-1, 0}:
                written = self.save_dir / "args.yaml"  # before there was a model whose layers could be counted
                YAML.save(written, {**YAML.load(written), "freeze": self.args.freeze})
                LOGGER.info(
                    f"Old classes are kept: only the head is trained (freeze={self.args.freeze}), and the finished "
                    f"student goes {self.choice.keep_blend:.0%} of its way (keep_blend)"
                )
        return model

    def build_optimizer(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Let the student's start ride in every checkpoint that can be resumed."""
        optimizer = super().build_optimizer(model, *args, **kwargs)
        if self._kept is None:
            return optimizer
        share = self.choice.keep_blend
        if self._blend is None:  # otherwise Ultralytics has halved the batch, and the start lies behind
            self._blend = Blend.of(unwrap_model(self.model), share, self.freeze_layer_names)

        def save(_optimizer: Any, state: dict) -> dict:
            assert self._blend is not None
            return {**state, START_STATE: self._blend.start}

        def load(_optimizer: Any, state: dict) -> dict:
            state = dict(state)
            self._blend = Blend(state.pop(START_STATE), share)
            return state

        optimizer.register_state_dict_post_hook(save)
        optimizer.register_load_state_dict_pre_hook(load)
        return optimizer

    def validate(self) -> Any:
        """Judge the student that the run would hand out now, so that the best of these makes the best epoch."""
        if self._kept is None or self._blend is None or self.ema is None:
            return super().validate()
        with self._blend.applied(self.ema.ema, self._kept.new):
            return super().validate()

    def finish_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the finished student back towards its start."""
        super().finish_checkpoint(checkpoint)
        if self._kept is not None and self._blend is not None:
            blend_checkpoint(checkpoint, self._blend, self._kept.new)
