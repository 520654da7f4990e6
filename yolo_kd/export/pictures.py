"""The pictures on which an exported file is compared with its checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ultralytics.data.augment import LetterBox
from ultralytics.data.utils import IMG_FORMATS
from ultralytics.utils import ASSETS, ROOT
from ultralytics.utils.patches import imread

from yolo_kd.errors import DataError, listed
from yolo_kd.safe_loading.dataset import places_of
from yolo_kd.unlabeled.images import images_below

MAX_IMAGES = 8


@dataclass(frozen=True)
class Images:
    """Pictures to compare on, read before anything is exported.

    Attributes:
        source: A description of their origin.
        files: Their paths.
        pixels: BGR or single-channel uint8 arrays, (H, W, C).
    """

    source: str
    files: tuple[Path, ...]
    pixels: tuple[np.ndarray, ...]


def find_images(images: str | Path | None, checkpoint: dict[str, Any]) -> Images:
    """Read up to 8 pictures.

    Args:
        images: Folder, picture or data YAML (its val split). By default the val split of the data set in the
            checkpoint, or the photographs in the ultralytics package if that data set is gone.
        checkpoint: The dictionary in the checkpoint.

    Raises:
        DataError: If `images` is missing or holds no readable picture.
    """
    if images is not None:
        path = Path(images)
        if not path.exists():
            raise DataError(f"images={images} does not exist. Give a folder, a picture or a data YAML.")
        files = _pictures(path) if path.suffix not in (".yaml", ".yml") else _val_split(path)
        return _read(f"images={images}", files)
    data = (checkpoint.get("train_args") or {}).get("data")
    lost = ""
    if isinstance(data, str) and data.endswith((".yaml", ".yml")):
        lost = f" (the val split of {data}, on which the checkpoint was trained, was not found)"
        path = Path(data) if Path(data).exists() else ROOT / "cfg" / "datasets" / data
        with suppress(DataError):
            return _read(f"val split of {data}", _val_split(path))
    return _read(f"photographs of the ultralytics package{lost}", _pictures(ASSETS))


def _pictures(path: Path) -> list[str]:
    return images_below(path) if path.is_dir() or path.suffix[1:].lower() in IMG_FORMATS else []


def _val_split(data: Path) -> list[str]:
    return [file for place in places_of(data, "val") for file in images_below(place)]


def batches(images: Images, shape: tuple[int, ...], fixed: bool, stride: int) -> Iterator[tuple[np.ndarray, int]]:
    """Yield input batches, with the number of pictures in them that are not padding.

    A file of fixed shape gets full batches. A file with dynamic axes gets incomplete batches, and all pictures again at
    a second, wider size, because an axis that was frozen by mistake works only at the traced size.

    Args:
        images: The pictures.
        shape: Batch size, channels, height and width of the file's input.
        fixed: True if the input shape is fixed.
        stride: Largest stride of the model in pixels, by which the second size is wider.

    Yields:
        (B, C, H, W) RGB in [0, 1], float32, and the number of pictures.
    """
    batch, channels, height, width = shape
    for wide in (0,) if fixed else (0, stride):
        letterbox = LetterBox((height, width + wide), auto=False)
        rows = []
        for picture in images.pixels:
            boxed = letterbox(image=picture)
            boxed = (boxed if boxed.ndim == 3 else boxed[..., None])[..., ::-1]
            # with other than three channels any content will do, as long as both sides get the same
            boxed = boxed[..., np.arange(channels) % boxed.shape[-1]]
            rows.append(boxed.transpose(2, 0, 1).astype(np.float32) / 255)
        for start in range(0, len(rows), batch):
            chunk = rows[start : start + batch]
            filling = [chunk[-1]] * (batch - len(chunk)) if fixed else []
            yield np.ascontiguousarray(np.stack(chunk + filling)), len(chunk)


def _read(source: str, files: list[str]) -> Images:
    chosen = tuple(Path(file) for file in files[:MAX_IMAGES])
    if not chosen:
        raise DataError(f"{source} holds no picture to compare on; name a folder with pictures: images=path/to/folder.")
    pixels = [imread(file) for file in chosen]
    if broken := [str(file) for file, picture in zip(chosen, pixels, strict=True) if picture is None]:
        raise DataError(f"{source}: {listed(broken)} cannot be read as a picture.")
    return Images(source, chosen, tuple(p if p.ndim == 3 else p[..., None] for p in pixels if p is not None))
