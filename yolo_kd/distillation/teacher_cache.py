"""Teacher views kept on disk, for trainings in which every image looks the same in every epoch."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from yolo_kd.errors import ConfigError, DataError
from yolo_kd.structures import DetectorOutputs

# Ultralytics' keys that change an image at random unless they are 0
_RANDOM = (
    *("mosaic", "mixup", "cutmix", "copy_paste", "degrees", "translate", "scale", "shear", "perspective"),
    *("flipud", "fliplr", "hsv_h", "hsv_s", "hsv_v", "bgr", "multi_scale"),
)


def check_cacheable(keys: Mapping[str, Any]) -> None:
    """Check that a training shows the teacher the same images in every epoch.

    Args:
        keys: Ultralytics' keys of the training.

    Raises:
        ConfigError: Naming what changes them.
    """
    moving = [f"{key}={keys[key]:g}" for key in _RANDOM if keys.get(key)]
    if keys.get("augmentations") or (keys.get("augmentations") is None and find_spec("albumentations") is not None):
        moving.append("augmentations (albumentations is installed)")
    if moving:
        fix = " ".join(f"{word.partition('=')[0]}=0" for word in moving if "=" in word)
        raise ConfigError(
            f"kd.cache=disk keeps one teacher view of each image, but these keys change images at random: "
            f"{', '.join(moving)}. Switch them off ({fix or 'augmentations=[]'}) or leave out kd.cache."
        )


@dataclass(frozen=True)
class _Facts:
    strides: tuple[int, ...]
    reg_max: int
    shape: torch.Size


class ViewCache:
    """One row for each image in memory-mapped float16 files; filled while the first epoch runs.

    Args:
        folder: Where the files are; made here, and removed by `close`.
        images: All images of the training set, as batches name them.

    Raises:
        DataError: From `put`, if the disk has no room for all rows or a value does not fit into float16.
    """

    def __init__(self, folder: Path, images: Sequence[str]):
        self._folder = folder
        self._rows = {name: row for row, name in enumerate(images)}
        self._filled = np.zeros(len(self._rows), bool)
        self._maps: dict[str, np.ndarray] = {}
        self._facts: _Facts | None = None

    def get(self, names: Sequence[str], images: Tensor) -> DetectorOutputs | None:
        """Return the view of a batch, None if it is not complete yet.

        Args:
            names: File of each image.
            images: The batch, (B, C, H, W).
        """
        rows = [self._rows[name] for name in names]
        if self._facts is None or not self._filled[rows].all() or images.shape[1:] != self._facts.shape:
            return None
        tensors = {key: torch.from_numpy(table[rows]).to(images.device) for key, table in self._maps.items()}
        layers = {k.removeprefix("layer "): v for k, v in tensors.items() if k.startswith("layer ")}
        features = tuple(v for k, v in tensors.items() if k.startswith("features "))
        return DetectorOutputs(
            features=features,
            scores=tensors["scores"],
            boxes=tensors["boxes"],
            strides=self._facts.strides,
            reg_max=self._facts.reg_max,
            one2one_scores=tensors.get("one2one"),
            layers=layers,
        )

    def put(self, names: Sequence[str], images: Tensor, view: DetectorOutputs) -> None:
        """Keep the view of a batch."""
        tensors = {f"features {i}": f for i, f in enumerate(view.features)}
        tensors |= {"scores": view.scores, "boxes": view.boxes}
        tensors |= {f"layer {name}": layer for name, layer in view.layers.items()}
        if view.one2one_scores is not None:
            tensors["one2one"] = view.one2one_scores
        if self._facts is None:
            self._make(tensors)
            self._facts = _Facts(view.strides, view.reg_max, images.shape[1:])
        if images.shape[1:] != self._facts.shape:
            return
        rows = [self._rows[name] for name in names]
        for key, tensor in tensors.items():
            half = tensor.detach().to("cpu", torch.float16)
            if not half.isfinite().all():
                raise DataError(
                    f"kd.cache=disk keeps float16, but the teacher's {key} hold values outside its range on "
                    f"{names[0]}. Leave out kd.cache."
                )
            self._maps[key][rows] = half.numpy()
        self._filled[rows] = True

    def _make(self, tensors: Mapping[str, Tensor]) -> None:
        size = 2 * len(self._rows) * sum(t[0].numel() for t in tensors.values())
        self._folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self._folder).free
        if size > free:
            raise DataError(
                f"kd.cache=disk needs {size / 2**30:.1f} GiB in {self._folder} for {len(self._rows)} images, but only "
                f"{free / 2**30:.1f} GiB are free. Free some space, choose another project=, or leave out kd.cache."
            )
        for key, tensor in tensors.items():
            shape = (len(self._rows), *tensor.shape[1:])
            if not tensor.numel():  # what the recipe does not read
                self._maps[key] = np.zeros(shape, np.float16)
                continue
            path = self._folder / f"{key.replace(' ', '_').replace('.', '_')}.npy"
            self._maps[key] = np.lib.format.open_memmap(path, "w+", np.float16, shape)

    def close(self) -> None:
        """Remove the files."""
        self._maps.clear()
        self._filled[:] = False
        self._facts = None
        shutil.rmtree(self._folder, ignore_errors=True)
