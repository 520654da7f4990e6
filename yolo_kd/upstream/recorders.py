"""Recorders: hooks on student, teacher and assigner that keep what the terms read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.nn.modules.head import Detect

from yolo_kd.errors import ConfigError
from yolo_kd.structures import Assignment, DetectorOutputs
from yolo_kd.upstream.heads import bins_of, head_of, strides_of


class LayerRecorder:
    """Keeps the outputs of layers until they are taken.

    The model continues with a copy of each output, because an activation may overwrite its input in place. The
    recorded output still lies in the graph of the task loss, so the gradients of the task loss and of the terms can be
    compared there.

    Args:
        layers: Layers by the name under which `take` returns their outputs.
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
        """Return the outputs of the last forward pass, (B, C, H, W) by name, and forget them."""
        captured = {name: self._captured[name] for name in self._names if name in self._captured}
        self._captured.clear()
        return captured

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._captured.clear()


def probe_size(model: nn.Module) -> int:
    """Return the side in pixels of the blank image that `layer_outputs` runs a model on."""
    return 2 * max(strides_of(model))


@torch.no_grad()
def layer_outputs(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return the outputs of layers on a blank image, (1, C, H, W) by name. The model does not change.

    Raises:
        ConfigError: If a layer does not yield one map.
    """
    if not layers:
        return {}
    size = probe_size(model)
    images = next(model.parameters()).new_zeros(1, model.yaml.get("channels", 3), size, size)  # type: ignore[union-attr, operator]
    training = {module: module.training for module in model.modules()}
    recorder = LayerRecorder(layers)
    try:
        model.eval()
        model(images)
        return recorder.take()
    finally:
        recorder.remove()
        for module, mode in training.items():
            module.training = mode


def outputs_of(predictions: Any, model: nn.Module, layers: Mapping[str, Tensor] | None = None) -> DetectorOutputs:
    """Convert the raw training outputs of a detector.

    An end-to-end head has two branches, of which the one-to-many branch is taken: the other branch gets detached
    features, so a loss on it would train nothing but the branch itself.

    Args:
        predictions: The head's return value: a dictionary, or in eval mode a tuple that ends in one.
        model: The detector.
        layers: Outputs of further layers, by name.
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
    """Runs a frozen teacher with a hook on its head.

    The head computes only what the terms read: raw outputs, without decoding boxes, and only the branches that some
    term reads.

    Args:
        model: The teacher, in eval mode.
        others: Further layers that the recipe reads, by name.
        reads: What the terms read from the teacher: scores, boxes, one2one. Layers inside the head need both branches.
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
            self._head.training = True  # raw outputs without decoding; the modules inside the head stay in eval mode
        self._raw: dict[str, Any] = {}
        self._handle = self._head.register_forward_hook(self._keep)

    def _read_head(self, features: list[Tensor]) -> dict[str, Any]:
        """Compute the branches that are read, in place of the head's forward pass."""

        def points(branches: nn.ModuleList, read: str) -> Tensor:
            if read not in self._reads:
                return features[0].new_empty(len(features[0]), 0, 0)
            return torch.cat([b(f).flatten(2) for b, f in zip(branches, features, strict=True)], -1)

        head = self._head
        raw = {"boxes": points(head.cv2, "boxes"), "scores": points(head.cv3, "scores"), "feats": features}
        if "one2one" in self._reads and getattr(head, "one2one_cv3", None) is not None:
            return {"one2many": raw, "one2one": {"scores": points(head.one2one_cv3, "one2one")}}
        return raw

    def _keep(self, _module: nn.Module, _inputs: Any, output: dict[str, Any]) -> None:
        self._raw = output

    def __call__(self, images: Tensor) -> DetectorOutputs:
        """Run the teacher.

        Args:
            images: (B, C, H, W) in [0, 1].

        Returns:
            The teacher's outputs. Tensors that no term reads have no points.
        """
        self.forward(images)
        raw, self._raw = self._raw, {}
        return outputs_of(raw, self.model, self._others.take())

    def remove(self) -> None:
        """Remove the hooks; the model is plain again."""
        self._handle.remove()
        self._others.remove()
        self._head.training = False
        self._head.__dict__.pop("forward", None)


class AssignmentRecorder:
    """Keeps the result of the task loss's task-aligned assigner, so that no term computes it again.

    The boxes are copied, because a task loss may change them after the assignment: the pose and OBB losses divide them
    by the strides in place. No task loss changes the class targets or the foreground mask, which are not copied.

    Args:
        criterion: The student's task loss. For an end-to-end head, its one-to-many branch is recorded.
    """

    def __init__(self, criterion: Any):
        assigner = getattr(criterion, "one2many", criterion).assigner
        self._assignment: Assignment | None = None
        self._handle = assigner.register_forward_hook(self._keep)

    def _keep(self, _module: nn.Module, _inputs: Any, output: Sequence[Tensor]) -> None:
        _labels, boxes, scores, foreground, _index = output
        self._assignment = Assignment(foreground.bool(), scores.detach(), boxes.detach().clone())

    def take(self) -> Assignment | None:
        """Return the assignment of the last batch and forget it; None if there was no batch since."""
        assignment, self._assignment = self._assignment, None
        return assignment

    def remove(self) -> None:
        """Remove the hook."""
        self._handle.remove()
