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


def make_sure(model: DetectionModel) -> DetectionModel:
    """Let a random detector find objects with probabilities from 0 to 1, where it would find none.

    Its normalisation layers take the statistics of noise, its logits get a spread of 1 around -1 there,
    and its boxes reach a stride or two from their points.
    """
    noise = torch.rand(4, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.momentum = 1.0
        model.train()(noise)
        for norm in norms:
            norm.momentum = 0.03
        raw = model.eval()(noise)[1]
        features = raw.get("one2many", raw)["feats"]
        for branches in (getattr(model.model[-1], name, None) or [] for name in ("cv3", "one2one_cv3")):
            for branch, feature in zip(branches, features, strict=False):  # only end-to-end heads have the second
                logits = branch(feature)
                scale, mean = 1 / logits.std((0, 2, 3)), logits.mean((0, 2, 3))
                branch[-1].weight.mul_(scale[:, None, None, None])
                branch[-1].bias.copy_((branch[-1].bias - mean) * scale - 1)
        bins = model.model[-1].reg_max
        for branches in (getattr(model.model[-1], name, None) or [] for name in ("cv2", "one2one_cv2")):
            for branch in branches:
                branch[-1].weight.mul_(0.1)
                branch[-1].bias.copy_(1.5 if bins == 1 else -1.0 * torch.arange(bins).repeat(4))
    return model.train()


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
