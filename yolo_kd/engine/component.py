"""Components, each of which is one concern of a training, and the mixin that makes a trainer their host."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from ultralytics.utils.torch_utils import unwrap_model

from yolo_kd.errors import did_you_mean
from yolo_kd.upstream.heads import OptimizerScope

Base: Any = object
"""The trainer that `Hosted` is mixed into, for the type checker."""


class Component:
    """One concern of a training.

    A method that takes `proceed` wraps the method of `Hosted` of the same name without underscores around it: `init`
    wraps the constructor, and `do_train` wraps `_do_train`. It receives `proceed` and the arguments of that method.
    Calling `proceed` runs the next component's method and finally Ultralytics' method; the component does its work
    before or after that call, around it, or instead of it. Every method is optional::

        class Stopwatch(Component):
            def validate(self, proceed):
                began = time.perf_counter()
                result = proceed()
                LOGGER.info(f"validated in {time.perf_counter() - began:.1f} s")
                return result

    A component reads its trainer's public attributes and calls no method of another component.

    Args:
        trainer: The host. It is not initialised yet: components exist before Ultralytics' constructor runs.

    Attributes:
        state_key: Key of the component's state inside the optimiser's state dict, None for no state. A component with a
            key has `state_dict`, which returns plain types and tensors on the CPU, and `load_state_dict`.
    """

    state_key: str | None = None
    state_dict: Callable[[], Any]
    load_state_dict: Callable[[Any], None]

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def __init_subclass__(cls) -> None:
        for name, function in vars(cls).items():
            code = getattr(function, "__code__", None)
            if code is not None and "proceed" in code.co_varnames[:2] and name not in hooks():
                raise TypeError(f"{cls.__name__}.{name} wraps no method of a trainer.{did_you_mean(name, hooks())}")

    def trained_module(self) -> nn.Module | None:
        """Return a module that the student's optimiser trains in addition to the student."""
        return None


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
        # Ultralytics' constructor resolves arguments, creates the run's folder and reads the data set.
        self.through("init", partial(super().__init__, cfg, overrides, _callbacks))()

    def through(self, hook: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a call in the method `hook` of every component that has one."""
        for component in reversed(self.components):
            if (wrap := getattr(component, hook, None)) is not None:
                call = partial(wrap, call)
        return call

    @property
    def alone(self) -> bool:
        """Whether the student trains without a teacher; the command that resumes the run depends on it."""
        return True

    def get_dataset(self) -> dict[str, Any]:
        """Return the data set's dictionary."""
        return self.through("get_dataset", super().get_dataset)()

    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> Any:
        """Return the student, built from its YAML and loaded with weights."""
        return self.through("get_model", super().get_model)(cfg, weights, verbose)

    def set_model_attributes(self) -> None:
        """Prepare the student, which has just moved to its device."""
        self.through("set_model_attributes", super().set_model_attributes)()

    def build_dataset(self, img_path: Any, mode: str = "train", batch: int | None = None) -> Any:
        """Return the data set of one split."""
        return self.through("build_dataset", super().build_dataset)(img_path, mode, batch)

    def get_dataloader(self, dataset_path: Any, batch_size: int = 16, rank: int = 0, mode: str = "train") -> Any:
        """Return the loader of one split."""
        return self.through("get_dataloader", super().get_dataloader)(dataset_path, batch_size, rank, mode)

    def auto_batch(self) -> int:
        """Return the batch size that fits into memory."""
        return self.through("auto_batch", super().auto_batch)()

    def build_optimizer(self, model: Any, *args: Any, **keys: Any) -> torch.optim.Optimizer:
        """Return the optimiser; the components' state travels in its state dict."""
        modules = [m for component in self.components if (m := component.trained_module()) is not None]
        scope = OptimizerScope(unwrap_model(model), *modules) if modules else model
        optimizer = self.through("build_optimizer", partial(super().build_optimizer, scope, *args, **keys))()
        carry_state(optimizer, self.components)
        return optimizer

    def _build_train_pipeline(self) -> None:
        # Build loaders and optimiser; Ultralytics does it again with half the batch when memory runs out.
        self.through("build_train_pipeline", super()._build_train_pipeline)()

    def _setup_train(self) -> None:
        # Set up everything before the first epoch.
        self.through("setup_train", super()._setup_train)()

    def resume_training(self, ckpt: dict | None) -> None:
        """Continue from a checkpoint; it is None for a new run."""
        self.through("resume_training", super().resume_training)(ckpt)

    def _load_checkpoint_state(self, ckpt: dict) -> None:
        # Restore the state of a training, on resume or in the recovery from NaN.
        self.through("load_checkpoint_state", super()._load_checkpoint_state)(ckpt)

    def restore(self, checkpoint: dict) -> None:
        """Restore the state of a training from a checkpoint."""
        self._load_checkpoint_state(checkpoint)

    def train(self) -> Any:
        """Run the training, or launch its processes."""
        return self.through("train", super().train)()

    def _do_train(self) -> None:
        # Run the training in this process.
        self.through("do_train", super()._do_train)()

    def run_callbacks(self, event: str) -> None:
        """Run the callbacks of an event of Ultralytics, such as `on_train_epoch_start`."""
        self.through("run_callbacks", super().run_callbacks)(event)

    def preprocess_batch(self, batch: dict) -> dict:
        """Return a batch as the student gets it: on the device, after multi-scale."""
        return self.through("preprocess_batch", super().preprocess_batch)(batch)

    def optimizer_step(self) -> None:
        """Step the optimiser."""
        self.through("optimizer_step", super().optimizer_step)()

    def validate(self) -> Any:
        """Return metrics and fitness of the EMA."""
        return self.through("validate", super().validate)()

    def _handle_nan_recovery(self, epoch: int) -> bool:
        # End an epoch, and return whether it must be repeated from the last checkpoint.
        return self.through("handle_nan_recovery", super()._handle_nan_recovery)(epoch)

    def get_validator(self) -> Any:
        """Return the validator."""
        return self.through("get_validator", super().get_validator)()

    def label_loss_items(self, loss_items: Any = None, prefix: str = "train") -> Any:
        """Return the logged losses by column, or the columns where there are no losses."""
        return self.through("label_loss_items", super().label_loss_items)(loss_items, prefix)

    def save_model(self) -> bool:
        """Write the checkpoints of an epoch."""
        return self.through("save_model", super().save_model)()

    def save_metrics(self, metrics: dict) -> None:
        """Append a row to `results.csv`."""
        self.through("save_metrics", super().save_metrics)(metrics)

    def final_eval(self) -> None:
        """Strip and evaluate the finished checkpoints."""
        self.through("final_eval", super().final_eval)()

    def finish_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Change a checkpoint in place before it is stripped and evaluated."""
        self.through("finish_checkpoint", lambda _: None)(checkpoint)

    def provenance(self) -> dict[str, Any]:
        """Return plain entries for the finished checkpoints."""
        return self.through("provenance", dict)()


def hooks() -> set[str]:
    """Return the names of the methods of a component that wrap a method of the trainer, without its underscores."""
    return {name.strip("_") for name, method in vars(Hosted).items() if callable(method)}


def carry_state(optimizer: torch.optim.Optimizer, components: tuple[Component, ...]) -> None:
    """Include the components' state in the optimiser's state dict, one key for each.

    So every checkpoint that can be resumed contains it, resume and the recovery from NaN restore it, and stripping the
    optimiser removes it from the finished file.
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
