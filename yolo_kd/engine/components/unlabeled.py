"""`PoolTrainer`: a durable trainer that also trains on images nobody labelled. It does not know what they teach."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import distributed as dist
from ultralytics.utils import LOGGER, RANK
from ultralytics.utils.torch_utils import torch_distributed_zero_first, unwrap_model

from yolo_kd.config.unlabeled import UnlabeledOptions
from yolo_kd.engine.components.durability import DurableTrainer
from yolo_kd.safe_loading.dataset import optional_train
from yolo_kd.unlabeled.dataset import MixedDataset, MixedSampler, mixed_loader, unlabeled_dataset
from yolo_kd.unlabeled.images import UnlabeledImages


class PoolTrainer(DurableTrainer):
    """Puts the images of a pool behind the labelled ones of every batch."""

    model: Any
    data: dict[str, Any]
    args: Any
    _pool: UnlabeledImages | None = None
    _labelled = True  # whether there are labelled images; without any there is a pool

    @property
    def pool(self) -> UnlabeledOptions | None:
        """What the user said about the pool, None where there is none."""
        return None

    def lenient_data(self) -> AbstractContextManager[None]:
        """Let the data YAML name no training images where there is a pool, for the duration."""
        return optional_train() if self._pool is not None else nullcontext()

    def train(self) -> Any:
        """Train; the data YAML may name no training images where there is a pool."""
        with self.lenient_data():
            return super().train()

    def get_dataset(self) -> dict[str, Any]:
        """Read the data YAML, which may name no training images where there is a pool."""
        with self.lenient_data():
            return super().get_dataset()

    def labelled_dataset(self, img_path: Any, mode: str, batch: int | None) -> Any:
        """Make Ultralytics' own data set."""
        return super().build_dataset(img_path, mode, batch)

    def build_dataset(self, img_path: Any, mode: str = "train", batch: int | None = None) -> Any:
        """Put the pool behind the labelled training images."""
        if mode != "train" or self._pool is None:
            return self.labelled_dataset(img_path, mode, batch)
        stride = max(int(unwrap_model(self.model).stride.max()), 32)
        labelled = self.labelled_dataset(img_path, mode, batch) if self._labelled else None
        return MixedDataset(labelled, unlabeled_dataset(self._pool, self.args, batch or 16, self.data, stride))

    def get_dataloader(self, dataset_path: Any, batch_size: int = 16, rank: int = 0, mode: str = "train") -> Any:
        """Draw labelled and pool images in the ratio that was asked for."""
        if mode != "train" or self._pool is None:
            return super().get_dataloader(dataset_path, batch_size, rank, mode)
        assert self.pool is not None
        with torch_distributed_zero_first(rank):
            dataset = self.build_dataset(dataset_path, mode, batch_size)
        place = (dist.get_rank(), dist.get_world_size()) if rank != -1 and dist.is_initialized() else (0, 1)
        counts = dataset.labelled, dataset.unlabelled
        sampler = MixedSampler(*counts, batch_size, self.pool.ratio, self.args.seed, *place)
        if RANK in {-1, 0}:
            LOGGER.info(f"{sampler.describe()} {self.pool.describe(dataset.labelled > 0)}")
        return mixed_loader(dataset, sampler, self.args.workers, self.device)

    def _begin_epoch(self) -> None:
        super()._begin_epoch()
        if isinstance(sampler := self.train_loader.sampler, MixedSampler):
            sampler.begin(self.epoch, self._skipped)
