"""Modules that bring the student's features to the teacher's width. They are trained, but never part of the student."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from yolo_kd.structures import PairSpec


def conv1x1(student: int, teacher: int) -> nn.Module:
    """One 1x1 convolution with bias, also where widths agree: the two feature spaces differ all the same."""
    return nn.Conv2d(student, teacher, 1)


def mlp(student: int, teacher: int) -> nn.Module:
    """1x1 convolution, ReLU, 1x1 convolution: the projector of Ultralytics' own distillation."""
    return nn.Sequential(nn.Conv2d(student, teacher, 1), nn.ReLU(inplace=True), nn.Conv2d(teacher, teacher, 1))


ADAPTERS: dict[str, Callable[[int, int], nn.Module]] = {"conv1x1": conv1x1, "mlp": mlp}


def build_adapters(kind: str, pair: PairSpec) -> nn.ModuleList:
    """Return one adapter of that kind for each level of the pair."""
    make = ADAPTERS[kind]
    return nn.ModuleList(make(s, t) for s, t in zip(pair.student_channels, pair.teacher_channels, strict=True))
