"""What the losses need to know about a pair of models: common levels, and channels of the features they compare."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from yolo_kd.errors import PairError, listed
from yolo_kd.structures import PairSpec
from yolo_kd.upstream.heads import bins_of, channels_of, head_of, strides_of
from yolo_kd.upstream.recorders import layer_outputs, probe_size


def pair_spec(
    student: nn.Module,
    teacher: nn.Module,
    student_layers: Mapping[str, nn.Module] | None = None,
    teacher_layers: Mapping[str, nn.Module] | None = None,
    nc: int | None = None,
) -> PairSpec:
    """Describe a teacher and a student for the losses.

    Args:
        student: The student.
        teacher: The teacher.
        student_layers: Further layers of the student that the recipe reads, by name.
        teacher_layers: Further layers of the teacher that the recipe reads, by name.
        nc: Number of matched classes. By default both models must have the same number of classes.

    Raises:
        PairError: If the levels of the heads differ, or the class counts without `nc`.
    """
    s_nc, t_nc = head_of(student).nc, head_of(teacher).nc
    if nc is None and s_nc != t_nc:
        raise PairError(
            f"the teacher was trained on {t_nc} classes, the student has {s_nc}, and the classes were not matched."
        )
    check_levels(student, teacher)
    s_strides = strides_of(student)
    s_sizes, t_sizes = _measure(student, student_layers or {}), _measure(teacher, teacher_layers or {})
    return PairSpec(
        channels_of(student),
        channels_of(teacher),
        s_strides,
        s_nc if nc is None else nc,
        bins_of(student),
        bins_of(teacher),
        student_layer_channels={name: c for name, (c, _) in s_sizes.items()},
        teacher_layer_channels={name: c for name, (c, _) in t_sizes.items()},
        student_layer_strides={name: stride for name, (_, stride) in s_sizes.items()},
        teacher_layer_strides={name: stride for name, (_, stride) in t_sizes.items()},
    )


def check_levels(student: nn.Module, teacher: nn.Module) -> None:
    """Check that both heads have the same levels.

    Raises:
        PairError: With the strides of both.
    """
    ours, theirs = strides_of(student), strides_of(teacher)
    if ours != theirs:
        raise PairError(
            f"the student's head has levels of stride {listed(ours)}, the teacher's {listed(theirs)}. "
            "Choose two models with the same levels."
        )


def _measure(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, tuple[int, int]]:
    """Return the number of channels and the stride of layers, measured in one forward pass of a blank image."""
    size = probe_size(model)
    return {name: (map_.shape[1], size // map_.shape[-1]) for name, map_ in layer_outputs(model, layers).items()}
