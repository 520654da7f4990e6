"""The proof that an ONNX file computes what its checkpoint computes.

The file runs in ONNX Runtime on real pictures and is compared with the float32 PyTorch model of the checkpoint, which
is neither fused nor traced, so that the comparison covers fusing and tracing as well. The numbers stored in the file
are counted and compared with those of the student: a teacher's tensors cannot hide in it.

The compared output depends on the export key `nms`, as in `ultralytics.engine.exporter`:

* `nms=None`: raw output (B, 4 + nc, A), all points, element by element. This includes points without an object, whose
  boxes are useless but result from the same arithmetic, so that a wrong graph may show there first.
* `nms=False` on a head with a one-to-one branch (YOLO26, YOLOv10): detections (B, max_det, 6).
* `nms=True`: detections (B, max_det, 6) after the embedded NMS.

Detections are matched: each one above 0.05 needs a partner of its class on the other side; without one the file fails.
Detections that are so close to a cut-off (`conf`, or the last row of `max_det`) that rounding may drop them are not
required. If a one-to-one head scores nothing above 0.05, its best 20 detections are matched.

Default tolerances for boxes (in pixels, proportionally larger above 640 px) and scores (probabilities), and the largest
differences measured with YOLOv8n and YOLOv8s on photographs and microscope pictures at 640 px:

    fp32                     0.03 px, 2e-4     measured 0.0025 px, 1.3e-5
    fp16, matched detections 3 px, 0.05        measured 0.3 px, 0.0042
    fp16, raw output         30 px, 0.15       measured 8.3 px, 0.014

The margin is about ten, and smaller for boxes of raw fp16 output, where single points without an object vary by pixels.
An INT8 file has no default tolerance, because the cost of quantisation depends on the calibration data: its differences
are reported, and judged only against tolerances that the user gives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from yolo_kd.export.pictures import Images, batches
from yolo_kd.export.sides import AFTER_NMS, RAW, OnnxFile, Reference, reference_of
from yolo_kd.safe_loading.checkpoint import LoadedDetector

# (precision of the file, raw output) -> largest tolerated difference of boxes in pixels and of scores, see above
TOLERANCES = {
    ("fp32", True): (0.03, 2e-4),
    ("fp32", False): (0.03, 2e-4),
    ("fp16", True): (30.0, 0.15),
    ("fp16", False): (3.0, 0.05),
}
MAX_SURPLUS = 0.02  # of the stored numbers over those of the student
DETECTION_FLOOR = 0.05


@dataclass(frozen=True)
class Parity:
    """Result of the comparison of an ONNX file with its checkpoint.

    Attributes:
        output: "raw", "one-to-one detections" or "detections after NMS".
        precision: "fp32", "fp16" or "int8", read from the file's weights.
        images: Pictures compared, by path.
        images_source: A description of their origin.
        input_shapes: Input shapes (B, C, H, W) of the runs.
        compared: Points compared, or detections of both sides that have a partner.
        unmatched: Detections without a partner; 0 for raw output.
        boxes_max: Largest absolute difference of a box coordinate in pixels.
        boxes_mean: Mean absolute difference of the box coordinates in pixels.
        scores_max: Largest absolute difference of a probability.
        scores_mean: Mean absolute difference of the probabilities.
        tolerance_boxes: Largest difference allowed in pixels, None if not judged.
        tolerance_scores: Largest difference allowed in probability, None if not judged.
        initializer_elements: Numbers stored in the ONNX file.
        student_elements: Parameters and buffers of the fused student, with the anchor grid that a graph stores as well.
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
        """True if at least one tolerance applies."""
        return self.tolerance_boxes is not None or self.tolerance_scores is not None


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
        detector: The checkpoint's model, float32, in eval mode, on the CPU. It does not change.
        images: The pictures to compare on.
        args: The export arguments, see `check_request`.
        tolerance_boxes: In pixels, by default that of the file's precision.
        tolerance_scores: As a probability, by default that of the file's precision.

    Returns:
        The differences and, under `problems`, everything that failed.

    Raises:
        ParityError: If ONNX Runtime cannot open the file.
    """
    model: Any = detector.model
    exported = OnnxFile(file, model.yaml.get("channels", 3))
    size = exported.shape[2:]
    reference = reference_of(model, args, size)
    boxes, scores = TOLERANCES.get((exported.precision, reference.output == RAW), (None, None))
    if tolerance_boxes is None and boxes is not None:
        tolerance_boxes = boxes * max(1.0, max(size) / 640)
    comparison = _Comparison(
        reference.output,
        tolerance_boxes,
        scores if tolerance_scores is None else tolerance_scores,
        0.25 if args.conf is None else args.conf,
    )
    comparison.run(exported, reference, images, int(max(model.stride)))
    return Parity(
        output=reference.output,
        precision=exported.precision,
        images=tuple(str(path) for path in images.files),
        images_source=images.source,
        input_shapes=tuple(dict.fromkeys(comparison.shapes)),
        compared=comparison.boxes.points,
        unmatched=comparison.unmatched,
        boxes_max=comparison.boxes.largest,
        boxes_mean=comparison.boxes.mean,
        scores_max=comparison.scores.largest,
        scores_mean=comparison.scores.mean,
        tolerance_boxes=comparison.limit_boxes,
        tolerance_scores=comparison.limit_scores,
        initializer_elements=exported.stored,
        student_elements=reference.elements,
        problems=tuple(comparison.all_problems(exported.stored, reference.elements)),
    )


class _Gap:
    """Running maximum and mean of absolute differences; a NaN persists."""

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


class _Comparison:
    """The differences between both sides, collected over all batches.

    Args:
        output: Kind of the output.
        limit_boxes: Largest tolerated difference of a box coordinate in pixels, None for no judgement.
        limit_scores: Largest tolerated difference of a probability, None for no judgement.
        conf: Confidence below which an embedded NMS drops detections.
    """

    def __init__(self, output: str, limit_boxes: float | None, limit_scores: float | None, conf: float):
        self.output, self.limit_boxes, self.limit_scores = output, limit_boxes, limit_scores
        # a one-to-one head drops no detections, except those beyond `max_det`
        self.conf = conf if output == AFTER_NMS else 0.0
        self.slack = limit_boxes or 1.0, limit_scores or 0.01  # pixels and probability that weigh alike
        self.boxes, self.scores, self.unmatched = _Gap(), _Gap(), 0
        self.shapes: list[tuple[int, ...]] = []
        self.problems: list[str] = []

    def run(self, file: OnnxFile, reference: Reference, images: Images, stride: int) -> None:
        """Compare both sides on all pictures; stop at the first batch that cannot be compared."""
        for batch, count in batches(images, file.shape, file.fixed, stride):
            self.shapes.append(batch.shape)
            wanted = reference.run(batch)[:count]
            try:
                got = file.run(batch)[:count]
            except Exception as error:
                self.problems.append(f"ONNX Runtime cannot run it on {batch.shape}: {error}")
                return
            if got.shape != wanted.shape:
                self.problems.append(
                    f"Its output has the shape {got.shape}, that of PyTorch {wanted.shape} ({self.output})."
                )
                return
            if self.output == RAW:
                self.boxes.add(np.abs(got[:, :4] - wanted[:, :4]), points=got.shape[0] * got.shape[2])
                self.scores.add(np.abs(got[:, 4:] - wanted[:, 4:]))
            else:
                for one, other in zip(got, wanted, strict=True):
                    self.match(one, other)

    def match(self, got: np.ndarray, wanted: np.ndarray) -> None:
        """Match the detections (N, 6: xyxy in pixels, score, class) of one picture in both directions."""
        # the last row is above zero only where `max_det` cut detections off
        floor = max(DETECTION_FLOOR, max(self.conf, float(wanted[:, 4].min())) + self.slack[1])
        if not self.conf:
            floor = min(floor, float(np.sort(wanted[:, 4])[::-1][min(20, len(wanted) // 2)]))
        for ones, others in ((wanted, got), (got, wanted)):
            for one in ones[~(ones[:, 4] < floor)]:  # keeps a NaN
                same = others[(others[:, 5] == one[5]) & (others[:, 4] > 0)]
                if not len(same):
                    self.unmatched += 1
                    continue
                box, score = np.abs(same[:, :4] - one[:4]), np.abs(same[:, 4] - one[4])
                nearest = int(np.maximum(box.max(1) / self.slack[0], score / self.slack[1]).argmin())
                self.boxes.add(box[nearest])
                self.scores.add(score[nearest : nearest + 1])

    def all_problems(self, stored: int, student: int) -> list[str]:
        """Return a sentence per failure, given the numbers stored in the file and in the student."""
        problems = [*self.problems]
        gaps = (("boxes", " px", self.boxes, self.limit_boxes), ("scores", "", self.scores, self.limit_scores))
        for name, unit, gap, limit in gaps:
            if not math.isfinite(gap.largest):
                problems.append(f"The {name} are not finite on at least one side.")
            elif limit is not None and gap.largest > limit:
                problems.append(f"The {name} differ by up to {gap.largest:.3g}{unit}, tolerated are {limit:.3g}{unit}.")
        if self.unmatched:
            problems.append(f"{self.unmatched} detections have no partner of their class on the other side.")
        if not self.boxes.points:
            problems.append(
                f"Nothing was compared ({self.output}): use images= that show the objects, or a lower conf=."
            )
        if stored > student * (1 + MAX_SURPLUS):
            problems.append(
                f"The file stores {stored} numbers, the fused student has {student}: it holds other tensors."
            )
        return problems


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
