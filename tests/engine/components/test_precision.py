"""Precision of a training on a CPU, as a component of its own: threads, bfloat16 and memory format."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from ultralytics.engine import trainer as engine

from yolo_kd.engine.component import Hosted
from yolo_kd.engine.components.precision import Precision


class Trainer:
    """A trainer as far as the component needs one; its training records what the component sets."""

    threads = 0
    precision: Any = None

    def __init__(self, args: Any, overrides: Any = None, _callbacks: Any = None):
        self.args = args
        self.device = torch.device(args.device)
        self.model = nn.Conv2d(3, 8, 3)

    def set_model_attributes(self) -> None:
        pass

    def _do_train(self) -> None:
        self.threads = torch.get_num_threads()
        if self.args.amp == "bf16":
            with engine.autocast(torch.bfloat16, device="cpu"):
                self.precision = self.model(torch.rand(1, 3, 8, 8)).dtype
        if self.args.fails:
            raise RuntimeError("no room")


class Host(Hosted, Trainer):
    pass


def host(threads: int, amp: Any = False, channels_last: bool | None = None, fails: bool = False) -> Any:
    made: Any = Host(SimpleNamespace(amp=amp, channels_last=channels_last, device="cpu", fails=fails))
    made.components = (Precision(made, threads),)
    return made


@pytest.mark.parametrize("fails", [False, True])
def test_threads_are_set_and_restored(fails: bool) -> None:
    before = torch.get_num_threads()
    trainer = host(before + 1, fails=fails)
    if fails:
        with pytest.raises(RuntimeError, match="no room"):
            trainer._do_train()
    else:
        trainer._do_train()
    assert trainer.threads == before + 1
    assert torch.get_num_threads() == before


def test_bfloat16_on_a_cpu_only_during_the_training() -> None:
    before = engine.autocast
    trainer = host(1, amp="bf16")
    trainer._do_train()
    assert trainer.precision == torch.bfloat16
    assert engine.autocast is before


@pytest.mark.parametrize(
    ("amp", "asked", "channels_last"), [("bf16", None, True), ("bf16", False, False), (False, None, False)]
)
def test_channels_last_under_bfloat16_unless_the_user_decides(amp: Any, asked: Any, channels_last: bool) -> None:
    trainer = host(1, amp, asked)
    trainer.set_model_attributes()
    assert trainer.model.weight.is_contiguous(memory_format=torch.channels_last) == channels_last
