#!/usr/bin/env python3
"""Fetch a public data set of the results and convert it to YOLO format.

    python scripts/get_data.py bccd runs/data/bccd                      downloads the archive (8 MB)
    python scripts/get_data.py raccoon runs/data/raccoon --source path  converts a clone, a folder or a zip file

    bccd      blood cells, 3 classes, 205 train, 87 val and 72 test images (github.com/Shenggan/BCCD_Dataset, MIT)
    raccoon   1 class, 160 train and 40 val images (github.com/datitran/raccoon_dataset, MIT)

The source must have the layout of the original repository:

    bccd      BCCD/Annotations/*.xml, BCCD/JPEGImages/*.jpg, BCCD/ImageSets/Main/{train,val,test}.txt
    raccoon   annotations/*.xml, images/*.jpg, data/{train,test}_labels.csv

The result holds images/<split>, labels/<split> and data.yaml. Boxes without area are left out.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import sys
import tempfile
import urllib.request
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple


class Source(NamedTuple):
    """Where a data set is published and how its files are laid out, relative to the repository's root."""

    url: str
    names: tuple[str, ...]
    annotations: str
    images: str
    splits: dict[str, str]


SOURCES = {
    "bccd": Source(
        url="https://github.com/Shenggan/BCCD_Dataset/archive/d272fb14.zip",
        names=("RBC", "WBC", "Platelets"),
        annotations="BCCD/Annotations",
        images="BCCD/JPEGImages",
        splits={split: f"BCCD/ImageSets/Main/{split}.txt" for split in ("train", "val", "test")},
    ),
    "raccoon": Source(
        url="https://github.com/datitran/raccoon_dataset/archive/93938849.zip",
        names=("raccoon",),
        annotations="annotations",
        images="images",
        splits={"train": "data/train_labels.csv", "val": "data/test_labels.csv"},
    ),
}


class LayoutError(Exception):
    """The source lacks a file of the documented layout."""


def convert(source: Source, root: Path, out: Path) -> dict[str, int]:
    """Write a data set in YOLO format.

    Args:
        source: Layout of the original repository.
        root: Root of a copy of it.
        out: Folder to write; it is made if missing.

    Returns:
        Number of images of each split.

    Raises:
        LayoutError: If `root` lacks a file of the layout, or an annotation names an unknown class.
    """
    counts = {}
    for split, listing in source.splits.items():
        images, labels = out / "images" / split, out / "labels" / split
        images.mkdir(parents=True, exist_ok=True)
        labels.mkdir(parents=True, exist_ok=True)
        stems = stems_of(needed(root / listing))
        for stem in stems:
            image = needed(root / source.images / f"{stem}.jpg")
            rows = boxes(needed(root / source.annotations / f"{stem}.xml"), source.names)
            shutil.copyfile(image, images / image.name)
            (labels / f"{stem}.txt").write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
        counts[split] = len(stems)
    # without `path`, the folder can be copied and moved
    lines = [*(f"{split}: images/{split}" for split in source.splits), "names:"]
    lines += [f"  {index}: {name}" for index, name in enumerate(source.names)]
    (out / "data.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return counts


def needed(path: Path) -> Path:
    """Return a path of the source that exists.

    Raises:
        LayoutError: If it does not.
    """
    if not path.exists():
        raise LayoutError(f"the source has no {path}; --help shows the layout it needs")
    return path


def stems_of(listing: Path) -> list[str]:
    """Return the sorted image stems of a split: a text file with one per line, or a CSV with a column `filename`."""
    with open(listing, encoding="utf-8", newline="") as file:
        if listing.suffix == ".csv":
            return sorted({Path(row["filename"]).stem for row in csv.DictReader(file)})
        return sorted({line.strip() for line in file if line.strip()})


def boxes(annotation: Path, names: Sequence[str]) -> Iterator[str]:
    """Yield one YOLO label row per box of a Pascal VOC file: class, centre, width and height, relative to the image.

    Raises:
        LayoutError: If the file names a class that is not one of `names`.
    """
    root = ElementTree.parse(annotation).getroot()
    width, height = (float(root.findtext(f"size/{key}", "0")) for key in ("width", "height"))
    for found in root.iter("object"):
        name = found.findtext("name", "")
        if name not in names:
            raise LayoutError(f"{annotation} names class '{name}'; known classes: {', '.join(names)}")
        x1, y1, x2, y2 = (float(found.findtext(f"bndbox/{key}", "0")) for key in ("xmin", "ymin", "xmax", "ymax"))
        x1, x2 = (min(max(x, 0.0), width) for x in (x1, x2))
        y1, y2 = (min(max(y, 0.0), height) for y in (y1, y2))
        if x2 > x1 and y2 > y1:
            box = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
            yield " ".join([str(names.index(name)), *(f"{value:.6f}" for value in box)])


@contextmanager
def opened(place: str, marker: str) -> Iterator[Path]:
    """Yield the root of a source: a folder as it is, a zip file unpacked, a URL downloaded and unpacked.

    Args:
        place: Folder, zip file, or http(s) address of a zip file.
        marker: A path that the root has; it is searched at the top and one folder below.

    Raises:
        LayoutError: If no root with that path is found.
    """
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(place)
        if place.startswith(("http://", "https://")):
            print(f"Downloading {place}")
            path = Path(scratch) / "archive.zip"
            with urllib.request.urlopen(place, timeout=60) as answer, open(path, "wb") as file:
                shutil.copyfileobj(answer, file)
        if path.is_file():
            with zipfile.ZipFile(path) as archive:  # its extractall keeps every file inside the folder
                archive.extractall(Path(scratch) / "unpacked")
            path = Path(scratch) / "unpacked"
        roots = [path, *(sorted(p for p in path.iterdir() if p.is_dir()) if path.is_dir() else [])]
        root = next((r for r in roots if (r / marker).exists()), None)
        if root is None:
            raise LayoutError(f"{place} has no {marker}; --help shows the layout it needs")
        yield root


def main(argv: Sequence[str] | None = None) -> int:
    """Fetch and convert one data set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(SOURCES), help="data set")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--source", help="folder, zip file or address of a zip file instead of the published archive")
    args = parser.parse_args(argv)
    source = SOURCES[args.name]
    try:
        with opened(args.source or source.url, source.annotations) as root:
            counts = convert(source, root, args.out)
    except (LayoutError, OSError, zipfile.BadZipFile, ElementTree.ParseError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    sizes = ", ".join(f"{count} {split}" for split, count in counts.items())
    print(f"{args.out / 'data.yaml'}: {sizes} images")
    return 0


if __name__ == "__main__":
    sys.exit(main())
