"""The frozen teacher: loaded safely, verified, and asked for one view per batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from yolo_kd.checkpoints import LoadedDetector
from yolo_kd.errors import AuditError
from yolo_kd.taps import TeacherTap, find_layers, fuse_keeping_branches, head_split_points
from yolo_kd.views import View


def fingerprint(model: nn.Module) -> str:
    """Return a hash over every parameter and buffer of a model, bit for bit."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Teacher:
    """A frozen detector in eval mode that yields a view of each batch.

    It is no `nn.Module` and hangs on no model, so that no optimiser, EMA, checkpoint or distributed wrapper ever finds
    it. Convolutions are fused with their normalisation, which changes nothing but the rounding.

    Args:
        detector: The loaded teacher. It is copied, not changed.
        device: Where it runs.
        dtype: Precision of its weights and activations.
        layers: Names of other layers that the recipe reads.
        head_split: Also hand out the features inside the head, as `Loss.head_split` describes.
    """

    def __init__(
        self,
        detector: LoadedDetector,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        layers: Sequence[str] = (),
        head_split: bool = False,
    ):
        model = fuse_keeping_branches(deepcopy(detector.model).eval())
        model = model.to(device=device, dtype=dtype).to(memory_format=torch.channels_last)
        self.model: nn.Module = model.requires_grad_(False)
        self.path = detector.path
        self.sha256 = detector.sha256
        self.dtype = dtype
        others = find_layers(self.model, layers, "teacher") | (head_split_points(self.model) if head_split else {})
        self._tap = TeacherTap(self.model, others)
        self._fingerprint = fingerprint(self.model)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> View:
        """Return the teacher's view of (B, C, H, W) images in [0, 1]."""
        images = images.to(dtype=self.dtype, memory_format=torch.channels_last)
        with torch.autocast(images.device.type, enabled=False):
            return self._tap(images)

    def verify_untouched(self) -> None:
        """Check that the weights are bit for bit those that were loaded, in eval mode and frozen.

        Raises:
            AuditError: If anything trained or replaced them.
        """
        if any(p.requires_grad for p in self.model.parameters()):
            raise AuditError(f"the teacher {self.path} is no longer frozen: some of its parameters require gradients.")
        if any(m.training for m in self.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
            raise AuditError(f"the teacher {self.path} is no longer in eval mode.")
        if fingerprint(self.model) != self._fingerprint:
            raise AuditError(f"the weights of the teacher {self.path} changed during training; they must stay frozen.")

    def close(self) -> None:
        """Take the hooks off."""
        self._tap.remove()
