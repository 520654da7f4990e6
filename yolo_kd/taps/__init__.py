"""The one place that knows how Ultralytics' models look inside.

It finds the layers that feed the head, turns raw head outputs into views, a batch into targets, and captures the label
assignment of the native loss. Nothing here is hard-coded to a family: layers, widths and strides come from the model.
"""

from yolo_kd.taps.hooks import AssignmentTap, LayerTap, TeacherTap, view_of
from yolo_kd.taps.models import (
    CLASS_BRANCHES,
    OptimizerScope,
    bins_of,
    channels_of,
    class_rows,
    family_of,
    find_layers,
    fuse_keeping_branches,
    head_of,
    head_split_points,
    head_tails,
    layers_before_head,
    neck_and_head,
    neck_layers,
    strides_of,
)
from yolo_kd.taps.native import (
    ABSENT,
    branches_of,
    cut,
    labels_of,
    loss_names_of,
    part_of,
    targets_of,
    weighted_by,
    without_classes,
)
from yolo_kd.taps.pairs import check_levels, pair_of
from yolo_kd.taps.thinning import Thinning

__all__ = [
    "ABSENT",
    "CLASS_BRANCHES",
    "AssignmentTap",
    "LayerTap",
    "OptimizerScope",
    "TeacherTap",
    "Thinning",
    "bins_of",
    "branches_of",
    "channels_of",
    "check_levels",
    "class_rows",
    "cut",
    "family_of",
    "find_layers",
    "fuse_keeping_branches",
    "head_of",
    "head_split_points",
    "head_tails",
    "labels_of",
    "layers_before_head",
    "loss_names_of",
    "neck_and_head",
    "neck_layers",
    "pair_of",
    "part_of",
    "strides_of",
    "targets_of",
    "view_of",
    "weighted_by",
    "without_classes",
]
