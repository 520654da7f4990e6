"""Unlabeled images: found, opened, and compared with the validation images before a training begins."""

from __future__ import annotations

import glob
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from ultralytics.data.utils import IMG_FORMATS, exif_size, img2label_paths
from ultralytics.utils import LOGGER, RANK

from yolo_kd.errors import DataError
from yolo_kd.safe_loading.checkpoint import sha256
from yolo_kd.safe_loading.dataset import places_of

SMALLEST = 10  # pixels: Ultralytics leaves out images that are smaller
THREADS = 8


@dataclass(frozen=True)
class UnlabeledImages:
    """Readable images without labels.

    Attributes:
        files: Their paths, sorted, each once.
        shapes: Height and width of each in pixels.
    """

    files: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]


def images_below(place: str | Path) -> list[str]:
    """Return the images of a folder and its subfolders, of a text file of paths, or of a glob, sorted.

    A path in a text file that starts with `./` is relative to that file, as in Ultralytics. Any other relative path is
    relative to the current folder.

    Raises:
        DataError: If there is no such folder, file or match, or a text file names files that do not exist.
    """
    path = Path(place)
    if path.is_dir():
        return sorted(str(p) for p in path.rglob("*.*") if _is_image(p) and p.is_file())
    if path.suffix.lower() == ".txt" and path.is_file():
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
        named = [str(path.parent / line[2:]) if line.startswith("./") else line for line in lines if line]
        if missing := [name for name in named if not Path(name).is_file()]:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise DataError(f"{place} names {missing[0]}{more}, which does not exist.")
        return sorted(name for name in named if _is_image(Path(name)))
    if path.is_file():
        if _is_image(path):
            return [str(path)]
        raise DataError(f"{place} is no folder, no image, no .txt of paths and no data YAML.")
    if any(c in str(place) for c in "*?["):
        if found := glob.glob(str(place), recursive=True):
            return sorted(name for name in found if _is_image(Path(name)) and Path(name).is_file())
        raise DataError(f"{place} matches no file.")
    raise DataError(f"{place} does not exist.")


def find_images(places: Sequence[str]) -> tuple[str, ...]:
    """Return the images of all places, each once, sorted.

    Args:
        places: Anything that `images_below` accepts, or data YAMLs, whose `train` is used without its labels.

    Raises:
        DataError: If a place cannot be read or holds no image.
    """
    found: dict[str, str] = {}
    for place in places:
        try:
            yaml = Path(place).suffix.lower() in (".yaml", ".yml")
            images = [i for p in (places_of(place, "train") if yaml else [place]) for i in images_below(p)]
        except DataError as error:
            raise DataError(f"unlabeled={place} cannot be used: {error}") from error
        if not images:
            raise DataError(
                f"unlabeled={place} holds no image: no file that ends in .jpg, .png, .bmp, .tif, .webp or the like."
            )
        found |= {str(Path(image).resolve()): image for image in images}
    return tuple(sorted(found.values()))


def log_warning(sentence: str) -> None:
    """Log a sentence once, in the first process."""
    if RANK in {-1, 0}:
        LOGGER.warning(sentence)


def readable_images(files: Sequence[str], place: str, warn: Callable[[str], None] = log_warning) -> UnlabeledImages:
    """Open every file and leave out those that are no image, with one warning. No file changes.

    Args:
        files: Paths.
        place: The places they are from, for messages.
        warn: Receives the warning.

    Raises:
        DataError: If no image is left.
    """
    with ThreadPoolExecutor(THREADS) as threads:
        shapes = list(threads.map(_shape, files))
    good = [(file, shape) for file, shape in zip(files, shapes, strict=True) if shape is not None]
    bad = [file for file, shape in zip(files, shapes, strict=True) if shape is None]
    names = ", ".join(Path(file).name for file in bad[:3]) + (", ..." if len(bad) > 3 else "")
    if not good:
        raise DataError(f"unlabeled={place} holds no readable image: {len(bad)} cannot be opened ({names}).")
    if bad:
        warn(f"{len(bad)} of {len(files)} images of unlabeled={place} cannot be opened: {names}. Left out.")
    return UnlabeledImages(*(tuple(side) for side in zip(*good, strict=True)))


def check_apart(
    images: UnlabeledImages, validation: Any, place: str, warn: Callable[[str], None] = log_warning
) -> None:
    """Check that the unlabeled images are not the validation images, on which results would then be too good.

    Files are compared by content: first their sizes, then the hashes of files whose size occurs on both sides. If some
    of the images are validation images, there is a warning.

    Args:
        images: The unlabeled images.
        validation: The validation images of a data YAML: a path or a list of paths.
        place: The places the images are from, for messages.
        warn: Receives the warning.

    Raises:
        DataError: If all of them are validation images.
    """
    theirs = [file for path in _listed(validation) for file in images_below(path)]
    by_size: dict[int, list[list[str]]] = defaultdict(lambda: [[], []])
    for side, files in enumerate((images.files, theirs)):
        for file in files:
            by_size[Path(file).stat().st_size][side].append(file)
    shared: list[str] = []
    for ours, others in by_size.values():
        if ours and others:
            hashes = {sha256(file) for file in others}
            shared += [file for file in ours if sha256(file) in hashes]
    if len(shared) == len(images.files):
        raise DataError(
            f"unlabeled={place} are the validation images, all {len(shared)} of them: results would look better "
            "than they are. Name other images."
        )
    if shared:
        warn(
            f"{len(shared)} of {len(images.files)} images of unlabeled={place} are validation images as well, such "
            f"as {Path(shared[0]).name}: results will look better than they are."
        )


def has_labels(train: Any) -> bool:
    """Return whether any training image of a data YAML has a label file.

    Args:
        train: The `train` of a data YAML as Ultralytics resolves it: a path, a list of paths, or None.
    """
    files = [file for path in _listed(train) for file in images_below(path)]
    return any(Path(label).is_file() for label in img2label_paths(files))


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value] if value else []


def _is_image(path: Path) -> bool:
    return path.suffix[1:].lower() in IMG_FORMATS


def _shape(file: str) -> tuple[int, int] | None:
    """Return the height and width of an image as it is displayed, None if the file is no image."""
    try:
        with Image.open(file) as image:
            image.verify()
            width, height = exif_size(image)
    except Exception:  # decoders raise errors of any kind
        return None
    return (height, width) if min(height, width) >= SMALLEST else None
