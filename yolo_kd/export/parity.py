"""The proof that an ONNX file computes what its checkpoint computes.

The file is run in ONNX Runtime on real images and compared with the checkpoint's own fp32 model in PyTorch, neither
fused nor traced, so that fusing and tracing are judged too. The numbers stored in the file are counted against the
student's: a teacher tensor cannot hide.

Which output is compared follows the export key `nms`, as in `ultralytics.engine.exporter`:

* `nms=None`: raw output (B, 4 + nc, A), all points, element by element. Points without an object count as well: their
  boxes are of no use, but the same arithmetic makes them, and a wrong graph may show there first.
* `nms=False` on a head with a one-to-one branch (YOLO26, YOLOv10): detections (B, max_det, 6).
* `nms=True`: detections (B, max_det, 6) after the embedded NMS.

Detections are matched: each one above 0.05 needs a partner of its class on the other side, and one without fails the
gate. Detections so close to a cut-off (`conf`, the last row of `max_det`) that rounding may drop them are not
required. Where a one-to-one head scores nothing above 0.05, its best 20 are matched.

Default tolerances for boxes (pixels, growing in proportion above 640 px) and scores (probability), beside the largest
differences measured with YOLOv8n and YOLOv8s on photographs and on microscope pictures at 640 px:

    fp32                     0.03 px, 2e-4     measured 0.0025 px, 1.3e-5
    fp16, matched detections 3 px, 0.05        measured 0.3 px, 0.0042
    fp16, raw output         30 px, 0.15       measured 8.3 px, 0.014

The margin is about ten, less for boxes of raw fp16 output, where single points without an object swing by pixels.
An INT8 file has no default: what quantisation costs depends on the calibration data, so its differences are reported
and judged only against tolerances that the user gives.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn
from ultralytics.data.augment import LetterBox
from ultralytics.data.utils import IMG_FORMATS
from ultralytics.engine.exporter import NMSModel
from ultralytics.utils import ASSETS, DATASETS_DIR, ROOT
from ultralytics.utils.patches import imread

from yolo_kd.errors import DataError, ParityError, listed
from yolo_kd.safe_loading.checkpoint import LoadedDetector
from yolo_kd.safe_loading.dataset import check_size

# (precision of the file, raw output) -> largest tolerated difference of boxes in pixels and of scores, see above.
TOLERANCES = {
    ("fp32", True): (0.03, 2e-4),
    ("fp32", False): (0.03, 2e-4),
    ("fp16", True): (30.0, 0.15),
    ("fp16", False): (3.0, 0.05),
}


MAX_IMAGES = 8
MAX_SURPLUS = 0.02


DETECTION_FLOOR = 0.05


@dataclass(frozen=True)
class Images:
    """Pictures to compare on, read before anything is exported.

    Attributes:
        source: Where they come from, in words.
        files: Their paths.
        pixels: BGR or single-channel uint8 arrays, (H, W, C).
    """

    source: str
    files: tuple[Path, ...]
    pixels: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Parity:
    """What the comparison of an ONNX file with its checkpoint found.

    Attributes:
        output: "raw", "one-to-one detections" or "detections after NMS".
        precision: "fp32", "fp16" or "int8", read from the file's weights.
        images: Pictures compared, by path.
        images_source: Where they come from, in words.
        input_shapes: Shapes (B, C, H, W) that were run.
        compared: Points compared, or detections of both sides that found a partner.
        unmatched: Detections without a partner; 0 for raw output.
        boxes_max: Largest absolute difference of a box coordinate in pixels.
        boxes_mean: Mean absolute difference of the box coordinates in pixels.
        scores_max: Largest absolute difference of a probability.
        scores_mean: Mean absolute difference of the probabilities.
        tolerance_boxes: Largest difference allowed in pixels, None for "not judged".
        tolerance_scores: Largest difference allowed in probability, None for "not judged".
        initializer_elements: Numbers stored in the ONNX file.
        student_elements: Parameters and buffers of the fused student, with the anchor grid that a graph stores too.
        problems: A sentence per failure.
    """

    output: str
    precision: str
    images: tuple[str, ...]
    images_source: str
    input_shapes: tuple[tuple[int, ...], ...]
    compared: int
    unmatched: int
    boxes_max: float
    boxes_mean: float
    scores_max: float
    scores_mean: float
    tolerance_boxes: float | None
    tolerance_scores: float | None
    initializer_elements: int
    student_elements: int
    problems: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """True if nothing failed."""
        return not self.problems

    @property
    def judged(self) -> bool:
        """True if there was a tolerance to hold the differences against."""
        return self.tolerance_boxes is not None or self.tolerance_scores is not None


def find_images(images: str | Path | None, checkpoint: dict[str, Any]) -> Images:
    """Read up to 8 pictures: those named, else the checkpoint's val split, else the ultralytics package's photographs.

    Raises:
        DataError: If a named source is missing or holds no readable picture.
    """
    if images is not None:
        path = Path(images)
        if not path.exists():
            raise DataError(f"images={images} does not exist. Give a folder, a picture or a data YAML.")
        return _read(f"images={images}", _val_files(path) if path.suffix in (".yaml", ".yml") else _pictures(path))
    data = (checkpoint.get("train_args") or {}).get("data")
    lost = ""
    if isinstance(data, str) and data.endswith((".yaml", ".yml")):
        lost = f" (the val split of {data}, which the checkpoint was trained on, was not found)"
        path = Path(data) if Path(data).exists() else ROOT / "cfg" / "datasets" / data
        with suppress(DataError):
            return _read(f"val split of {data}", _val_files(path))
    return _read(f"photographs of the ultralytics package{lost}", _pictures(ASSETS))


def _read(source: str, files: Iterable[Path]) -> Images:
    chosen = tuple(files)[:MAX_IMAGES]
    if not chosen:
        raise DataError(f"{source} holds no picture to compare on; name a folder with pictures: images=path/to/folder.")
    pixels = [imread(file) for file in chosen]
    if broken := [str(file) for file, picture in zip(chosen, pixels, strict=True) if picture is None]:
        raise DataError(f"{source}: {listed(broken)} cannot be read as a picture.")
    return Images(source, chosen, tuple(p if p.ndim == 3 else p[..., None] for p in pixels if p is not None))


def _pictures(path: Path) -> list[Path]:
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [file for file in files if file.suffix[1:].lower() in IMG_FORMATS]


def _val_files(data: Path) -> list[Path]:
    """List the pictures of a data YAML's val split without Ultralytics' own check, which may download."""
    check_size(data)
    try:
        content = yaml.safe_load(data.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{data} cannot be read as a data YAML: {error}") from error
    split = (content.get("val") or content.get("validation")) if isinstance(content, dict) else None
    if not split:
        raise DataError(f"{data} names no val split.")
    entries = split if isinstance(split, list) else [split]
    if not all(isinstance(text, str) for text in (content.get("path") or "", *entries)):
        raise DataError(f"{data}: 'path' and 'val' must be text.")
    root = Path(content.get("path") or data.parent)
    roots = (root, DATASETS_DIR / root, data.parent / root)
    files: list[Path] = []
    for entry in entries:
        found = next((base / entry for base in roots if (base / entry).exists()), None)
        if found is not None and found.suffix == ".txt":
            lines = found.read_text(encoding="utf-8").split("\n")
            files += [found.parent / line.strip() for line in lines[:MAX_IMAGES] if line.strip()]
        elif found is not None:
            files += _pictures(found)
    return files


def verify_onnx(
    file: Path,
    detector: LoadedDetector,
    images: Images,
    args: SimpleNamespace,
    *,
    tolerance_boxes: float | None = None,
    tolerance_scores: float | None = None,
) -> Parity:
    """Compare an ONNX file with the checkpoint that it was exported from.

    Args:
        file: The ONNX file.
        detector: The checkpoint's model, float32, in eval mode, on the CPU; left unchanged.
        images: Pictures to run.
        args: The export arguments, see `check_request`.
        tolerance_boxes: Pixels, None for the default of the file's precision.
        tolerance_scores: Probability, None for the default of the file's precision.

    Returns:
        The differences and, under `problems`, everything that failed.

    Raises:
        ParityError: If ONNX Runtime cannot open the file.
    """
    import onnx
    import onnxruntime

    graph = onnx.load(str(file), load_external_data=False)
    precision = _precision(graph)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ParityError(f"ONNX Runtime {onnxruntime.__version__} cannot open {file}: {error}") from error
    entry = session.get_inputs()[0]
    meta = {prop.key: prop.value for prop in graph.metadata_props}
    model: Any = detector.model
    traced = (int(meta["batch"]), model.yaml.get("channels", 3), *ast.literal_eval(meta["imgsz"]))
    fixed = all(isinstance(size, int) for size in entry.shape)
    shape = tuple(entry.shape) if fixed else traced
    reference, output, fused = _reference(model, args, shape[2:])

    scale = max(1.0, max(shape[2:]) / 640)
    boxes, scores = TOLERANCES.get((precision, output == "raw"), (None, None))
    limit_boxes = tolerance_boxes if tolerance_boxes is not None else boxes and boxes * scale
    limit_scores = tolerance_scores if tolerance_scores is not None else scores
    slack = (limit_boxes or 1.0, limit_scores or 0.01)
    # An NMS file drops what scores below `conf`, a one-to-one head drops nothing but what exceeds `max_det`.
    conf = (0.25 if args.conf is None else args.conf) if output == "detections after NMS" else 0.0

    box_gap, score_gap, unmatched, shapes, problems = _Gap(), _Gap(), 0, [], []
    for batch, count in _batches(images, shape, fixed, int(max(model.stride))):
        shapes.append(batch.shape)
        with torch.no_grad():
            wanted = reference(torch.from_numpy(batch)).numpy()[:count]
        try:
            dtype = np.float16 if entry.type == "tensor(float16)" else np.float32
            got = session.run(None, {entry.name: batch.astype(dtype)})[0].astype(np.float32)[:count]
        except Exception as error:
            problems.append(f"ONNX Runtime cannot run it on {batch.shape}: {error}")
            break
        if got.shape != wanted.shape:
            problems.append(f"Its output has the shape {got.shape}, that of PyTorch {wanted.shape} ({output}).")
            break
        if output == "raw":
            box_gap.add(np.abs(got[:, :4] - wanted[:, :4]), points=got.shape[0] * got.shape[2])
            score_gap.add(np.abs(got[:, 4:] - wanted[:, 4:]))
        else:
            for one, other in zip(got, wanted, strict=True):
                unmatched += _match(one, other, conf, slack, box_gap, score_gap)
    stored = _stored_elements(graph.graph)
    problems += _judge(box_gap, score_gap, limit_boxes, limit_scores, unmatched, output, stored, fused)
    return Parity(
        output=output,
        precision=precision,
        images=tuple(str(path) for path in images.files),
        images_source=images.source,
        input_shapes=tuple(dict.fromkeys(shapes)),
        compared=box_gap.points,
        unmatched=unmatched,
        boxes_max=box_gap.largest,
        boxes_mean=box_gap.mean,
        scores_max=score_gap.largest,
        scores_mean=score_gap.mean,
        tolerance_boxes=limit_boxes,
        tolerance_scores=limit_scores,
        initializer_elements=stored,
        student_elements=fused,
        problems=tuple(problems),
    )


class _Gap:
    """Running maximum and mean of absolute differences; a NaN stays."""

    def __init__(self) -> None:
        self.largest, self.total, self.count, self.points = 0.0, 0.0, 0, 0

    @property
    def mean(self) -> float:
        return self.total / max(self.count, 1)

    def add(self, values: np.ndarray, points: int = 1) -> None:
        self.largest = float(np.maximum(self.largest, values.max()))
        self.total += float(values.sum(dtype=np.float64))
        self.count += values.size
        self.points += points


def _reference(original: nn.Module, args: SimpleNamespace, size: Iterable[int]) -> tuple[Callable, str, int]:
    """Return the PyTorch side of the comparison, the kind of its output, and the elements of the fused student."""
    model: Any = deepcopy(original)
    head = model.model[-1]
    model.task = "detect"
    model.end2end = args.nms is False  # as the exporter does; False again where the head has no second branch
    nms = bool(args.nms) and not model.end2end
    height, width = size
    strides = head.stride.tolist()
    head.max_det = min(args.max_det, sum(int(height / s) * int(width / s) for s in strides))
    head.agnostic_nms, head.xyxy = args.agnostic_nms, nms
    fused = deepcopy(model).fuse(verbose=False)
    tensors = [*fused.parameters(), *(b for b in fused.buffers() if b.is_floating_point())]
    # A graph of fixed size stores x and y of each point twice, and its stride.
    elements = sum(t.numel() for t in tensors) + 5 * sum(math.ceil(height / s) * math.ceil(width / s) for s in strides)
    if nms:
        settings = SimpleNamespace(**{**vars(args), "conf": 0.25 if args.conf is None else args.conf})
        # It pads to max_det rows per picture, and such a block of zeros may be stored as a constant.
        return NMSModel(model, settings), "detections after NMS", elements + 6 * args.max_det * args.batch
    return lambda x: model(x)[0], "one-to-one detections" if model.end2end else "raw", elements


def _batches(images: Images, shape: tuple[int, ...], fixed: bool, stride: int) -> Iterator[tuple[np.ndarray, int]]:
    """Yield input batches (B, C, H, W), RGB in [0, 1], float32, with the number of pictures that are not filling.

    A file of fixed shape gets full batches; one with dynamic axes gets what there is, and all of it at a second,
    wider size, because an axis that was frozen by mistake works at the size of the tracing only.
    """
    batch, channels, height, width = shape
    for wide in (0,) if fixed else (0, stride):
        letterbox = LetterBox((height, width + wide), auto=False)
        rows = []
        for picture in images.pixels:
            boxed = letterbox(image=picture)
            boxed = (boxed if boxed.ndim == 3 else boxed[..., None])[..., ::-1]
            # For other than three channels any real content will do, as long as both sides see the same.
            boxed = boxed[..., np.arange(channels) % boxed.shape[-1]]
            rows.append(boxed.transpose(2, 0, 1).astype(np.float32) / 255)
        for start in range(0, len(rows), batch):
            chunk = rows[start : start + batch]
            filling = [chunk[-1]] * (batch - len(chunk)) if fixed else []
            yield np.ascontiguousarray(np.stack(chunk + filling)), len(chunk)


def _match(
    got: np.ndarray, wanted: np.ndarray, conf: float, slack: tuple[float, float], boxes: _Gap, scores: _Gap
) -> int:
    """Match the detections (N, 6: xyxy in pixels, score, class) of one picture both ways; return how many are alone.

    Args:
        got: Detections of the file.
        wanted: Detections of PyTorch.
        conf: Confidence below which an embedded NMS drops detections, 0 without NMS.
        slack: Pixels and probability that weigh alike in the search for the nearest partner.
        boxes: Collects the box differences.
        scores: Collects the score differences.
    """
    # The last row is above zero only where `max_det` cut detections off.
    floor = max(DETECTION_FLOOR, max(conf, float(wanted[:, 4].min())) + slack[1])
    if not conf:
        floor = min(floor, float(np.sort(wanted[:, 4])[::-1][min(20, len(wanted) // 2)]))
    alone = 0
    for ones, others in ((wanted, got), (got, wanted)):
        for one in ones[~(ones[:, 4] < floor)]:  # a NaN must not slip through
            same = others[(others[:, 5] == one[5]) & (others[:, 4] > 0)]
            if not len(same):
                alone += 1
                continue
            box, score = np.abs(same[:, :4] - one[:4]), np.abs(same[:, 4] - one[4])
            nearest = int(np.maximum(box.max(1) / slack[0], score / slack[1]).argmin())
            boxes.add(box[nearest])
            scores.add(score[nearest : nearest + 1])
    return alone


def _judge(
    boxes: _Gap,
    scores: _Gap,
    limit_boxes: float | None,
    limit_scores: float | None,
    unmatched: int,
    output: str,
    stored: int,
    student: int,
) -> list[str]:
    """Return a sentence per failure."""
    problems = []
    for name, unit, gap, limit in (("boxes", " px", boxes, limit_boxes), ("scores", "", scores, limit_scores)):
        if not math.isfinite(gap.largest):
            problems.append(f"The {name} are not finite on at least one side.")
        elif limit is not None and gap.largest > limit:
            problems.append(f"The {name} differ by up to {gap.largest:.3g}{unit}, tolerated are {limit:.3g}{unit}.")
    if unmatched:
        problems.append(f"{unmatched} detections have no partner of their class on the other side.")
    if not boxes.points:
        problems.append(f"Nothing was compared ({output}): use images= that show the objects, or a lower conf=.")
    if stored > student * (1 + MAX_SURPLUS):
        problems.append(f"The file stores {stored} numbers, the fused student has {student}: it holds other tensors.")
    return problems


def _precision(model: Any) -> str:
    """Return "int8", "fp16" or "fp32" by the nodes of an ONNX model and the type of most of its numbers."""
    import onnx

    if any(node.op_type in ("DequantizeLinear", "QLinearConv", "ConvInteger") for node in model.graph.node):
        return "int8"
    half = sum(math.prod(t.dims) for t in _tensors(model.graph) if t.data_type == onnx.TensorProto.FLOAT16)
    return "fp16" if 2 * half > _stored_elements(model.graph) else "fp32"


def _stored_elements(graph: Any) -> int:
    return sum(math.prod(tensor.dims) for tensor in _tensors(graph))


def _tensors(graph: Any) -> Iterator[Any]:
    """Yield the initialisers of a graph and its subgraphs, and the floating-point tensors of its Constant nodes."""
    import onnx

    floating = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE)
    yield from graph.initializer
    yield from (sparse.values for sparse in graph.sparse_initializer)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _tensors(attribute.g)
            elif node.op_type == "Constant" and attribute.t.data_type in floating:
                yield attribute.t


def summary(parity: Parity) -> list[str]:
    """Return the lines for the log; the last one is the verdict."""

    def line(name: str, unit: str, largest: float, mean: float, limit: float | None) -> str:
        allowed = "not judged" if limit is None else f"tolerance {limit:.3g}{unit}"
        return f"{name} differ by max {largest:.3g}{unit}, mean {mean:.3g}{unit} ({allowed})"

    boxes = line("boxes", " px", parity.boxes_max, parity.boxes_mean, parity.tolerance_boxes)
    scores = line("scores", "", parity.scores_max, parity.scores_mean, parity.tolerance_scores)
    verdict = (
        "FAILED" if not parity.passed else "passed" if parity.judged else "no teacher tensor; differences not judged"
    )
    return [
        f"ONNX ({parity.precision}) against PyTorch: {parity.compared} {parity.output.replace('raw', 'raw points')} on "
        f"{len(parity.images)} images, {parity.images_source}",
        f"{boxes}; {scores}",
        f"{parity.initializer_elements} numbers in the file, {parity.student_elements} in the student. Gate: {verdict}",
    ]
