"""Training on unlabeled images in addition to labeled ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import distributed
from ultralytics.utils import LOGGER, RANK
from ultralytics.utils.torch_utils import torch_distributed_zero_first, unwrap_model

from yolo_kd.config.unlabeled import UnlabeledOptions
from yolo_kd.engine.component import Component
from yolo_kd.safe_loading.dataset import optional_train
from yolo_kd.unlabeled.dataset import MixedDataset, MixedSampler, mixed_loader, unlabeled_dataset
from yolo_kd.unlabeled.images import UnlabeledImages


class Unlabeled(Component):
    """Appends unlabeled images to the labeled images of each batch.

    Args:
        trainer: The host.
        options: How unlabeled images are used.
        images: The images.
        labeled: Whether there are also labeled training images.
    """

    def __init__(self, trainer: Any, options: UnlabeledOptions, images: UnlabeledImages, labeled: bool):
        super().__init__(trainer)
        self.options = options
        self.images = images
        self.labeled = labeled

    def train(self, proceed: Callable[[], Any]) -> Any:
        """Accept a data YAML without training images, for the duration."""
        with optional_train():
            return proceed()

    def get_dataset(self, proceed: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Accept a data YAML without training images."""
        with optional_train():
            return proceed()

    def build_dataset(self, proceed: Callable[..., Any], path: Any, mode: str, batch: int | None) -> Any:
        """Append the unlabeled images to the labeled training images."""
        if mode != "train":
            return proceed(path, mode, batch)
        trainer = self.trainer
        stride = max(int(unwrap_model(trainer.model).stride.max()), 32)
        labeled = proceed(path, mode, batch) if self.labeled else None
        return MixedDataset(labeled, unlabeled_dataset(self.images, trainer.args, batch or 16, trainer.data, stride))

    def get_dataloader(self, proceed: Callable[..., Any], path: Any, batch_size: int, rank: int, mode: str) -> Any:
        """Draw labeled and unlabeled images in the requested ratio."""
        if mode != "train":
            return proceed(path, batch_size, rank, mode)
        trainer = self.trainer
        with torch_distributed_zero_first(rank):
            dataset = trainer.build_dataset(path, mode, batch_size)
        rank_and_world = (0, 1)
        if rank != -1 and distributed.is_initialized():
            rank_and_world = distributed.get_rank(), distributed.get_world_size()
        counts = dataset.labeled, dataset.unlabeled
        sampler = MixedSampler(*counts, batch_size, self.options.ratio, trainer.args.seed, *rank_and_world)
        if RANK in {-1, 0}:
            LOGGER.info(f"{sampler.describe()} {self.options.describe(dataset.labeled > 0)}")
        return mixed_loader(dataset, sampler, trainer.args.workers, trainer.device)

    def run_callbacks(self, proceed: Callable[[str], None], event: str) -> None:
        """Set the sampler's epoch, and the number of batches that an interrupted process has trained."""
        proceed(event)
        if event == "on_train_epoch_start" and isinstance(sampler := self.trainer.train_loader.sampler, MixedSampler):
            sampler.begin(self.trainer.epoch, self.trainer.skipped)
