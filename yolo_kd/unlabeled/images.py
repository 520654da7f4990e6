"""Images of the unlabelled pool, found, tried and compared with the validation images before a training begins."""

from __future__ import annotations

import glob
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from PIL import Image
from ultralytics.data.utils import DATASETS_DIR, IMG_FORMATS, exif_size, img2label_paths
from ultralytics.utils import LOGGER, RANK

from yolo_kd.errors import DataError
from yolo_kd.safe_loading.checkpoint import sha256
from yolo_kd.safe_loading.dataset import check_size

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
    """Return the images of a folder and everything below it, of a text file of paths, or of a glob, sorted.

    A path in a text file that starts with `./` is relative to that file, as Ultralytics reads it; any other relative
    path is relative to the current folder.

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
    """Return the images of all places of a pool, each once, sorted.

    Args:
        places: What `images_below` takes, or data YAMLs, whose `train` is taken and whose labels are not.

    Raises:
        DataError: If a place cannot be read or holds no image.
    """
    found: dict[str, str] = {}
    for place in places:
        try:
            images = [i for p in _places(place) for i in images_below(p)]
        except DataError as error:
            raise DataError(f"unlabeled={place} cannot be used: {error}") from error
        if not images:
            raise DataError(
                f"unlabeled={place} holds no image: no file that ends in .jpg, .png, .bmp, .tif, .webp or the like."
            )
        found |= {str(Path(image).resolve()): image for image in images}
    return tuple(sorted(found.values()))


def log_warning(sentence: str) -> None:
    """Log a sentence once, whatever the number of processes."""
    if RANK in {-1, 0}:
        LOGGER.warning(sentence)


def readable_images(files: Sequence[str], place: str, warn: Callable[[str], None] = log_warning) -> UnlabeledImages:
    """Open every file and leave out those that are no image, with one warning; nothing is written anywhere.

    Args:
        files: Paths.
        place: Where they come from, for messages.
        warn: Receives the sentence.

    Raises:
        DataError: If none is left.
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
    """Check that the pool is not the validation set, which would then measure what was trained on.

    Files are compared by content: sizes first, then hashes of those whose size occurs on both sides. There is a warning
    where some of the pool images are validation images.

    Args:
        images: The pool.
        validation: The validation images of a data YAML: a path or a list of paths.
        place: Where the pool comes from, for messages.
        warn: Receives the warning.

    Raises:
        DataError: If all of them are.
    """
    theirs = [file for path in _listed(validation) for file in images_below(path)]
    by_size: dict[int, list[list[str]]] = defaultdict(lambda: [[], []])
    for side, files in enumerate((images.files, theirs)):
        for file in files:
            by_size[Path(file).stat().st_size][side].append(file)
    shared: list[str] = []
    for ours, others in by_size.values():
        if ours and others:
            known = {sha256(file) for file in others}
            shared += [file for file in ours if sha256(file) in known]
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
        train: The `train` of a data YAML as Ultralytics resolves it: a path, a list of paths, or nothing.
    """
    files = [file for path in _listed(train) for file in images_below(path)]
    return any(Path(label).is_file() for label in img2label_paths(files))


def _places(place: str) -> list[str]:
    """Return what a data YAML names as its training images, any other place as it is."""
    path = Path(place)
    if path.suffix.lower() not in (".yaml", ".yml"):
        return [place]
    check_size(path)
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    train = data.get("train") if isinstance(data, dict) else None
    if not train or not all(isinstance(name, str) for name in _listed(train)):
        raise DataError(f"{place} names no images in train:.")
    root = Path(str(data.get("path") or path.parent))
    if not root.exists() and not root.is_absolute():
        root = DATASETS_DIR / root  # where Ultralytics looks
    return [str(root / name) for name in _listed(train)]


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value] if value else []


def _is_image(path: Path) -> bool:
    return path.suffix[1:].lower() in IMG_FORMATS


def _shape(file: str) -> tuple[int, int] | None:
    """Return an image's height and width as it is shown, None for what is no image."""
    try:
        with Image.open(file) as image:
            image.verify()
            width, height = exif_size(image)
    except Exception:  # every decoder raises what it likes
        return None
    return (height, width) if min(height, width) >= SMALLEST else None
