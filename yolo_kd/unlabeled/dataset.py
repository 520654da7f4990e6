"""Labelled and unlabelled images in one data set, and the order in which a training draws them."""

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

UNLABELED_MARK = "pool"  # key of a batch: for each image whether it comes from the pool


class PoolDataset(YOLODataset):
    """Ultralytics' data set of images without labels; it looks for none and writes no label cache.

    Args:
        images: The images.
        **keys: What `YOLODataset` takes, without `img_path`.
    """

    def __init__(self, images: UnlabeledImages, **keys: Any):
        self._images = images
        super().__init__(img_path="", **keys)

    def get_img_files(self, img_path: Any) -> list[str]:
        """Return the images that are known already."""
        return list(self._images.files)

    def get_labels(self) -> list[dict]:
        """Return a label without boxes for each image."""
        empty: dict[str, Any] = {"segments": [], "keypoints": None, "normalized": True, "bbox_format": "xywh"}
        return [
            {
                "im_file": file,
                "shape": shape,
                "cls": np.zeros((0, 1), np.float32),
                "bboxes": np.zeros((0, 4), np.float32),
                **empty,
            }
            for file, shape in zip(self._images.files, self._images.shapes, strict=True)
        ]


class MixedDataset(ConcatDataset):
    """Labelled images followed by pool images; each kind augments with its own, so a mosaic is of one kind.

    It serves what Ultralytics asks of a training set.

    Args:
        labelled: The labelled images, None where there are none.
        pool: The pool.
    """

    rect = False

    def __init__(self, labelled: YOLODataset | None, pool: PoolDataset):
        super().__init__([pool] if labelled is None else [labelled, pool])
        self.labelled = 0 if labelled is None else len(labelled)
        self.unlabelled = len(pool)
        # what plots and class weights count: the labels, which of a pool are empty
        self.labels = (labelled or pool).labels
        self.collate_fn = pool.collate_fn

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**super().__getitem__(index), UNLABELED_MARK: index >= self.labelled}

    @property
    def im_files(self) -> list[str]:
        """Paths of all images, in the order of their indices."""
        return [file for part in self.datasets for file in part.im_files]  # type: ignore[attr-defined]

    def close_mosaic(self, hyp: Any) -> None:
        """Switch mosaic and its kin off in both kinds."""
        for part in self.datasets:
            part.close_mosaic(hyp)  # type: ignore[attr-defined]


class MixedSampler(Sampler[int]):
    """Indices of a `MixedDataset`, batch by batch: labelled images first, then pool images, always as many of each.

    An epoch has as many steps as all images together fill. Each kind is drawn in a shuffled order of its own that goes
    on from epoch to epoch; when it is through, it is shuffled anew. So each labelled image is seen equally often, give
    or take one, and the same holds in the pool. The order follows from seed and epoch alone: a run that is resumed goes
    on with the images that it would have seen, and of several processes each draws its own.

    Args:
        labelled: Number of labelled images, at index 0 and up; may be 0.
        unlabelled: Number of pool images, which follow.
        batch: Images of a batch of this process.
        ratio: Pool images for each labelled one.
        seed: Seed of the order.
        rank: Number of this process.
        world: Number of processes.

    Raises:
        ConfigError: If a batch is too small for both kinds.
    """

    def __init__(
        self, labelled: int, unlabelled: int, batch: int, ratio: float, seed: int = 0, rank: int = 0, world: int = 1
    ):
        total = labelled + unlabelled
        self.batch = max(min(batch, total // world), 1)
        if labelled and self.batch < 2:
            raise ConfigError(
                f"unlabeled= needs two images or more in a batch of each process, one of each kind; here it is "
                f"{batch} of {total} images. Use a larger batch=."
            )
        pool = share_of_batch(self.batch, ratio) if labelled else self.batch
        self.steps = math.ceil(total / (self.batch * world))
        self._kinds = (Stream(0, labelled, self.batch - pool, seed), Stream(labelled, unlabelled, pool, seed + 1))
        self._rank, self._world = rank, world
        self._epoch, self._skipped = 0, 0

    def __len__(self) -> int:
        """Return the number of indices of one epoch of this process."""
        return self.steps * self.batch

    def __iter__(self) -> Iterator[int]:
        # a data loader that fetches ahead begins the next epoch early, so what it draws is settled when a pass begins
        epoch, first = self._epoch, self._skipped
        self._skipped = 0
        for step in range(first, self.steps):
            for kind in self._kinds:
                yield from kind.part((epoch * self.steps + step) * self._world + self._rank)
        self._epoch = epoch + 1

    def set_epoch(self, epoch: int) -> None:
        """Let the next pass be that of an epoch."""
        self._epoch = epoch

    def begin(self, epoch: int, skipped: int = 0) -> None:
        """Let the next pass be that of an epoch of which some batches are done."""
        self._epoch, self._skipped = epoch, skipped

    def describe(self) -> str:
        """Return a sentence about what an epoch is."""
        seen = [kind.size * self.steps * self._world / max(kind.images, 1) for kind in self._kinds]
        labelled, pool = self._kinds
        if not labelled.images:
            return (
                f"An epoch is {self.steps} steps over {pool.images} images without labels; there are no labelled ones."
            )
        return (
            f"An epoch is {self.steps} steps of {labelled.size} labelled and {pool.size} pool images"
            f"{f' in each of {self._world} processes' if self._world > 1 else ''}: each of the {labelled.images} "
            f"labelled images is seen {seen[0]:.2g} times, each of the {pool.images} pool images {seen[1]:.2g} times."
            f"{self._advice(*seen)}"
        )

    def _advice(self, labelled_seen: float, pool_seen: float) -> str:
        """Return which ratio would show images of both kinds more equally, where few labelled ones repeat."""
        labelled, pool = self._kinds
        even = min(round(pool.images / labelled.images), self.batch - 1)
        if labelled_seen < 2 * pool_seen or share_of_batch(self.batch, even) == pool.size:
            return ""
        return f" With unlabeled_ratio={even} the few labelled ones would repeat less."


class Stream:
    """An endless sequence of images of one kind: one shuffled order after the other, cut into parts.

    Args:
        first: Index of the first image.
        images: Number of images.
        size: Images of a part.
        seed: Seed of the orders.
    """

    def __init__(self, first: int, images: int, size: int, seed: int):
        self.first, self.images, self.size, self._seed = first, images, size, seed
        self._orders: dict[int, np.ndarray] = {}

    def part(self, number: int) -> list[int]:
        """Return the indices of a part, by its number from 0."""
        places = range(number * self.size, (number + 1) * self.size)
        return [self.first + int(self._order(p // self.images)[p % self.images]) for p in places]

    def _order(self, number: int) -> np.ndarray:
        if number not in self._orders:
            while len(self._orders) > 1:  # a part spans two orders at most times
                self._orders.pop(next(iter(self._orders)))
            self._orders[number] = np.random.default_rng((self._seed, self.first, number)).permutation(self.images)
        return self._orders[number]


def mixed_loader(
    dataset: MixedDataset, sampler: MixedSampler, workers: int, device: torch.device
) -> InfiniteDataLoader:
    """Return Ultralytics' training loader with our order of images; it takes none, so its settings are repeated here.

    Args:
        dataset: The images.
        sampler: Their order.
        workers: Processes that load data, at most.
        device: Where batches go.
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


def unlabeled_dataset(images: UnlabeledImages, args: Any, batch: int, data: Any, stride: int) -> PoolDataset:
    """Return the pool as Ultralytics would build a training set from it; `fraction` is for labelled images.

    Args:
        images: The images.
        args: Ultralytics' arguments of the training.
        batch: Images of a batch.
        data: What Ultralytics read from the data YAML.
        stride: Largest stride of the student.
    """
    return PoolDataset(
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
        prefix=colorstr("pool: "),
        task=args.task,
        classes=None,
        data=data,
        fraction=1.0,
    )


def unlabeled_count(marks: Sequence[bool]) -> int:
    """Return how many images of a batch come from the pool."""
    return sum(map(bool, marks))


def share_of_batch(batch: int, ratio: float) -> int:
    """Return how many of the images of a batch come from the pool: at least one, and at least one does not.

    Args:
        batch: Images of a batch, at least 2.
        ratio: Pool images for each labelled one.
    """
    return min(max(round(batch * ratio / (1 + ratio)), 1), batch - 1)
