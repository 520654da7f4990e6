#!/usr/bin/env python3
"""Draw the weight masks of losses on one image of the demo's data set, for docs/losses.md.

make demo
python scripts/gallery.py --teacher runs/demo/teacher/weights/best.pt --data runs/demo/data --out docs/masks.svg
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from ultralytics.utils.ops import xywh2xyxy

from yolo_kd.distillation.teacher import Teacher
from yolo_kd.losses.fgd import focal_masks
from yolo_kd.losses.fgfi import FGFI
from yolo_kd.losses.objectness import objectness_weights
from yolo_kd.losses.sea import semantic_masks
from yolo_kd.safe_loading.checkpoint import load_detector
from yolo_kd.structures import LossInputs, PairSpec, Targets


def read(folder: Path) -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
    """Return the validation image with the most objects (RGB), its labels, and its boxes (xyxy, pixels)."""
    labels = max((folder / "labels" / "val").glob("*.txt"), key=lambda p: len(p.read_text().splitlines()))
    image = next(p for p in (folder / "images" / "val").iterdir() if p.stem == labels.stem)
    pixels = cv2.cvtColor(cv2.imread(str(image)), cv2.COLOR_BGR2RGB)
    rows = torch.tensor([[float(x) for x in line.split()] for line in labels.read_text().splitlines()])
    h, w = pixels.shape[:2]
    return pixels, rows[:, 0].long(), xywh2xyxy(rows[:, 1:]) * torch.tensor([w, h, w, h])


def main() -> None:
    """Draw five panels into one SVG file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True, help="checkpoint trained on the set")
    parser.add_argument("--data", type=Path, required=True, help="folder of the drawn set")
    parser.add_argument("--out", type=Path, default=Path("docs/masks.svg"))
    args = parser.parse_args()
    image, labels, boxes = read(args.data)
    size = (image.shape[0], image.shape[1])
    shape = (size[0] // 8, size[1] // 8)
    index = torch.zeros(len(boxes), dtype=torch.int64)
    detector = load_detector(args.teacher, role="teacher")
    pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[None].float() / 255
    outputs = Teacher(detector, torch.device("cpu"))(pixels)
    pair = PairSpec((1, 1, 1), (1, 1, 1), outputs.strides, len(detector.model.names), 16, 16)
    fgfi = FGFI()
    fgfi.build(pair)
    step = LossInputs(outputs, outputs, Targets(boxes, labels, index, size, 1))
    sea = semantic_masks(boxes, torch.zeros_like(labels), index, 1, 1, shape, 8, 0.5)[0].float()
    kept = objectness_weights(outputs.scores, outputs.objectness, outputs.shapes, True)
    panels = {
        "image and boxes": None,
        "fgd: foreground weight": focal_masks(boxes, index, 1, size, shape)[0][0],
        "fgfi: imitated cells": fgfi._masks(step)[0][0].squeeze().float(),
        "sea: background, edge, centre": sea[0] * 2 + sea[1],
        "objectness of the teacher": outputs.per_level(outputs.objectness)[0].view(shape),
        "objectness after feature-map NMS": outputs.per_level(kept)[0].view(shape),
    }
    figure, axes = plt.subplots(2, 3, figsize=(9, 6.2), dpi=80)
    for axis, (title, mask) in zip(axes.flat, panels.items(), strict=True):
        axis.set_xlim(0, size[1])
        axis.set_ylim(size[0], 0)
        axis.set_aspect("equal")
        if mask is None:  # once, since a picture in an SVG file is large
            axis.imshow(image, extent=(0, size[1], size[0], 0))
            axis.set_aspect("equal")
        else:
            grid = np.ma.masked_equal(mask.numpy(), 0)
            axis.pcolormesh(
                np.arange(shape[1] + 1) * 8, np.arange(shape[0] + 1) * 8, grid, cmap="viridis", rasterized=True
            )
        for x1, y1, x2, y2 in boxes.tolist():
            axis.add_patch(plt.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor="black", linewidth=0.8))
        axis.set_title(title, fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
    figure.tight_layout()
    figure.savefig(args.out, dpi=80)
    # one newline at the end and no trailing spaces, as in every text file
    args.out.write_text("\n".join(line.rstrip() for line in args.out.read_text().splitlines()) + "\n")


if __name__ == "__main__":
    main()
