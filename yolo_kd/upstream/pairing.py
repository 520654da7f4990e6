"""How two models go together: the levels that both have, and the channels of what is compared."""

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
    student_taps: Mapping[str, nn.Module] | None = None,
    teacher_taps: Mapping[str, nn.Module] | None = None,
    nc: int | None = None,
) -> PairSpec:
    """Collect what the losses need to know about a teacher and a student.

    Args:
        student: The student.
        teacher: The teacher.
        student_taps: Other layers of the student that the recipe reads, by name.
        teacher_taps: Other layers of the teacher that the recipe reads, by name.
        nc: Number of matched classes; without one, both must have as many.

    Raises:
        PairError: If head levels differ, or class counts where no classes were matched.
    """
    s_nc, t_nc = head_of(student).nc, head_of(teacher).nc
    if nc is None and s_nc != t_nc:
        raise PairError(
            f"the teacher was trained on {t_nc} classes, the student has {s_nc}, and nobody said which is which."
        )
    check_levels(student, teacher)
    s_strides = strides_of(student)
    s_layers, t_layers = _measure(student, student_taps or {}), _measure(teacher, teacher_taps or {})
    return PairSpec(
        channels_of(student),
        channels_of(teacher),
        s_strides,
        s_nc if nc is None else nc,
        bins_of(student),
        bins_of(teacher),
        student_layer_channels={name: c for name, (c, _) in s_layers.items()},
        teacher_layer_channels={name: c for name, (c, _) in t_layers.items()},
        student_layer_strides={name: stride for name, (_, stride) in s_layers.items()},
        teacher_layer_strides={name: stride for name, (_, stride) in t_layers.items()},
    )


def check_levels(student: nn.Module, teacher: nn.Module) -> None:
    """Check that both heads have the same levels.

    Raises:
        PairError: Naming the strides of both.
    """
    ours, theirs = strides_of(student), strides_of(teacher)
    if ours != theirs:
        raise PairError(
            f"the student's head has levels of stride {listed(ours)}, the teacher's {listed(theirs)}. "
            "Choose two models with the same levels."
        )


def _measure(model: nn.Module, taps: Mapping[str, nn.Module]) -> dict[str, tuple[int, int]]:
    """Return width and stride of layers, seen in one forward pass of a blank image."""
    size = probe_size(model)
    return {name: (map_.shape[1], size // map_.shape[-1]) for name, map_ in layer_outputs(model, taps).items()}
