"""Labeled and unlabeled images together: the order of the draws, and that augmentations combine one kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ultralytics.cfg import get_cfg
from ultralytics.data import build_yolo_dataset
from ultralytics.data.utils import check_det_dataset

from yolo_kd.errors import ConfigError
from yolo_kd.unlabeled.dataset import (
    UNLABELED_MARK,
    MixedDataset,
    MixedSampler,
    mixed_loader,
    unlabeled_count,
    unlabeled_dataset,
)
from yolo_kd.unlabeled.images import find_images, readable_images

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("labeled", "unlabeled", "batch", "ratio"), [(41, 164, 16, 1), (7, 100, 5, 3), (30, 4, 8, 0.5), (0, 21, 8, 1)]
)
def test_an_epoch_of_the_sampler(labeled: int, unlabeled: int, batch: int, ratio: float) -> None:
    sampler = MixedSampler(labeled, unlabeled, batch, ratio, seed=5)
    total = labeled + unlabeled
    assert len(sampler) == -(-total // batch) * batch
    epochs = [list(sampler) for _ in range(4)]
    assert all(len(e) == len(sampler) for e in epochs)
    assert epochs[0] != epochs[1]
    counts_of_unlabeled = set()
    for start in range(0, len(sampler), batch):
        kinds = [i >= labeled for i in epochs[0][start : start + batch]]
        assert kinds == sorted(kinds), "labeled images come first"
        counts_of_unlabeled.add(sum(kinds))
    assert counts_of_unlabeled == {round(batch * ratio / (1 + ratio)) if labeled else batch}
    seen = Counter(i for e in epochs for i in e)
    for kind in (range(labeled), range(labeled, total)):
        counts = {seen[i] for i in kind}
        assert not counts or max(counts) - min(counts) <= 1, "each image of a kind is drawn equally often"


def test_the_order_follows_from_seed_and_epoch() -> None:
    def epoch(seed: int, number: int, skipped: int = 0) -> list[int]:
        sampler = MixedSampler(10, 20, 6, 1, seed)
        sampler.begin(number, skipped)
        return list(sampler)

    sampler = MixedSampler(10, 20, 6, 1, 3)
    one_after_the_other = [list(sampler) for _ in range(3)]
    assert one_after_the_other == [epoch(3, n) for n in range(3)]
    assert epoch(4, 1) != epoch(3, 1)
    assert epoch(3, 2, skipped=2) == epoch(3, 2)[12:]


def test_a_sampler_that_is_read_ahead_keeps_its_order() -> None:
    """A loader with workers begins the next epoch while this one is trained on."""
    plain, ahead = (MixedSampler(5, 9, 4, 1) for _ in range(2))
    expected = [i for _ in range(4) for i in plain]

    def endless(sampler: MixedSampler) -> Iterator[int]:
        while True:
            yield from sampler

    stream, found = endless(ahead), []
    for number in range(4):
        ahead.begin(number)
        found += islice(stream, len(ahead) + 3 * (number == 0))
    assert found[: len(expected)] == expected[: len(found)]
    ahead.begin(2)
    assert list(ahead) == expected[2 * len(plain) : 3 * len(plain)], "and can go back"


def test_processes_draw_apart() -> None:
    samplers = [MixedSampler(12, 24, 4, 1, seed=1, rank=rank, world=3) for rank in range(3)]
    assert {len(s) for s in samplers} == {3 * 4}
    drawn = [list(s) for s in samplers]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert not {*drawn[first]} & {*drawn[second]} & {*range(12, 36)}
    whole = Counter(i for d in drawn for i in d)
    assert {whole[i] for i in range(12, 36)} <= {0, 1}
    assert {whole[i] for i in range(12)} <= {1, 2}
    assert sum(whole.values()) == 36


def test_a_batch_has_room_for_both() -> None:
    with pytest.raises(ConfigError, match=r"needs two images or more in a batch of each process.* here it is 1 of 5"):
        MixedSampler(3, 2, 1, 1.0)
    assert MixedSampler(1, 2, 16, 1.0).batch == 3, "there are no more"


def test_the_log_says_what_an_epoch_is() -> None:
    text = MixedSampler(41, 164, 16, 1).describe()
    assert text.startswith(
        "An epoch is 13 steps of 8 labeled and 8 unlabeled images: each of the 41 labeled images is drawn"
    )
    assert "2.5 times" in text
    assert "0.63 times. With unlabeled_ratio=4 the labeled images would repeat less often." in text
    for ratio, batch in ((4, 16), (1, 2)):  # what is asked for already, and all that a batch has room for
        assert MixedSampler(41, 164, batch, ratio).describe().endswith(" times.")
    assert MixedSampler(100, 164, 16, 1).describe().endswith(" times."), "nearly equal"
    assert "unlabeled_ratio=7" in MixedSampler(40, 10_000, 8, 1).describe(), "a batch holds a labeled one"
    assert "in each of 2 processes" in MixedSampler(41, 164, 8, 1, world=2).describe()
    assert "without labeled ones" in MixedSampler(0, 164, 8, 1).describe()


@pytest.fixture
def coloured(tmp_path: Path) -> Path:
    """Four labeled images, all red, and five unlabeled images, all blue."""
    for kind, count, channel in (("images", 4, 0), ("unlabeled", 5, 2)):
        (tmp_path / kind).mkdir()
        for i in range(count):
            pixels = np.zeros((48, 64, 3), np.uint8)
            pixels[..., channel] = 200
            Image.fromarray(pixels).save(tmp_path / kind / f"{i}.png")
    (tmp_path / "labels").mkdir()
    for i in range(4):
        (tmp_path / "labels" / f"{i}.txt").write_text("0 0.5 0.5 0.4 0.4\n")
    (tmp_path / "data.yaml").write_text(f"path: {tmp_path}\ntrain: images\nval: images\nnames: [x]\n")
    return tmp_path


def mixed(folder: Path, labeled: bool = True, **keys: object) -> MixedDataset:
    cfg = get_cfg(overrides={"imgsz": 64, "task": "detect", "fraction": 0.75, "hsv_h": 0.0, **keys})
    data = check_det_dataset(str(folder / "data.yaml"))
    images = readable_images(find_images([str(folder / "unlabeled")]), "unlabeled")
    own = build_yolo_dataset(cfg, data["train"], 4, data, mode="train") if labeled else None
    return MixedDataset(own, unlabeled_dataset(images, cfg, 4, data, 32))


def test_each_kind_augments_with_its_own(coloured: Path) -> None:
    """Mosaic, mixup and cutmix take further images: a mosaic of both kinds would put labels onto unlabeled images."""
    np.random.seed(0)
    torch.manual_seed(0)
    dataset = mixed(coloured, mosaic=1.0, mixup=1.0, cutmix=1.0, copy_paste=1.0, hsv_s=0.0, hsv_v=0.0, bgr=0.0)
    assert (dataset.labeled, dataset.unlabeled, len(dataset)) == (3, 5, 8), "fraction is for labeled images"
    loader = mixed_loader(dataset, MixedSampler(3, 5, 4, 1), 0, CPU)
    grey = 114
    for batch in loader:
        assert batch[UNLABELED_MARK] == (False, False, True, True)
        assert unlabeled_count(batch[UNLABELED_MARK]) == 2
        for image, unlabeled in zip(batch["img"], batch[UNLABELED_MARK], strict=True):
            red, _, blue = image.float().flatten(1).amax(1)
            assert (blue if unlabeled else red) > grey
            assert (red if unlabeled else blue) <= grey, "no colour of the other kind"
        assert (batch["batch_idx"] < 2).all(), "unlabeled images have no labels"
        assert len(batch["cls"]) > 0


def test_it_serves_what_ultralytics_asks(coloured: Path) -> None:
    before = sorted(coloured.rglob("*"))
    dataset = mixed(coloured)
    new = {p.relative_to(coloured).as_posix() for p in coloured.rglob("*")} - {
        p.relative_to(coloured).as_posix() for p in before
    }
    assert new == {"labels.cache"}, "that of the labeled images only"
    assert [len(label["cls"]) for label in dataset.labels] == [1, 1, 1], "plots and class weights count labeled images"
    assert [Path(f).parent.name for f in dataset.im_files] == ["images"] * 3 + ["unlabeled"] * 5
    dataset.close_mosaic(get_cfg(overrides={"imgsz": 64, "task": "detect"}))
    for part in dataset.datasets:
        assert part.transforms.transforms[0].transforms[0].p == 0.0, "mosaic is off"


def test_unlabeled_images_alone(coloured: Path) -> None:
    dataset = mixed(coloured, labeled=False)
    assert (dataset.labeled, len(dataset)) == (0, 5)
    batch = next(iter(mixed_loader(dataset, MixedSampler(0, 5, 4, 1), 0, CPU)))
    assert all(batch[UNLABELED_MARK])
    assert batch["bboxes"].shape == (0, 4)
    assert np.concatenate([label["bboxes"] for label in dataset.labels]).shape == (0, 4)


def test_images_in_memory(coloured: Path) -> None:
    dataset = mixed(coloured, cache="ram")
    assert all(part.ims[0] is not None for part in dataset.datasets)


def test_workers_load_the_same_batches(coloured: Path) -> None:
    def files(workers: int) -> list[tuple]:
        loader = mixed_loader(mixed(coloured), MixedSampler(3, 5, 4, 1, seed=2), workers, CPU)
        try:
            return [tuple(Path(f).name for f in b["im_file"]) for _ in range(3) for b in loader]
        finally:
            loader.close()

    assert files(0) == files(1)
