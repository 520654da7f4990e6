"""Precision, memory format and threads of a training on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from yolo_kd.config.speed import thread_count
from yolo_kd.engine.component import Component
from yolo_kd.environment import reused_memory
from yolo_kd.upstream.cpu_bf16 import cpu_bf16_autocast, is_cpu_bf16


class Precision(Component):
    """Lets a training on a CPU use all threads, and bfloat16 if requested, which Ultralytics does not support.

    Args:
        trainer: The host.
        threads: A number of threads, or auto.
    """

    def __init__(self, trainer: Any, threads: int | str):
        super().__init__(trainer)
        self.threads = threads

    @property
    def _is_bf16(self) -> bool:
        return is_cpu_bf16(vars(self.trainer.args), self.trainer.device.type)

    def set_model_attributes(self, proceed: Callable[[], None]) -> None:
        """Use channels-last under bfloat16, which is a fifth faster; Ultralytics does so on a GPU."""
        if self._is_bf16 and self.trainer.args.channels_last is None:
            self.trainer.model = self.trainer.model.to(memory_format=torch.channels_last)
        proceed()

    def do_train(self, proceed: Callable[[], None]) -> None:
        """Set threads, memory and autocast for the duration."""
        if self.trainer.device.type != "cpu":
            return proceed()
        before = torch.get_num_threads()
        torch.set_num_threads(thread_count(self.threads))
        try:
            with reused_memory(), cpu_bf16_autocast() if self._is_bf16 else nullcontext():
                return proceed()
        finally:
            torch.set_num_threads(before)
