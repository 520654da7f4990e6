"""Modules that map the student's features to the teacher's number of channels. They are not part of the student."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from yolo_kd.structures import PairSpec


def conv1x1(student: int, teacher: int) -> nn.Module:
    """One 1x1 convolution with bias, also for equal channels, because the feature spaces differ."""
    return nn.Conv2d(student, teacher, 1)


def mlp(student: int, teacher: int) -> nn.Module:
    """1x1 convolution, ReLU, 1x1 convolution: the projector of Ultralytics' distillation."""
    return nn.Sequential(nn.Conv2d(student, teacher, 1), nn.ReLU(inplace=True), nn.Conv2d(teacher, teacher, 1))


ADAPTERS: dict[str, Callable[[int, int], nn.Module]] = {"conv1x1": conv1x1, "mlp": mlp}


def build_adapters(kind: str, pair: PairSpec) -> nn.ModuleList:
    """Return one adapter of that kind for each level of the pair."""
    make = ADAPTERS[kind]
    return nn.ModuleList(make(s, t) for s, t in zip(pair.student_channels, pair.teacher_channels, strict=True))
