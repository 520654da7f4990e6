"""Distributed training without the search for unused parameters, where a model has none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from yolo_kd.patches import original, replaced
from yolo_kd.structures import tensors_of


def reaches_every_parameter(model: nn.Module, images: Tensor, frozen: Sequence[str] = ()) -> bool:
    """Return whether the training outputs depend on every trainable parameter.

    Args:
        model: The student. A copy of it runs; the student does not change.
        images: Any images (B, C, H, W), B at least 2.
        frozen: Parameters whose name contains one of these strings are not trained.
    """
    copy = deepcopy(model).train()
    with torch.enable_grad():
        torch.stack([t.float().sum() for t in tensors_of(copy(images)) if t.requires_grad]).sum().backward()
    trained = [p for n, p in copy.named_parameters() if p.requires_grad and not any(text in n for text in frozen)]
    return all(p.grad is not None for p in trained)


@contextmanager
def without_search(allowed: Callable[[nn.Module], bool]) -> Iterator[None]:
    """Let Ultralytics build its wrapper without `find_unused_parameters`, for the duration.

    With it, the wrapper walks the graph in every step.

    Args:
        allowed: Returns for a student whether the wrapper can do without the search.
    """
    wrapper = original(nn.parallel, "DistributedDataParallel")

    class WholeGraph(wrapper):  # type: ignore[misc, valid-type]
        def __init__(self, module: nn.Module, *args: Any, **keys: Any):
            if allowed(module):
                keys["find_unused_parameters"] = False
            super().__init__(module, *args, **keys)

    with replaced(nn.parallel, "DistributedDataParallel", WholeGraph):
        yield
