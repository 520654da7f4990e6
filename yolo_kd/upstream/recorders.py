"""Taps: hooks on student, teacher and assigner, and the views that they yield."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from ultralytics.nn.modules.head import Detect

from yolo_kd.errors import ConfigError
from yolo_kd.structures import Assignment, DetectorOutputs
from yolo_kd.upstream.heads import (
    bins_of,
    head_of,
    neck_layers,
    strides_of,
)


class LayerRecorder:
    """Forward hooks that keep the outputs of layers until they are taken.

    The model goes on with a copy, since an activation may overwrite its input in place. What is kept so lies on the way
    of the model's own loss, whose gradient can be compared there.

    Args:
        layers: Layers by the name under which their outputs are handed out.
    """

    def __init__(self, layers: Mapping[str, nn.Module]):
        self._captured: dict[str, Tensor] = {}
        self._handles = [layer.register_forward_hook(self._keep(name)) for name, layer in layers.items()]
        self._names = tuple(layers)

    def _keep(self, name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> Tensor:
            if not isinstance(output, Tensor) or output.ndim != 4:
                raise ConfigError(f"layer '{name}' does not yield one feature map, so it cannot be distilled.")
            self._captured[name] = output
            return output.clone()

        return hook

    def take(self) -> dict[str, Tensor]:
        """Return what the last forward pass left, (B, C, H, W) by name, and forget it."""
        captured = {name: self._captured[name] for name in self._names if name in self._captured}
        self._captured.clear()
        return captured

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._captured.clear()


def probe_size(model: nn.Module) -> int:
    """Return the side in pixels of the blank image that `layer_outputs` shows a model."""
    return 2 * max(strides_of(model))


@torch.no_grad()
def layer_outputs(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return what layers make of a blank image, (1, C, H, W) by name; the model is left as it was.

    Raises:
        ConfigError: If a layer does not yield one map.
    """
    if not layers:
        return {}
    size = probe_size(model)
    images = next(model.parameters()).new_zeros(1, model.yaml.get("channels", 3), size, size)  # type: ignore[union-attr, operator]
    training = {module: module.training for module in model.modules()}
    tap = LayerRecorder(layers)
    try:
        model.eval()
        model(images)
        return tap.take()
    finally:
        tap.remove()
        for module, mode in training.items():
            module.training = mode


def outputs_of(predictions: Any, model: nn.Module, layers: Mapping[str, Tensor] | None = None) -> DetectorOutputs:
    """Turn a detector's raw training outputs into a view.

    Of the two branches of an end-to-end head the one-to-many branch is taken: the other gets detached features and
    would train nothing but itself.

    Args:
        predictions: What the head returned: a dictionary, or in eval mode a tuple that ends in one.
        model: The detector that made them.
        layers: Outputs of other layers, by name.
    """
    raw = predictions[1] if isinstance(predictions, tuple) else predictions
    one2one = raw.get("one2one")
    main = raw.get("one2many", raw)
    return DetectorOutputs(
        features=tuple(main["feats"]),
        scores=main["scores"].transpose(1, 2),
        boxes=main["boxes"].transpose(1, 2),
        strides=strides_of(model),
        reg_max=bins_of(model),
        one2one_scores=None if one2one is None else one2one["scores"].transpose(1, 2),
        layers=layers or {},
    )


class TeacherRecorder:
    """Forward hooks on a frozen teacher: on the layers that feed its head, and on the head.

    The head computes what is read and nothing else: raw outputs, so that no box is decoded only to be thrown away, and
    only the branches that some term asks for. The student needs no hook, as its head hands out the features it was
    given.

    Args:
        model: The teacher, in eval mode.
        others: Other layers that the recipe reads, by name.
        reads: What the terms read of the teacher: scores, boxes, one2one. Layers inside the head need both branches.
    """

    def __init__(
        self,
        model: nn.Module,
        others: Mapping[str, nn.Module] | None = None,
        reads: Collection[str] = ("scores", "boxes", "one2one"),
    ):
        self.model = model
        self.forward: Callable[[Tensor], Any] = model
        self._others = LayerRecorder(others or {})
        self._head = head_of(model)
        inside = {id(module) for module in self._head.modules()}
        whole = any(id(module) in inside for module in (others or {}).values())
        self._reads = {*reads, "scores", "boxes"} if whole else {*reads}
        if type(self._head).forward is Detect.forward:
            self._head.forward = self._read_head
        else:
            self._head.training = True  # this module alone, not its children: raw outputs instead of decoded boxes
        self._captured: dict[int, Tensor] = {}
        self._raw: dict[str, Any] = {}
        self._handles: list[RemovableHandle] = []
        self._layers = neck_layers(model)
        for index in self._layers:
            layer: nn.Module = model.model[index]  # type: ignore[index, assignment]
            self._handles.append(layer.register_forward_hook(self._keep(index)))
        self._handles.append(self._head.register_forward_hook(self._keep_raw))

    def _read_head(self, features: list[Tensor]) -> dict[str, Any]:
        """Stand in for the head's own forward pass."""

        def points(branches: nn.ModuleList, read: str) -> Tensor:
            if read not in self._reads:
                return features[0].new_empty(len(features[0]), 0, 0)
            return torch.cat([b(f).flatten(2) for b, f in zip(branches, features, strict=True)], -1)

        head = self._head
        raw: dict[str, Any] = {"boxes": points(head.cv2, "boxes"), "scores": points(head.cv3, "scores")}
        if "one2one" in self._reads and getattr(head, "one2one_cv3", None) is not None:
            return {"one2many": raw, "one2one": {"scores": points(head.one2one_cv3, "one2one")}}
        return raw

    def _keep(self, index: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            self._captured[index] = output

        return hook

    def _keep_raw(self, _module: nn.Module, _inputs: Any, output: dict[str, Any]) -> None:
        self._raw = output

    def __call__(self, images: Tensor) -> DetectorOutputs:
        """Run the teacher on (B, C, H, W) images in [0, 1] and return its view; what nothing reads has no points."""
        self.forward(images)
        features = tuple(self._captured[i] for i in self._layers)
        raw, self._raw = self._raw, {}
        self._captured.clear()
        main = {**raw.get("one2many", raw), "feats": features}
        return outputs_of({"one2many": main, "one2one": raw.get("one2one")}, self.model, self._others.take())

    def remove(self) -> None:
        """Take the hooks off; the model is plain again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._others.remove()
        self._head.training = False
        self._head.__dict__.pop("forward", None)


class AssignmentRecorder:
    """Captures the answer of the native loss's task-aligned assigner, so that no term computes it again.

    Args:
        criterion: The student's native loss; for end-to-end heads its one-to-many part is tapped.
    """

    def __init__(self, criterion: Any):
        assigner = getattr(criterion, "one2many", criterion).assigner
        self._answer: Sequence[Tensor] | None = None
        self._handle = assigner.register_forward_hook(self._keep)

    def _keep(self, _module: nn.Module, _inputs: Any, output: Sequence[Tensor]) -> None:
        self._answer = output

    def take(self) -> Assignment | None:
        """Return the assignment of the batch that just passed, and forget it."""
        answer, self._answer = self._answer, None
        if answer is None:
            return None
        _labels, boxes, scores, foreground, _index = answer
        return Assignment(foreground.bool(), scores.detach(), boxes.detach())

    def remove(self) -> None:
        """Take the hook off."""
        self._handle.remove()
