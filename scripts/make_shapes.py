#!/usr/bin/env python3
"""Draw a small detection data set: circles, squares and triangles on noisy backgrounds.

It needs no download and is the same for the same seed, so a demonstration or a test can train on it anywhere. It is
made hard on purpose: shapes go from a few pixels to half the image, overlap, vary in colour, texture and contrast, and
stand among things that are none of the three classes. A small detector trained for a few epochs stays well below a
perfect score, and a larger one does better.

    python scripts/make_shapes.py runs/shapes --train 400 --val 120 --imgsz 320
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

NAMES = ("circle", "square", "triangle")
Image = NDArray[np.uint8]
Mask = NDArray[np.uint8]

MIN_VISIBLE = 0.35
"""Part of an object that must stay uncovered for it to be labelled; what is covered more is not drawn at all."""


def make_shapes(
    folder: str | Path,
    train: int = 400,
    val: int = 120,
    test: int = 0,
    imgsz: int = 320,
    seed: int = 0,
) -> Path:
    """Write images, labels and `data.yaml` and return the path of the latter.

    Every image draws from a random stream of its own, so its content depends on the seed, its split and its number,
    not on how many images were asked for.

    Args:
        folder: Where to write; it is made if missing, and files of the same name are replaced.
        train: Number of training images.
        val: Number of validation images.
        test: Number of test images; with 0 there is no test split.
        imgsz: Height and width of the images in pixels, at least 32.
        seed: Which set to draw.

    Returns:
        Absolute path of `data.yaml`, which holds absolute paths itself.
    """
    if imgsz < 32:
        raise ValueError(f"imgsz must be at least 32, received {imgsz}")
    root = Path(folder).resolve()
    lines = [f"path: {_quoted(root)}"]
    for split_index, (split, count) in enumerate((("train", train), ("val", val), ("test", test))):
        if count < 0:
            raise ValueError(f"{split} must be at least 0, received {count}")
        if not count:
            continue
        lines.append(f"{split}: images/{split}")
        images, labels = root / "images" / split, root / "labels" / split
        images.mkdir(parents=True, exist_ok=True)
        labels.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            image, rows = draw_image(np.random.default_rng((seed, split_index, number)), imgsz)
            # PNG, because the bytes of a JPEG depend on the build of the library that wrote it.
            if not cv2.imwrite(str(images / f"{number:05d}.png"), image):
                raise OSError(f"{images / f'{number:05d}.png'} could not be written")
            text = "".join(f"{label} {x:.6f} {y:.6f} {w:.6f} {h:.6f}\n" for label, x, y, w, h in rows)
            (labels / f"{number:05d}.txt").write_text(text)
        # What an earlier, larger set left in this folder would be trained on as well.
        for stale in images.glob("?????.png"):
            if stale.stem.isdecimal() and int(stale.stem) >= count:
                stale.unlink()
                (labels / f"{stale.stem}.txt").unlink(missing_ok=True)
        # A stale cache of an earlier set in this folder would be read instead of the new labels.
        labels.with_suffix(".cache").unlink(missing_ok=True)
    lines += ["names:", *(f"  {i}: {name}" for i, name in enumerate(NAMES))]
    yaml = root / "data.yaml"
    yaml.parent.mkdir(parents=True, exist_ok=True)
    yaml.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return yaml


def draw_image(rng: np.random.Generator, imgsz: int) -> tuple[Image, list[tuple[int, float, float, float, float]]]:
    """Draw one image.

    Args:
        rng: Source of every random choice.
        imgsz: Height and width in pixels.

    Returns:
        The image, BGR, and its labels: class, centre x, centre y, width, height, all but the class in [0, 1].
    """
    image = _texture(rng, imgsz, rng.integers(40, 216, 3), contrast=float(rng.uniform(15, 45)))
    for _ in range(int(rng.integers(3, 10))):
        _draw_distractor(rng, image)
    # About one image in fifteen has no object, so that training meets a batch without boxes.
    wanted = 0 if rng.random() < 0.07 else int(rng.integers(1, 8))
    free = np.full((imgsz, imgsz), 255, np.uint8)
    rows = []
    for _ in range(wanted):
        label = int(rng.integers(len(NAMES)))
        outline = _outline(rng, label, imgsz)
        mask = _filled(outline, imgsz)
        # Shapes are drawn from the top down: a new one lies behind those that are there already.
        visible = cv2.bitwise_and(mask, free)
        area = int(np.count_nonzero(mask))
        if area < 12 or np.count_nonzero(visible) < MIN_VISIBLE * area:
            continue
        _paint(rng, image, visible)
        free[mask > 0] = 0
        rows.append((label, *_box(outline, imgsz)))
    image = _degrade(rng, image)
    return image, rows


def _quoted(path: Path) -> str:
    """Return a path as a YAML string that survives spaces, colons and quotes."""
    return "'" + path.as_posix().replace("'", "''") + "'"


def _texture(rng: np.random.Generator, size: int, colour: NDArray, contrast: float) -> Image:
    """Return a square of cloudy noise around one colour: random values at three scales, summed."""
    clouds = np.zeros((size, size, 3), np.float32)
    for cells, part in ((4, 1.0), (16, 0.6), (48, 0.35)):
        cells = min(cells, size)
        noise = rng.standard_normal((cells, cells, 3)).astype(np.float32)
        noise = 0.4 * noise + 0.6 * noise[..., :1]
        clouds += part * cv2.resize(noise, (size, size), interpolation=cv2.INTER_CUBIC)
    return np.clip(colour.astype(np.float32) + contrast * clouds, 0, 255).astype(np.uint8)


def _outline(rng: np.random.Generator, label: int, imgsz: int) -> NDArray[np.float32]:
    """Return the corner points of one shape, (N, 2), whose centre lies inside the image."""
    # Sizes are drawn on a logarithmic scale, so that small objects are as common as large ones.
    radius = imgsz * float(np.exp(rng.uniform(np.log(0.025), np.log(0.25))))
    corners, stretch = {0: (64, 0.15), 1: (4, 0.0), 2: (3, 0.25)}[label]
    if label == 1:
        radius *= float(np.sqrt(np.pi / 2))  # a square of the circle's area
    angle = rng.uniform(0, 2 * np.pi) + np.arange(corners) * 2 * np.pi / corners
    points = np.stack([np.cos(angle), np.sin(angle)], 1) * max(radius, 3.0)
    points[:, int(rng.integers(2))] *= 1 - rng.uniform(0, stretch) if stretch else 1.0
    centre = rng.uniform(0.04, 0.96, 2) * imgsz
    return (points + centre).astype(np.float32)


def _filled(outline: NDArray[np.float32], imgsz: int) -> Mask:
    mask = np.zeros((imgsz, imgsz), np.uint8)
    # Four fractional bits: without them a small shape would snap to whole pixels and its box would be off. OpenCV's
    # coordinates are those of pixel centres, the outline's those of pixel edges: half a pixel apart.
    cv2.fillPoly(mask, [np.round((outline - 0.5) * 16).astype(np.int32)], 255, lineType=cv2.LINE_8, shift=4)
    return mask


def _box(outline: NDArray[np.float32], imgsz: int) -> tuple[float, float, float, float]:
    """Return centre, width and height of the part of an outline inside the image, as fractions of the image."""
    left, top = np.clip(outline.min(0) / imgsz, 0, 1)
    right, bottom = np.clip(outline.max(0) / imgsz, 0, 1)
    return float(left + right) / 2, float(top + bottom) / 2, float(right - left), float(bottom - top)


def _paint(rng: np.random.Generator, image: Image, mask: Mask) -> None:
    """Fill the masked pixels with a colour that may be close to what is there, and sometimes with stripes or a rim."""
    size = image.shape[0]
    left, top, width, height = cv2.boundingRect(mask)
    image, mask = image[top : top + height, left : left + width], mask[top : top + height, left : left + width]
    behind = np.array(cv2.mean(image, mask)[:3])
    direction = rng.standard_normal(3)
    direction /= np.linalg.norm(direction) + 1e-6
    colour = np.clip(behind + direction * rng.uniform(35, 160), 0, 255)
    fill = _texture(rng, max(width, height), colour, contrast=float(rng.uniform(4, 22)))[:height, :width]
    style = rng.random()
    if style < 0.25:
        period, slope = float(rng.uniform(0.02, 0.06)) * size, float(rng.uniform(0, np.pi))
        y, x = np.mgrid[:height, :width]
        stripes = np.sin(2 * np.pi * (x * np.cos(slope) + y * np.sin(slope)) / period) > 0.2
        fill[stripes] = np.clip(fill[stripes].astype(np.float32) * float(rng.uniform(0.5, 0.8)), 0, 255)
    opacity = 1.0 if rng.random() < 0.75 else float(rng.uniform(0.55, 0.9))
    inside = mask > 0
    image[inside] = (opacity * fill[inside] + (1 - opacity) * image[inside]).astype(np.uint8)
    if style > 0.8:
        rim, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        drawn = np.ascontiguousarray(image)
        cv2.drawContours(drawn, rim, -1, rng.integers(0, 256, 3).tolist(), max(1, size // 160))
        image[:] = drawn


def _draw_distractor(rng: np.random.Generator, image: Image) -> None:
    """Draw something that belongs to no class: a line, a bent stroke, a cross, an open ring or a star."""
    size = image.shape[0]
    colour = np.clip(image.mean((0, 1)) + rng.uniform(-110, 110, 3), 0, 255).tolist()
    x, y = (rng.uniform(0, 1, 2) * size).astype(int).tolist()
    reach = max(3, int(size * np.exp(rng.uniform(np.log(0.02), np.log(0.2)))))
    thick = max(1, int(size * rng.uniform(0.004, 0.012)))
    kind = int(rng.integers(5))
    if kind == 0:
        end = (rng.uniform(0, 1, 2) * size).astype(int).tolist()
        cv2.line(image, (x, y), end, colour, thick, cv2.LINE_AA)
    elif kind == 1:
        points = (np.array([x, y]) + rng.normal(0, reach, (4, 2))).astype(np.int32)
        cv2.polylines(image, [points], False, colour, thick, cv2.LINE_AA)
    elif kind == 2:
        turn = rng.uniform(0, np.pi)
        for angle in (turn, turn + np.pi / 2):
            step = reach * np.array([np.cos(angle), np.sin(angle)])
            start, end = (np.array([x, y]) - step).astype(int), (np.array([x, y]) + step).astype(int)
            cv2.line(image, start.tolist(), end.tolist(), colour, thick * 2, cv2.LINE_AA)
    elif kind == 3:
        turn = float(rng.uniform(0, 360))
        cv2.ellipse(image, (x, y), (reach, reach), turn, 0, float(rng.uniform(120, 260)), colour, thick, cv2.LINE_AA)
    else:
        angle = rng.uniform(0, 2 * np.pi) + np.arange(10) * np.pi / 5
        radius = np.where(np.arange(10) % 2, 0.42, 1.0) * reach
        points = np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle)], 1).astype(np.int32)
        cv2.fillPoly(image, [points], colour, cv2.LINE_AA)


def _degrade(rng: np.random.Generator, image: Image) -> Image:
    """Blur a little, add sensor noise and change the exposure, as a camera would."""
    blur = float(rng.uniform(0, 1.1)) * image.shape[0] / 320
    if blur > 0.25:
        image = np.asarray(cv2.GaussianBlur(image, (0, 0), blur), np.uint8)
    noisy = image + rng.normal(0, rng.uniform(3, 14), image.shape)
    return np.clip(noisy * rng.uniform(0.75, 1.2), 0, 255).astype(np.uint8)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and write the set."""
    summary = (__doc__ or "").split("\n\n")[0]
    parser = argparse.ArgumentParser(description=summary, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write images, labels and data.yaml")
    parser.add_argument("--train", type=int, default=400, help="number of training images")
    parser.add_argument("--val", type=int, default=120, help="number of validation images")
    parser.add_argument("--test", type=int, default=0, help="number of test images")
    parser.add_argument("--imgsz", type=int, default=320, help="height and width of the images in pixels")
    parser.add_argument("--seed", type=int, default=0, help="which set to draw")
    given = parser.parse_args(arguments)
    print(make_shapes(given.folder, given.train, given.val, given.test, given.imgsz, given.seed))


if __name__ == "__main__":
    main()
