"""Training in several processes without the search for parameters that a step left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from yolo_kd.structures import tensors_of


def reaches_every_parameter(model: nn.Module, images: Tensor, frozen: Sequence[str] = ()) -> bool:
    """Return whether the outputs of a training pass depend on every parameter that is to be trained.

    Args:
        model: The student; it is copied, not changed.
        images: (B, C, H, W) of any content, B at least 2.
        frozen: Parts of the names of parameters that will not be trained.
    """
    copy = deepcopy(model).train()
    with torch.enable_grad():
        torch.stack([t.float().sum() for t in tensors_of(copy(images)) if t.requires_grad]).sum().backward()
    trained = [p for n, p in copy.named_parameters() if p.requires_grad and not any(part in n for part in frozen)]
    return all(p.grad is not None for p in trained)


@contextmanager
def without_search(allowed: Callable[[nn.Module], bool]) -> Iterator[None]:
    """Let Ultralytics build its wrapper without `find_unused_parameters`, which walks the graph in every step.

    Args:
        allowed: Tells for a student whether it needs none.
    """
    original = nn.parallel.DistributedDataParallel

    class WholeGraph(original):  # type: ignore[misc, valid-type]
        def __init__(self, module: nn.Module, *args: Any, **keys: Any):
            if allowed(module):
                keys["find_unused_parameters"] = False
            super().__init__(module, *args, **keys)

    nn.parallel.DistributedDataParallel = WholeGraph  # type: ignore[misc]
    try:
        yield
    finally:
        nn.parallel.DistributedDataParallel = original  # type: ignore[misc]
