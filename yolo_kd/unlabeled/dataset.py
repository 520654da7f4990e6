"""A data set of labeled and unlabeled images, and the order in which a training draws them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Sampler
from ultralytics.data.build import InfiniteDataLoader, seed_worker
from ultralytics.data.dataset import YOLODataset
from ultralytics.utils import colorstr
from ultralytics.utils.torch_utils import get_torch_device_backend

from yolo_kd.errors import ConfigError
from yolo_kd.unlabeled.images import UnlabeledImages

UNLABELED_MARK = "unlabeled"  # key of a batch: for each image, True if it is unlabeled


class UnlabeledDataset(YOLODataset):
    """Ultralytics' data set for unlabeled images: it reads no label files and writes no label cache.

    Args:
        images: The images.
        **keys: Arguments of `YOLODataset`, without `img_path`.
    """

    def __init__(self, images: UnlabeledImages, **keys: Any):
        self._images = images
        super().__init__(img_path="", **keys)

    def get_img_files(self, img_path: Any) -> list[str]:
        """Return the paths of the images."""
        return list(self._images.files)

    def get_labels(self) -> list[dict]:
        """Return a label without boxes for each image."""
        empty: dict[str, Any] = {"segments": [], "keypoints": None, "normalized": True, "bbox_format": "xywh"}
        labels = []
        for file, shape in zip(self._images.files, self._images.shapes, strict=True):
            boxes = {"cls": np.zeros((0, 1), np.float32), "bboxes": np.zeros((0, 4), np.float32)}
            labels.append({"im_file": file, "shape": shape, **boxes, **empty})
        return labels


class MixedDataset(ConcatDataset):
    """Labeled images followed by unlabeled images, with the interface of an Ultralytics training set.

    Augmentations that combine images, such as mosaic, combine images of one kind.

    Args:
        labeled: The labeled images, None if there are none.
        unlabeled: The unlabeled images.
    """

    rect = False

    def __init__(self, labeled: YOLODataset | None, unlabeled: UnlabeledDataset):
        super().__init__([unlabeled] if labeled is None else [labeled, unlabeled])
        self.labeled = 0 if labeled is None else len(labeled)
        self.unlabeled = len(unlabeled)
        self.labels = (labeled or unlabeled).labels  # for plots and class weights
        self.collate_fn = unlabeled.collate_fn

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**super().__getitem__(index), UNLABELED_MARK: index >= self.labeled}

    @property
    def im_files(self) -> list[str]:
        """Paths of all images, in the order of their indices."""
        return [file for dataset in self.datasets for file in dataset.im_files]  # type: ignore[attr-defined]

    def close_mosaic(self, hyp: Any) -> None:
        """Switch mosaic and similar augmentations off for both kinds."""
        for dataset in self.datasets:
            dataset.close_mosaic(hyp)  # type: ignore[attr-defined]


class MixedSampler(Sampler[int]):
    """Indices of a `MixedDataset`: each batch has the same number of labeled and then of unlabeled images.

    An epoch has as many steps as all images together fill. Each kind is drawn in a separate shuffled order that
    continues from epoch to epoch; at its end, it is shuffled again. Each labeled image is therefore drawn equally
    often, within one draw, and so is each unlabeled image. The order depends on seed and epoch only: a resumed run
    continues with the images that it would have drawn, and each of several processes draws different images.

    Args:
        labeled: Number of labeled images, which have the first indices; may be 0.
        unlabeled: Number of unlabeled images, which follow.
        batch: Images in a batch of this process.
        ratio: Unlabeled images per labeled image.
        seed: Seed of the order.
        rank: Index of this process.
        world: Number of processes.

    Raises:
        ConfigError: If a batch is too small for both kinds.
    """

    def __init__(
        self, labeled: int, unlabeled: int, batch: int, ratio: float, seed: int = 0, rank: int = 0, world: int = 1
    ):
        total = labeled + unlabeled
        self.batch = max(min(batch, total // world), 1)
        if labeled and self.batch < 2:
            raise ConfigError(
                f"unlabeled= needs two images or more in a batch of each process, one of each kind; here it is "
                f"{batch} of {total} images. Use a larger batch=."
            )
        share = share_of_batch(self.batch, ratio) if labeled else self.batch
        self.steps = math.ceil(total / (self.batch * world))
        self._kinds = (Stream(0, labeled, self.batch - share, seed), Stream(labeled, unlabeled, share, seed + 1))
        self._rank, self._world = rank, world
        self._epoch, self._skipped = 0, 0

    def __len__(self) -> int:
        """Return the number of indices of one epoch of this process."""
        return self.steps * self.batch

    def __iter__(self) -> Iterator[int]:
        # a prefetching data loader begins the next epoch early, so a pass reads its epoch once, at its beginning
        epoch, first = self._epoch, self._skipped
        self._skipped = 0
        for step in range(first, self.steps):
            for kind in self._kinds:
                yield from kind.chunk((epoch * self.steps + step) * self._world + self._rank)
        self._epoch = epoch + 1

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next pass."""
        self._epoch = epoch

    def begin(self, epoch: int, skipped: int = 0) -> None:
        """Set the epoch of the next pass, and the number of its first batches to skip."""
        self._epoch, self._skipped = epoch, skipped

    def describe(self) -> str:
        """Return a sentence that describes an epoch."""
        draws = [kind.size * self.steps * self._world / max(kind.images, 1) for kind in self._kinds]
        labeled, unlabeled = self._kinds
        if not labeled.images:
            return f"An epoch is {self.steps} steps over {unlabeled.images} unlabeled images, without labeled ones."
        return (
            f"An epoch is {self.steps} steps of {labeled.size} labeled and {unlabeled.size} unlabeled images"
            f"{f' in each of {self._world} processes' if self._world > 1 else ''}: each of the {labeled.images} "
            f"labeled images is drawn {draws[0]:.2g} times, each of the {unlabeled.images} unlabeled images "
            f"{draws[1]:.2g} times.{self._advice(*draws)}"
        )

    def _advice(self, labeled_draws: float, unlabeled_draws: float) -> str:
        """Return a ratio that draws both kinds more equally, if labeled images repeat much more often."""
        labeled, unlabeled = self._kinds
        even = min(round(unlabeled.images / labeled.images), self.batch - 1)
        if labeled_draws < 2 * unlabeled_draws or share_of_batch(self.batch, even) == unlabeled.size:
            return ""
        return f" With unlabeled_ratio={even} the labeled images would repeat less often."


class Stream:
    """An endless sequence of images of one kind: shuffled orders, one after the other, divided into chunks.

    Args:
        first: Index of the first image.
        images: Number of images.
        size: Images in a chunk.
        seed: Seed of the orders.
    """

    def __init__(self, first: int, images: int, size: int, seed: int):
        self.first, self.images, self.size, self._seed = first, images, size, seed
        self._orders: dict[int, np.ndarray] = {}

    def chunk(self, number: int) -> list[int]:
        """Return the indices of a chunk, by its number from 0."""
        draws = range(number * self.size, (number + 1) * self.size)
        return [self.first + int(self._order(d // self.images)[d % self.images]) for d in draws]

    def _order(self, number: int) -> np.ndarray:
        if number not in self._orders:
            order = np.random.default_rng((self._seed, self.first, number)).permutation(self.images)
            self._orders = dict([*self._orders.items()][-1:]) | {number: order}  # a chunk rarely needs more than two
        return self._orders[number]


def mixed_loader(
    dataset: MixedDataset, sampler: MixedSampler, workers: int, device: torch.device
) -> InfiniteDataLoader:
    """Return Ultralytics' training loader with another sampler.

    Ultralytics' function takes no sampler, so its settings are repeated here.

    Args:
        dataset: The images.
        sampler: Their order.
        workers: Largest number of processes that load data.
        device: Device of the training.
    """
    devices = get_torch_device_backend(device).device_count() if device.type not in {"cpu", "mps"} else 0
    workers = min((os.cpu_count() or 1) // max(devices, 1), workers, 0 if sampler.steps <= 1 else sampler.steps)
    generator = torch.Generator()
    generator.manual_seed((6148914691236517205 + torch.initial_seed()) % (1 << 64))
    return InfiniteDataLoader(
        dataset=dataset,
        batch_size=sampler.batch,
        num_workers=workers,
        sampler=sampler,
        prefetch_factor=4 if workers > 0 else None,
        pin_memory=devices > 0,
        collate_fn=dataset.collate_fn,
        worker_init_fn=seed_worker,
        generator=generator,
    )


def unlabeled_dataset(images: UnlabeledImages, args: Any, batch: int, data: Any, stride: int) -> UnlabeledDataset:
    """Build a training set as Ultralytics does; the argument `fraction` applies to labeled images only.

    Args:
        images: The images.
        args: Ultralytics' training arguments.
        batch: Images in a batch.
        data: The data set as Ultralytics read it from the data YAML.
        stride: Largest stride of the student.
    """
    return UnlabeledDataset(
        images,
        imgsz=args.imgsz,
        batch_size=batch,
        augment=True,
        hyp=args,
        rect=False,
        cache=args.cache or None,
        single_cls=args.single_cls or False,
        stride=stride,
        pad=0.0,
        prefix=colorstr("unlabeled: "),
        task=args.task,
        data=data,
    )


def unlabeled_count(marks: Sequence[bool]) -> int:
    """Return the number of unlabeled images in a batch."""
    return sum(map(bool, marks))


def share_of_batch(batch: int, ratio: float) -> int:
    """Return the number of unlabeled images in a batch: at least one, and at most all but one.

    Args:
        batch: Images in a batch, at least 2.
        ratio: Unlabeled images per labeled image.
    """
    return min(max(round(batch * ratio / (1 + ratio)), 1), batch - 1)
