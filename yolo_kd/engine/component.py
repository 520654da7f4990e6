"""Components: concerns of a training that share one trainer, each in a class of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from ultralytics.utils.torch_utils import unwrap_model

from yolo_kd.upstream.heads import OptimizerScope

Base: Any = object
"""The trainer that `Hosted` is mixed into, for the type checker."""


class Component:
    """One concern of a training.

    Each method wraps the trainer's method of the same name. It receives `proceed`, which continues with the next
    component and finally with Ultralytics' own method, and does its work before, after, around or in place of that.
    Methods that a component does not override only proceed.

    A component reads its trainer's public attributes and calls no method of another component.

    Args:
        trainer: The host. It is not initialised yet: components exist before Ultralytics' constructor runs.

    Attributes:
        state_key: Key of the component's state inside the optimiser's state dict, None for no state.
    """

    state_key: str | None = None

    def __init__(self, trainer: Any):
        self.trainer = trainer

    # ------------------------------------------------------------------------------------------------ set-up

    def construct(self, proceed: Callable[[], None]) -> None:
        """Wrap Ultralytics' constructor, which resolves arguments, creates the run's folder and reads the data set."""
        proceed()

    def get_dataset(self, proceed: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the data set's dictionary."""
        return proceed()

    def get_model(self, proceed: Callable[..., nn.Module], cfg: Any, weights: Any, verbose: bool) -> nn.Module:
        """Return the student, built from its YAML and loaded with weights."""
        return proceed(cfg, weights, verbose)

    def set_model_attributes(self, proceed: Callable[[], None]) -> None:
        """Prepare the student, which has just moved to its device."""
        proceed()

    def build_dataset(self, proceed: Callable[..., Any], path: Any, mode: str, batch: int | None) -> Any:
        """Return the data set of one split."""
        return proceed(path, mode, batch)

    def get_dataloader(self, proceed: Callable[..., Any], path: Any, batch_size: int, rank: int, mode: str) -> Any:
        """Return the loader of one split."""
        return proceed(path, batch_size, rank, mode)

    def auto_batch(self, proceed: Callable[[], int]) -> int:
        """Return the batch size that fits into memory."""
        return proceed()

    def trained_module(self) -> nn.Module | None:
        """Return a module that the student's optimiser trains besides the student."""
        return None

    def build_optimizer(self, proceed: Callable[[], torch.optim.Optimizer]) -> torch.optim.Optimizer:
        """Return the optimiser."""
        return proceed()

    def build_pipeline(self, proceed: Callable[[], None]) -> None:
        """Build loaders and optimiser; Ultralytics does it again with half the batch when memory runs out."""
        proceed()

    def setup_train(self, proceed: Callable[[], None]) -> None:
        """Set up everything before the first epoch."""
        proceed()

    def resume_training(self, proceed: Callable[[dict | None], None], checkpoint: dict | None) -> None:
        """Continue from a checkpoint, None for a new run."""
        proceed(checkpoint)

    def load_checkpoint_state(self, proceed: Callable[[dict], None], checkpoint: dict) -> None:
        """Restore the state of a training, on resume or in the recovery from NaN."""
        proceed(checkpoint)

    # ------------------------------------------------------------------------------------------------ training

    def train(self, proceed: Callable[[], Any]) -> Any:
        """Run the training, or launch its processes."""
        return proceed()

    def do_train(self, proceed: Callable[[], None]) -> None:
        """Run the training in this process."""
        proceed()

    def run_callbacks(self, proceed: Callable[[str], None], event: str) -> None:
        """Run the callbacks of an event of Ultralytics, such as `on_train_epoch_start`."""
        proceed(event)

    def preprocess_batch(self, proceed: Callable[[dict], dict], batch: dict) -> dict:
        """Return a batch as the student gets it: on the device, after multi-scale."""
        return proceed(batch)

    def optimizer_step(self, proceed: Callable[[], None]) -> None:
        """Step the optimiser."""
        proceed()

    def validate(self, proceed: Callable[[], Any]) -> Any:
        """Return metrics and fitness of the EMA."""
        return proceed()

    def recover_from_nan(self, proceed: Callable[[int], bool], epoch: int) -> bool:
        """End an epoch, and return whether it must be repeated from the last checkpoint."""
        return proceed(epoch)

    # ------------------------------------------------------------------------------------------------ results

    def get_validator(self, proceed: Callable[[], Any]) -> Any:
        """Return the validator."""
        return proceed()

    def label_loss_items(self, proceed: Callable[..., Any], loss_items: Any, prefix: str) -> Any:
        """Return the logged losses by column, or the columns where there are no losses."""
        return proceed(loss_items, prefix)

    def save_model(self, proceed: Callable[[], bool]) -> bool:
        """Write the checkpoints of an epoch."""
        return proceed()

    def save_metrics(self, proceed: Callable[[dict], None], metrics: dict) -> None:
        """Append a row to `results.csv`."""
        proceed(metrics)

    def final_eval(self, proceed: Callable[[], None]) -> None:
        """Strip and evaluate the finished checkpoints."""
        proceed()

    def finish_checkpoint(self, proceed: Callable[[dict], None], checkpoint: dict[str, Any]) -> None:
        """Change a checkpoint in place before it is stripped and evaluated."""
        proceed(checkpoint)

    def provenance(self, proceed: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return plain entries for the finished checkpoints."""
        return proceed()

    # ------------------------------------------------------------------------------------------------ state

    def state_dict(self) -> Any:
        """Return the component's state, in plain types and tensors on the CPU."""
        return None

    def load_state_dict(self, state: Any) -> None:
        """Restore what `state_dict` returned."""


class Hosted(Base):
    """A mixin that makes an Ultralytics trainer a host of components.

    `class MyTrainer(Hosted, SegmentationTrainer)` is a host; put components into `components`, outermost first.

    Attributes:
        components: The components, outermost first.
        skipped: Batches of the current epoch that an earlier, interrupted process has trained.
    """

    components: tuple[Component, ...] = ()
    skipped = 0
    train_loader: Any

    def __init__(self, cfg: Any, overrides: dict | None = None, _callbacks: dict | None = None):
        self.through("construct", partial(super().__init__, cfg, overrides, _callbacks))()

    def through(self, hook: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return a call that passes through that method of every component."""
        for component in reversed(self.components):
            call = partial(getattr(component, hook), call)
        return call

    @property
    def alone(self) -> bool:
        """Whether the student trains without a teacher, which the command that resumes the run must say."""
        return True

    def get_dataset(self) -> dict[str, Any]:
        """See `Component.get_dataset`."""
        return self.through("get_dataset", super().get_dataset)()

    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> Any:
        """See `Component.get_model`."""
        return self.through("get_model", super().get_model)(cfg, weights, verbose)

    def set_model_attributes(self) -> None:
        """See `Component.set_model_attributes`."""
        self.through("set_model_attributes", super().set_model_attributes)()

    def build_dataset(self, img_path: Any, mode: str = "train", batch: int | None = None) -> Any:
        """See `Component.build_dataset`."""
        return self.through("build_dataset", super().build_dataset)(img_path, mode, batch)

    def get_dataloader(self, dataset_path: Any, batch_size: int = 16, rank: int = 0, mode: str = "train") -> Any:
        """See `Component.get_dataloader`."""
        return self.through("get_dataloader", super().get_dataloader)(dataset_path, batch_size, rank, mode)

    def auto_batch(self) -> int:
        """See `Component.auto_batch`."""
        return self.through("auto_batch", super().auto_batch)()

    def build_optimizer(self, model: Any, *args: Any, **keys: Any) -> torch.optim.Optimizer:
        """See `Component.build_optimizer`; the components' state travels in the optimiser's state dict."""
        modules = [m for component in self.components if (m := component.trained_module()) is not None]
        scope = OptimizerScope(unwrap_model(model), *modules) if modules else model
        optimizer = self.through("build_optimizer", partial(super().build_optimizer, scope, *args, **keys))()
        carry_state(optimizer, self.components)
        return optimizer

    def _build_train_pipeline(self) -> None:
        self.through("build_pipeline", super()._build_train_pipeline)()

    def _setup_train(self) -> None:
        self.through("setup_train", super()._setup_train)()

    def resume_training(self, ckpt: dict | None) -> None:
        """See `Component.resume_training`."""
        self.through("resume_training", super().resume_training)(ckpt)

    def _load_checkpoint_state(self, ckpt: dict) -> None:
        self.through("load_checkpoint_state", super()._load_checkpoint_state)(ckpt)

    def restore(self, checkpoint: dict) -> None:
        """Restore the state of a training from a checkpoint."""
        self._load_checkpoint_state(checkpoint)

    def train(self) -> Any:
        """See `Component.train`."""
        return self.through("train", super().train)()

    def _do_train(self) -> None:
        self.through("do_train", super()._do_train)()

    def run_callbacks(self, event: str) -> None:
        """See `Component.run_callbacks`."""
        self.through("run_callbacks", super().run_callbacks)(event)

    def preprocess_batch(self, batch: dict) -> dict:
        """See `Component.preprocess_batch`."""
        return self.through("preprocess_batch", super().preprocess_batch)(batch)

    def optimizer_step(self) -> None:
        """See `Component.optimizer_step`."""
        self.through("optimizer_step", super().optimizer_step)()

    def validate(self) -> Any:
        """See `Component.validate`."""
        return self.through("validate", super().validate)()

    def _handle_nan_recovery(self, epoch: int) -> bool:
        return self.through("recover_from_nan", super()._handle_nan_recovery)(epoch)

    def get_validator(self) -> Any:
        """See `Component.get_validator`."""
        return self.through("get_validator", super().get_validator)()

    def label_loss_items(self, loss_items: Any = None, prefix: str = "train") -> Any:
        """See `Component.label_loss_items`."""
        return self.through("label_loss_items", super().label_loss_items)(loss_items, prefix)

    def save_model(self) -> bool:
        """See `Component.save_model`."""
        return self.through("save_model", super().save_model)()

    def save_metrics(self, metrics: dict) -> None:
        """See `Component.save_metrics`."""
        self.through("save_metrics", super().save_metrics)(metrics)

    def final_eval(self) -> None:
        """See `Component.final_eval`."""
        self.through("final_eval", super().final_eval)()

    def finish_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See `Component.finish_checkpoint`."""
        self.through("finish_checkpoint", lambda _: None)(checkpoint)

    def provenance(self) -> dict[str, Any]:
        """See `Component.provenance`."""
        return self.through("provenance", dict)()


def carry_state(optimizer: torch.optim.Optimizer, components: tuple[Component, ...]) -> None:
    """Let the components' state travel in the optimiser's state dict, one key for each.

    There it is in every checkpoint that can be resumed, resume and the recovery from NaN restore it, and stripping the
    optimiser from a finished file removes it.
    """
    stateful = {c.state_key: c for c in components if c.state_key is not None}

    def save(_optimizer: Any, state: dict) -> dict:
        return {**state, **{key: component.state_dict() for key, component in stateful.items()}}

    def load(_optimizer: Any, state: dict) -> dict:
        state = dict(state)
        for key, component in stateful.items():
            if (saved := state.pop(key, None)) is not None:
                component.load_state_dict(saved)
        return state

    optimizer.register_state_dict_post_hook(save)
    optimizer.register_load_state_dict_pre_hook(load)
