"""Unlabeled images: where they are found, which are readable, and that they are not the validation images."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from yolo_kd.errors import DataError
from yolo_kd.unlabeled.images import check_apart, find_images, has_labels, readable_images


def draw(path: Path, value: int = 0, size: tuple[int, int] = (20, 12)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size[1], size[0], 3), value, np.uint8)).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, name in enumerate(("a.png", "deep/er/b.png", "deep/c [1].PNG")):
        draw(tmp_path / "pool" / name, i)
    (tmp_path / "pool" / "notes.txt").write_text("no image")
    return tmp_path


def names(places: list[Path | str]) -> list[str]:
    return [Path(file).name for file in find_images([str(p) for p in places])]


def test_every_kind_of_place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = folder / "pool"
    everything = ["a.png", "c [1].PNG", "b.png"]
    assert names([pool]) == everything
    assert names([f"{pool}/**/*"]) == everything
    assert names([f"{pool}/*.png"]) == ["a.png"]
    assert names([pool / "deep" / "c [1].PNG"]) == ["c [1].PNG"]
    assert names([pool, f"{pool}/*.png", pool / "a.png"]) == everything, "each once"
    (folder / "list.txt").write_text("./pool/a.png\n\n" + str(pool / "deep/er/b.png") + "\n")
    assert names([folder / "list.txt"]) == ["a.png", "b.png"]
    (folder / "data.yaml").write_text(f"path: {folder}\ntrain: [pool/deep, pool/a.png]\nval: nowhere\nnames: [x]\n")
    assert names([folder / "data.yaml"]) == everything
    (folder / "data.yaml").write_text("train: pool\n")
    assert names([folder / "data.yaml"]) == everything
    (folder / "here.txt").write_text("pool/a.png\n")
    monkeypatch.chdir(folder)
    assert names(["here.txt"]) == ["a.png"], "a relative path is relative to the current folder, as in Ultralytics"


def test_unreadable_images_are_left_out_with_one_warning(folder: Path) -> None:
    for i in range(4):
        (folder / "pool" / f"bad{i}.jpg").write_bytes(b"\x89PNG" * i)
    draw(folder / "pool" / "tiny.png", size=(9, 30))
    before = sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*"))
    warnings: list[str] = []
    images = readable_images(find_images([str(folder / "pool")]), "pool", warnings.append)
    assert [Path(f).name for f in images.files] == ["a.png", "c [1].PNG", "b.png"]
    assert images.shapes == ((12, 20),) * 3
    assert warnings == [
        "5 of 8 images of unlabeled=pool cannot be opened: bad0.jpg, bad1.jpg, bad2.jpg, .... Left out."
    ]
    assert sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*")) == before, "nothing is written beside them"


def test_shapes_are_those_that_are_shown(tmp_path: Path) -> None:
    image = Image.fromarray(np.zeros((12, 20, 3), np.uint8))
    exif = image.getexif()
    exif[274] = 6  # turned by a quarter
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert readable_images([str(tmp_path / "turned.jpg")], "x").shapes == ((20, 12),)


def test_a_truncated_jpeg_stays_as_it_is(tmp_path: Path) -> None:
    """Ultralytics would repair it in place."""
    file = tmp_path / "cut.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(file)
    data = file.read_bytes()[:-20]
    file.write_bytes(data)
    assert readable_images([str(file)], "x").files == (str(file),)
    assert file.read_bytes() == data


def test_the_validation_images_are_refused(folder: Path) -> None:
    pool = readable_images(find_images([str(folder / "pool")]), "pool")
    shutil.copytree(folder / "pool", folder / "val")
    warnings: list[str] = []
    with pytest.raises(DataError, match=r"unlabeled=pool are the validation images, all 3 of them"):
        check_apart(pool, str(folder / "val"), "pool", warnings.append)
    draw(folder / "val" / "a.png", 200)  # the same size on disk, perhaps, and another content
    check_apart(pool, [str(folder / "val")], "pool", warnings.append)
    assert warnings == [
        "2 of 3 images of unlabeled=pool are validation images as well, such as c [1].PNG: results will look better "
        "than they are."
    ]
    shutil.rmtree(folder / "val")
    draw(folder / "val" / "other.png", 99)
    check_apart(pool, str(folder / "val"), "pool", warnings.append)
    assert len(warnings) == 1


def test_labels_are_looked_for_where_ultralytics_does(tmp_path: Path) -> None:
    draw(tmp_path / "images" / "a.png")
    assert not has_labels(None)
    assert not has_labels(str(tmp_path / "images"))
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a.txt").write_text("")
    assert has_labels([str(tmp_path / "images")])
