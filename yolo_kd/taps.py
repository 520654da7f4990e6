"""The one file that knows how Ultralytics' models look inside.

It finds the layers that feed the head, turns raw head outputs into views, a batch into targets, and captures the label
assignment of the native loss. Nothing here is hard-coded to a family: layers, widths and strides come from the model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from ultralytics.nn.modules.head import Detect
from ultralytics.utils.ops import xywh2xyxy, xyxy2xywh

from yolo_kd.detections import Detections
from yolo_kd.errors import ConfigError, PairError, did_you_mean, listed
from yolo_kd.views import Assignment, Pair, Targets, View

CLASS_BRANCHES = ("cv3", "one2one_cv3")  # of a head; the second where it is end-to-end
ABSENT = -1e4  # a logit whose loss as background, and whose sigmoid, are exactly zero, also in half precision


def head_of(model: nn.Module) -> Detect:
    """Return the detection head of an Ultralytics detector."""
    return model.model[-1]  # type: ignore[index]


def neck_layers(model: nn.Module) -> tuple[int, ...]:
    """Return the indices of the layers that feed the head, finest level first."""
    return tuple(head_of(model).f)


def layers_before_head(model: nn.Module) -> int:
    """Return how many layers come before the head; as Ultralytics' `freeze`, it leaves only the head to be trained."""
    return len(model.model) - 1  # type: ignore[arg-type]


def strides_of(model: nn.Module) -> tuple[int, ...]:
    """Return the stride of each head level in pixels."""
    return tuple(int(s) for s in head_of(model).stride)


def channels_of(model: nn.Module) -> tuple[int, ...]:
    """Return the width of the features that feed the head, per level."""
    return tuple(
        next(m for m in branch.modules() if isinstance(m, nn.Conv2d)).in_channels for branch in head_of(model).cv2
    )


def bins_of(model: nn.Module) -> int:
    """Return the number of bins of the head's distance distributions, 1 where it has none."""
    return int(head_of(model).reg_max)


def neck_and_head(model: nn.Module) -> list[tuple[int, tuple[int, nn.Module]]]:
    """Return the layers behind the backbone as (distance from the head, (index, layer)), in order."""
    layers: list[nn.Module] = list(model.model)  # type: ignore[arg-type]
    first = len(model.yaml["backbone"])  # type: ignore[index]
    return [(len(layers) - 1 - i, (i, layers[i])) for i in range(first, len(layers))]


def class_rows(model: nn.Module) -> frozenset[str]:
    """Return the names of the tensors in a detector's state dict that have one row for each class."""
    names = {tensor: name for name, tensor in model.named_parameters()}
    branches = [b for a in CLASS_BRANCHES for b in getattr(head_of(model), a, None) or ()]
    return frozenset(names[parameter] for branch in branches for parameter in branch[-1].parameters())


def pair_of(
    student: nn.Module,
    teacher: nn.Module,
    student_taps: Mapping[str, nn.Module] | None = None,
    teacher_taps: Mapping[str, nn.Module] | None = None,
    nc: int | None = None,
) -> Pair:
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
    return Pair(
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
    if not taps:
        return {}
    parameter = next(model.parameters())
    size = 2 * max(strides_of(model))
    images = parameter.new_zeros(1, model.yaml.get("channels", 3), size, size)  # type: ignore[union-attr, operator]
    training = {module: module.training for module in model.modules()}
    tap = LayerTap(taps)
    try:
        model.eval()
        with torch.no_grad():
            model(images)
        found = tap.take()
    finally:
        tap.remove()
        for module, mode in training.items():
            module.training = mode
    return {name: (map_.shape[1], size // map_.shape[-1]) for name, map_ in found.items()}


def find_layers(model: nn.Module, names: Sequence[str], role: str) -> dict[str, nn.Module]:
    """Return layers by the names that a recipe gives them: `model.9`, or anything deeper such as `model.9.cv2`.

    Args:
        model: The detector.
        names: Layer names.
        role: teacher or student, for messages.

    Raises:
        ConfigError: If there is no such layer, with the closest match.
    """
    layers = {}
    known = dict(model.named_modules())
    for name in names:
        if name not in known or not name:
            top = [k for k in known if k.startswith("model.") and k.count(".") == 1]
            raise ConfigError(
                f"the {role} has no layer '{name}'.{did_you_mean(name, known)} Its layers are {top[0]} to {top[-1]} "
                "and everything inside them."
            )
        layers[name] = known[name]
    return layers


def head_split_points(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules in the head whose outputs enter the activation of each branch's second convolution.

    They are the normalisation layers, or in a fused model the convolutions themselves, named `cls0`, `box0`, `cls1`...
    """
    head = head_of(model)
    points = {}
    for i, (box, cls) in enumerate(zip(head.cv2, head.cv3, strict=True)):
        for name, branch in (("cls", cls), ("box", box)):
            block = _last_convolution(branch[-2])
            fused = not hasattr(block, "bn")
            points[f"{name}{i}"] = block.conv if fused else block.bn
    return points


def head_tails(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """Return the end of each level's class and box branch: the activation and what follows the second convolution."""
    head = head_of(model)
    tails: list[tuple[nn.Module, nn.Module]] = []
    for box, cls in zip(head.cv2, head.cv3, strict=True):
        pair = []
        for branch in (cls, box):
            activation = deepcopy(_last_convolution(branch[-2]).act)
            if hasattr(activation, "inplace"):
                activation.inplace = False  # its input is a leaf of the student's graph here
            pair.append(nn.Sequential(activation, branch[-1]).eval().requires_grad_(False))
        tails.append((pair[0], pair[1]))
    return tails


def _last_convolution(block: nn.Module) -> Any:
    """Return the last convolution block (convolution, normalisation, activation) of a branch's part."""
    return [m for m in block.modules() if hasattr(m, "conv") and hasattr(m, "act")][-1]


class LayerTap:
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


def view_of(predictions: Any, model: nn.Module, layers: Mapping[str, Tensor] | None = None) -> View:
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
    return View(
        features=tuple(main["feats"]),
        scores=main["scores"].transpose(1, 2),
        boxes=main["boxes"].transpose(1, 2),
        strides=strides_of(model),
        reg_max=bins_of(model),
        one2one_scores=None if one2one is None else one2one["scores"].transpose(1, 2),
        layers=layers or {},
    )


class TeacherTap:
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
        self._others = LayerTap(others or {})
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

    def __call__(self, images: Tensor) -> View:
        """Run the teacher on (B, C, H, W) images in [0, 1] and return its view; what nothing reads has no points."""
        self.forward(images)
        features = tuple(self._captured[i] for i in self._layers)
        raw, self._raw = self._raw, {}
        self._captured.clear()
        main = {**raw.get("one2many", raw), "feats": features}
        return view_of({"one2many": main, "one2one": raw.get("one2one")}, self.model, self._others.take())

    def remove(self) -> None:
        """Take the hooks off; the model is plain again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._others.remove()
        self._head.training = False
        self._head.__dict__.pop("forward", None)


class AssignmentTap:
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


def targets_of(batch: Mapping[str, Any], assignment: Assignment | None = None) -> Targets:
    """Turn a batch of Ultralytics' loader into targets: normalised xywh boxes become pixels, xyxy."""
    size = batch["img"].shape[-2:]
    boxes = batch["bboxes"].view(-1, 4).float()
    scale = boxes.new_tensor([size[1], size[0], size[1], size[0]])
    return Targets(
        boxes=xywh2xyxy(boxes) * scale,
        labels=batch["cls"].view(-1).long(),
        image_index=batch["batch_idx"].view(-1).long(),
        image_size=(int(size[0]), int(size[1])),
        batch_size=int(batch["img"].shape[0]),
        assignment=assignment,
    )


def labels_of(detections: Detections, image_size: Sequence[int]) -> dict[str, Tensor]:
    """Turn detections into the entries of a batch that hold labels, the inverse of what `targets_of` does.

    Args:
        detections: Boxes in pixels; what is beyond the image's border is cut off.
        image_size: Height and width of the images in pixels.
    """
    height, width = image_size
    size = detections.boxes.new_tensor([width, height, width, height])
    boxes = torch.minimum(detections.boxes.clamp(min=0), size)
    return {
        "bboxes": xyxy2xywh(boxes) / size,
        "cls": detections.labels[:, None].float(),
        "batch_idx": detections.image_index.float(),
    }


def part_of(predictions: Any, images: slice) -> Any:
    """Return raw training outputs of some of the images of a batch; they are slices, not copies."""
    if isinstance(predictions, Mapping):
        return {name: part_of(value, images) for name, value in predictions.items()}
    if isinstance(predictions, list | tuple):
        return [part_of(value, images) for value in predictions]
    return predictions[images] if isinstance(predictions, Tensor) else predictions


def cut(predictions: Any, images: int) -> tuple[Any, Any]:
    """Return raw training outputs of the first images of a batch, and of the others.

    Where both are used, going back is one pass; slices would each fill a whole batch with zeros.
    """
    if isinstance(predictions, Mapping):
        pairs = {name: cut(value, images) for name, value in predictions.items()}
        return {k: first for k, (first, _) in pairs.items()}, {k: second for k, (_, second) in pairs.items()}
    if isinstance(predictions, list | tuple):
        both = [cut(value, images) for value in predictions]
        return [first for first, _ in both], [second for _, second in both]
    if isinstance(predictions, Tensor):
        return predictions.split([images, len(predictions) - images])
    return predictions, predictions


def branches_of(native: Any) -> list[Any]:
    """Return the parts of a native loss that assign labels: one, or for an end-to-end head two."""
    return [native.one2many, native.one2one] if hasattr(native, "one2many") else [native]


def loss_names_of(native: Any) -> tuple[str, ...]:
    """Return the names of the items that a native loss logs."""
    return tuple(branches_of(native)[-1].loss_names)


def without_classes(predictions: Any, mask: Tensor) -> Any:
    """Return raw training outputs whose score for some classes at some points takes no part in the task loss.

    There a logit is replaced by `ABSENT`. As a negative it costs nothing, log(1 + e^-10000) = 0, it gets no gradient,
    and its alignment with any object, p^alpha * IoU^beta, is 0.

    Args:
        predictions: What the head returned: raw outputs, or those of each branch, or in eval mode a tuple that holds
            one of these.
        mask: True where a score is to be left out, (B, nc, A).
    """
    if isinstance(predictions, tuple):
        return (*predictions[:1], without_classes(predictions[1], mask), *predictions[2:])
    if "scores" in predictions:
        return {**predictions, "scores": predictions["scores"].masked_fill(mask, ABSENT)}
    return {name: without_classes(branch, mask) for name, branch in predictions.items()}


@contextmanager
def weighted_by(native: Any, confidence: Tensor) -> Iterator[None]:
    """Weight the native loss's objects by how sure their labels are, for the duration.

    The assigner gives point a the target score t_a for the object that it made a responsible for; with that object's
    confidence c_a it becomes c_a * t_a, both as the target of the class loss and as the weight of the box losses. The
    native loss divides by N' = max(1, sum of c_a * t_a). It is multiplied by N' / N with N = max(1, sum of t_a), so
    that the weights do not cancel where all labels are unsure alike. Each branch of an end-to-end head has its own N.

    Args:
        native: The loss.
        confidence: Confidence of each object, (B, N), in the order in which an image's labels come.
    """
    with ExitStack() as stack:
        for branch in branches_of(native):
            stack.enter_context(_weighted(branch, confidence))
        yield


@contextmanager
def _weighted(branch: Any, confidence: Tensor) -> Iterator[None]:
    ratio = confidence.new_ones(())

    def weigh(_module: nn.Module, _inputs: Any, output: Sequence[Tensor]) -> Sequence[Tensor]:
        nonlocal ratio
        if not confidence.shape[1]:
            return output
        labels, boxes, scores, foreground, index = output
        sure = confidence.gather(1, index.long().clamp(max=confidence.shape[1] - 1))
        weighted = scores * sure[..., None].to(scores.dtype)
        ratio = weighted.sum().clamp(min=1) / scores.sum().clamp(min=1)
        return labels, boxes, weighted, foreground, index

    unweighted = branch.loss

    def loss(predictions: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        vector, items = unweighted(predictions, batch)
        return vector * ratio, {name: value * ratio for name, value in items.items()}

    handle = branch.assigner.register_forward_hook(weigh)
    branch.loss = loss
    try:
        yield
    finally:
        handle.remove()
        del branch.loss  # the class's own again


class OptimizerScope(nn.Module):
    """Student and distillation modules under the names by which Ultralytics' optimiser builder looks for them.

    Passing this in place of the student puts adapters into the same parameter groups that upstream's own projector
    gets, so that they are trained alike. It exists only for that one call.
    """

    def __init__(self, student: nn.Module, distiller: nn.Module):
        super().__init__()
        self.student_model = student
        self.projector = distiller


def fuse_keeping_branches(model: nn.Module) -> nn.Module:
    """Fuse convolutions with their normalisation, keeping both branches of an end-to-end head.

    Ultralytics' own fusion deletes the branch that inference will not use.
    """
    head = head_of(model)
    head.fuse = lambda *_args, **_kwargs: None
    try:
        return model.fuse(verbose=False)  # type: ignore[operator]
    finally:
        del head.fuse
