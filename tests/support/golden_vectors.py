"""Numbers of published implementations, to compare ours with.

Trimmed copies live in `tests/golden/<method>/case_<k>.npz`, so that a fresh clone can run them. Where the full set lies
beside the repository (`../shared/golden`), every stored case is used.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

TRIMMED = Path(__file__).resolve().parents[1] / "golden"
FULL = Path(__file__).resolve().parents[3] / "shared" / "golden"


@dataclass(frozen=True)
class Golden:
    """One stored case: arrays by name, and the hyper-parameters that they were made with."""

    method: str
    case: str
    arrays: dict[str, np.ndarray]
    hyper: dict

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(np.array(self.arrays[name]))

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def state(self, prefix: str) -> dict[str, Tensor]:
        """Return the arrays whose name starts with `prefix`, without it: parameters of one module."""
        return {k.removeprefix(prefix): self[k] for k in self.arrays if k.startswith(prefix)}


def cases(method: str) -> list[Golden]:
    """Return every case of a method that is at hand; a trimmed copy and a full one count once."""
    found: dict[str, Golden] = {}
    for root in (FULL, TRIMMED):
        manifest = root / method / "manifest.json"
        if not manifest.exists():
            continue
        hyper = {k: v["hyper"] for k, v in json.loads(manifest.read_text())["cases"].items()}
        for file in sorted((root / method).glob("case_*.npz")):
            k = file.stem.removeprefix("case_")
            if k not in found:
                with np.load(file) as arrays:
                    found[k] = Golden(method, k, dict(arrays), hyper[k])
    return list(found.values())


def assert_gradient(ours: Tensor | None, golden: Tensor, tolerance: float = 1e-4) -> None:
    """Check a gradient to `tolerance` of its largest entry."""
    assert ours is not None
    assert ours.shape == golden.shape
    assert (ours - golden).abs().max() <= tolerance * golden.abs().max()
