"""The drawn data set: the same for the same seed, labelled where it is drawn, readable by Ultralytics."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from tests.conftest import ROOT, load_script

make = load_script("make_shapes")


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.*")) if p.suffix != ".yaml"}


def labels(yaml_path: Path, split: str) -> list[list[list[float]]]:
    texts = [p.read_text() for p in sorted((yaml_path.parent / "labels" / split).glob("*.txt"))]
    return [[[float(v) for v in line.split()] for line in text.splitlines()] for text in texts]


def test_same_seed_same_set(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        make.make_shapes(tmp_path / name, train=4, val=2, test=1, imgsz=64, seed=seed)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert files(tmp_path / "a") != files(tmp_path / "c")


def test_an_image_does_not_depend_on_how_many_are_asked_for(tmp_path: Path) -> None:
    few, many = tmp_path / "few", tmp_path / "many"
    make.make_shapes(few, train=2, val=1, imgsz=64)
    make.make_shapes(many, train=5, val=3, imgsz=64)
    assert files(few).items() <= files(many).items()


def test_splits_differ(shapes: Path) -> None:
    images = [p.read_bytes() for p in (shapes.parent / "images").rglob("*.png")]
    assert len(images) == 32
    assert len(set(images)) == 32


def test_yaml_is_absolute_and_complete(shapes: Path) -> None:
    data = yaml.safe_load(shapes.read_text())
    assert Path(data["path"]).is_absolute()
    assert data["names"] == {0: "circle", 1: "square", 2: "triangle"}
    for split, count in (("train", 16), ("val", 8), ("test", 8)):
        assert len(list((Path(data["path"]) / data[split]).glob("*.png"))) == count


def test_yaml_survives_odd_folder_names(tmp_path: Path) -> None:
    folder = tmp_path / "it's: a #folder"
    path = make.make_shapes(folder, train=1, val=1, imgsz=64)
    assert yaml.safe_load(path.read_text())["path"] == folder.resolve().as_posix()


def test_no_test_split_unless_asked(tmp_path: Path) -> None:
    assert "test" not in yaml.safe_load(make.make_shapes(tmp_path, train=1, val=1, imgsz=64).read_text())


def test_a_smaller_set_leaves_nothing_of_a_larger_one(tmp_path: Path) -> None:
    make.make_shapes(tmp_path, train=4, val=1, imgsz=64)
    make.make_shapes(tmp_path, train=2, val=1, imgsz=64)
    assert len(list((tmp_path / "images" / "train").iterdir())) == 2
    assert len(list((tmp_path / "labels" / "train").iterdir())) == 2


def test_labels_are_inside_the_image_and_varied(tmp_path: Path) -> None:
    path = make.make_shapes(tmp_path, train=60, val=0, imgsz=96)
    images = labels(path, "train")
    rows = np.array([row for image in images for row in image])
    assert any(not image for image in images), "an image without objects is part of the set"
    assert set(rows[:, 0]) == {0, 1, 2}
    centre, size = rows[:, 1:3], rows[:, 3:]
    assert (size > 0).all()
    assert (centre - size / 2 > -1e-5).all()
    assert (centre + size / 2 < 1 + 1e-5).all()
    assert size.max() > 0.4
    assert size.min() < 0.1


@pytest.mark.parametrize("label", [0, 1, 2])
def test_a_box_fits_what_is_drawn(label: int) -> None:
    size = 128
    for seed in range(40):
        outline = make._outline(np.random.default_rng(seed), label, size)
        x, y, w, h = (v * size for v in make._box(outline, size))
        left, top, width, height = cv2.boundingRect(make._filled(outline, size))
        drawn = np.array([left, top, left + width, top + height])
        np.testing.assert_allclose([x - w / 2, y - h / 2, x + w / 2, y + h / 2], drawn, atol=1.6)


def test_wrong_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="imgsz must be at least 32, received 8"):
        make.make_shapes(tmp_path, imgsz=8)
    with pytest.raises(ValueError, match="val must be at least 0, received -1"):
        make.make_shapes(tmp_path, train=0, val=-1)


def test_command(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "make_shapes.py"), str(tmp_path), "--train", "1", "--val", "1"]
    done = subprocess.run([*command, "--imgsz", "64"], capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == (tmp_path / "data.yaml").resolve()
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    assert "circles, squares and triangles" in done.stdout
