"""Small random detectors of every family, built from Ultralytics' own model files made narrower."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from ultralytics.cfg import DEFAULT_CFG_DICT
from ultralytics.nn.tasks import DetectionModel, yaml_model_load

FAMILIES = ("yolov3", "yolov5n", "yolov6n", "yolov8n", "yolov9t", "yolov10n", "yolo11n", "yolo12n", "yolo26n")


def narrow_yaml(family: str, folder: Path, width: float = 0.125, nc: int = 3) -> Path:
    """Write a model file of that family, narrower than Ultralytics' smallest, and return its path."""
    config = yaml_model_load(f"{family}.yaml")
    config["nc"] = nc
    if "scales" in config:
        letter = config.get("scale") or family[-1]
        _, _, limit = config["scales"][letter]
        narrowest = 0.25 if family.startswith("yolo12") else width  # its attention blocks come in multiples of 32
        config["scales"] = {letter: [0.33, narrowest, limit]}
    elif "width_multiple" in config:
        config["depth_multiple"], config["width_multiple"] = 0.33, width
    for key in ("yaml_file", "scale"):
        config.pop(key, None)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{family}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def narrow_model(family: str, folder: Path, width: float = 0.125, nc: int = 3, seed: int = 0) -> DetectionModel:
    """Build a random detector of that family."""
    torch.manual_seed(seed)
    return DetectionModel(str(narrow_yaml(family, folder, width, nc)), nc=nc, verbose=False)


def make_sure(model: DetectionModel, spread: float = 40.0) -> DetectionModel:
    """Let a random detector find objects with probabilities from 0 to 1, where it would find none."""
    with torch.no_grad():
        for branches in (getattr(model.model[-1], name, []) or [] for name in ("cv3", "one2one_cv3")):
            for branch in branches:
                branch[-1].weight.mul_(spread)
                branch[-1].bias.fill_(-2.0)
    return model


def narrow_checkpoint(
    family: str,
    folder: Path,
    width: float = 0.125,
    nc: int = 3,
    seed: int = 0,
    names: dict[int, str] | None = None,
    file: str = "model.pt",
    sure: bool = False,
) -> Path:
    """Save a random detector of that family as Ultralytics saves a finished training."""
    model = narrow_model(family, folder, width, nc, seed)
    model = make_sure(model) if sure else model
    model.names = names or {0: "circle", 1: "square", 2: "triangle"}
    model.args = dict(DEFAULT_CFG_DICT)
    path = folder / file
    torch.save({"epoch": -1, "model": model.half(), "ema": None, "optimizer": None, "train_args": {}}, path)
    return path
