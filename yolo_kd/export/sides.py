"""The two sides of a comparison: the exported ONNX file and the PyTorch model of its checkpoint."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn
from ultralytics.engine.exporter import NMSModel

from yolo_kd.errors import ParityError

RAW, ONE2ONE, AFTER_NMS = "raw", "one-to-one detections", "detections after NMS"


class OnnxFile:
    """An ONNX file, opened in ONNX Runtime on the CPU.

    Args:
        file: The file.
        channels: Image channels of the model.

    Attributes:
        precision: "fp32", "fp16" or "int8", derived from the nodes and the stored numbers.
        stored: Number of stored numbers.
        shape: Input shape (B, C, H, W); with dynamic axes, the shape at which the model was traced.
        fixed: True if no axis is dynamic.

    Raises:
        ParityError: If ONNX Runtime cannot open the file.
    """

    def __init__(self, file: Path, channels: int):
        import onnx
        import onnxruntime

        graph = onnx.load(str(file), load_external_data=False)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ParityError(f"ONNX Runtime {onnxruntime.__version__} cannot open {file}: {error}") from error
        self._input = self._session.get_inputs()[0]
        self.precision = _precision(graph)
        self.stored = _stored_elements(graph.graph)
        meta = {prop.key: prop.value for prop in graph.metadata_props}
        traced = (int(meta["batch"]), channels, *ast.literal_eval(meta["imgsz"]))
        self.fixed = all(isinstance(size, int) for size in self._input.shape)
        self.shape: tuple[int, ...] = tuple(self._input.shape) if self.fixed else traced

    def run(self, batch: np.ndarray) -> np.ndarray:
        """Return the output for a float32 batch (B, C, H, W) as float32."""
        dtype = np.float16 if self._input.type == "tensor(float16)" else np.float32
        return self._session.run(None, {self._input.name: batch.astype(dtype)})[0].astype(np.float32)


@dataclass(frozen=True)
class Reference:
    """The float32 model of a checkpoint in PyTorch, neither fused nor traced.

    Attributes:
        model: Returns the output that the ONNX file should have.
        output: Kind of the output: `RAW`, `ONE2ONE` or `AFTER_NMS`.
        elements: Parameters and buffers of the fused model, with the anchor grid that a graph stores too.
    """

    model: Callable[[torch.Tensor], torch.Tensor]
    output: str
    elements: int

    def run(self, batch: np.ndarray) -> np.ndarray:
        """Return the output for a float32 batch (B, C, H, W)."""
        with torch.no_grad():
            return self.model(torch.from_numpy(batch)).numpy()


def reference_of(original: nn.Module, args: SimpleNamespace, size: tuple[int, ...]) -> Reference:
    """Configure a copy of a model as the exporter does.

    Args:
        original: The checkpoint's model, float32, in eval mode.
        args: The export arguments.
        size: Height and width of the images in pixels.
    """
    model: Any = deepcopy(original)
    head = model.model[-1]
    model.task = "detect"
    model.end2end = args.nms is False  # stays False if the head has no second branch
    nms = bool(args.nms) and not model.end2end
    height, width = size
    strides = head.stride.tolist()
    head.max_det = min(args.max_det, sum(int(height / s) * int(width / s) for s in strides))
    head.agnostic_nms, head.xyxy = args.agnostic_nms, nms
    fused = deepcopy(model).fuse(verbose=False)
    tensors = [*fused.parameters(), *(b for b in fused.buffers() if b.is_floating_point())]
    # a graph of fixed size stores x and y of each point twice, and its stride
    elements = sum(t.numel() for t in tensors) + 5 * sum(math.ceil(height / s) * math.ceil(width / s) for s in strides)
    if nms:
        settings = SimpleNamespace(**{**vars(args), "conf": 0.25 if args.conf is None else args.conf})
        # the NMS pads to max_det rows per picture, and such a block of zeros may be stored as a constant
        return Reference(NMSModel(model, settings), AFTER_NMS, elements + 6 * args.max_det * args.batch)
    return Reference(lambda images: model(images)[0], ONE2ONE if model.end2end else RAW, elements)


def _precision(model: Any) -> str:
    """Return "int8", "fp16" or "fp32", from the nodes of an ONNX model and the type of most of its numbers."""
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
