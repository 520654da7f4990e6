"""Keys of the unlabelled pool: images without labels that a training learns from besides the labelled ones."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from yolo_kd.errors import ConfigError, did_you_mean, listed

SOURCE_KEY = "unlabeled"
DISTILL, PSEUDO, BOTH = MODES = ("distill", "pseudo", "both")

UNLABELED_KEYS: dict[str, str] = {
    SOURCE_KEY: "images without labels: a folder, glob, .txt of paths, data YAML (its train), or a list of those",
    "unlabeled_ratio": "unlabelled images in a batch for each labelled one (1); 0 is a training without them",
    "unlabeled_mode": "distill (the terms act on them), pseudo (the task loss does, on the teacher's boxes) or both",
    "unlabeled_conf": "class probability above which a detection of the teacher there counts as an object (0.4)",
    "unlabeled_low": "detections between this and unlabeled_conf are neither object nor background (0.1)",
    "unlabeled_iou": "overlap above which two detections of a class are one (0.7)",
}


@dataclass(frozen=True)
class UnlabeledOptions:
    """What to do with images that nobody labelled.

    Attributes:
        source: Where they are: folders, globs, text files of paths, data YAMLs.
        ratio: Pool images in a batch for each labelled one, above 0.
        mode: `distill`, `pseudo` or `both`.
        conf: Class probability above which a detection of the teacher counts as an object.
        low: Lower end of the band, up to `conf`, in which it is neither object nor background.
        iou: Overlap above which two detections of one class are one.
    """

    source: tuple[str, ...]
    ratio: float = 1.0
    mode: str = DISTILL
    conf: float = 0.4
    low: float = 0.1
    iou: float = 0.7

    @classmethod
    def of(cls, keys: Mapping[str, Any]) -> UnlabeledOptions | None:
        """Read the keys of `UNLABELED_KEYS`; None without a pool, or with a ratio of 0.

        Raises:
            ConfigError: With one sentence for every value that is not allowed.
        """
        given = {k: keys[k] for k in UNLABELED_KEYS if keys.get(k) is not None}
        if problems := mistakes(given):
            raise ConfigError(problems)
        if SOURCE_KEY not in given or given.get("unlabeled_ratio", 1) == 0:
            return None
        source = _sources(given.pop(SOURCE_KEY))
        assert source is not None
        values: dict[str, Any] = {
            k.removeprefix("unlabeled_"): v if k == "unlabeled_mode" else float(v) for k, v in given.items()
        }
        return cls(source, **values)

    def to_keys(self) -> dict[str, Any]:
        """Return the mapping that `of` reads, of plain types."""
        values = {f"unlabeled_{k}": v for k, v in asdict(self).items() if k != "source"}
        return {SOURCE_KEY: list(self.source), **values}

    def describe(self, labelled: bool = True) -> str:
        """Return a sentence for the log about what pool images teach.

        Args:
            labelled: Whether there are labelled images as well.
        """
        certain = f"the teacher's detections above {self.conf:g} (overlap {self.iou:g})"
        if not self.labels:
            alone = (
                ""
                if labelled
                else " No image has a label, so there is no task loss: the teacher is all that is learnt."
            )
            return f"Pool images have no task loss; terms that read boxes take {certain}.{alone}"
        band = f"between {self.low:g} and {self.conf:g} they are neither object nor background"
        terms = "the terms act there as well" if self.distils else "the terms act on labelled images only"
        return f"On pool images the task loss takes {certain}, weighted by confidence; {band}; {terms}."

    @property
    def distils(self) -> bool:
        """Whether the recipe's terms act on pool images."""
        return self.mode in (DISTILL, BOTH)

    @property
    def labels(self) -> bool:
        """Whether the teacher's detections serve as labels for the task loss."""
        return self.mode in (PSEUDO, BOTH)


def resumed_unlabeled(known: UnlabeledOptions | None, asked: Mapping[str, Any]) -> UnlabeledOptions | None:
    """Return the pool of a run that goes on: as its checkpoint has it, at another place if the user names one.

    Args:
        known: The checkpoint's pool.
        asked: Keys of `UNLABELED_KEYS` that the user gave on resume.

    Raises:
        ConfigError: If they change what the pool teaches, or give one to a run that had none.
    """
    before = known.to_keys() if known else {}
    place = {SOURCE_KEY: asked[SOURCE_KEY]} if known and SOURCE_KEY in asked else {}
    now = UnlabeledOptions.of({**before, **place})
    if UnlabeledOptions.of({**before, **asked}) != now:
        changed = [key for key in asked if key not in place]
        hint = f" Only {SOURCE_KEY}= may name where the images are now." if known else ""
        raise ConfigError(
            f"{', '.join(changed)} cannot be changed on resume: the checkpoint knows the pool. Leave it out.{hint}"
        )
    return now


def mistakes(given: Mapping[str, Any]) -> list[str]:
    """Return a sentence for everything that is wrong with keys of `UNLABELED_KEYS`, none of them None."""
    problems = [text for key, value in given.items() if (text := mistake(key, value)) is not None]
    if given and SOURCE_KEY not in given:
        problems.append(
            f"{next(iter(given))} is given but no images: add {SOURCE_KEY}=<folder, glob, .txt or data YAML>, or leave "
            "it out."
        )
    low, conf = given.get("unlabeled_low", UnlabeledOptions.low), given.get("unlabeled_conf", UnlabeledOptions.conf)
    if not problems and low >= conf:
        problems.append(
            f"unlabeled_low={low:g} must lie below unlabeled_conf={conf:g}: between the two, a detection is neither "
            "object nor background."
        )
    return problems


def mistake(key: str, value: Any) -> str | None:
    """Return what is wrong with the value of one of `UNLABELED_KEYS`, None if nothing is."""
    if key == SOURCE_KEY:
        if _sources(value):
            return None
        return f"{key} must be a folder, a glob, a .txt of paths, a data YAML, or a list of those, received {value!r}."
    if key == "unlabeled_mode":
        return (
            None
            if value in MODES
            else f"{key} must be {listed(MODES)}, received {value!r}.{did_you_mean(value, MODES)}"
        )
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if key == "unlabeled_ratio":
        if number and value >= 0:
            return None
        return f"{key} must be a number of at least 0, the pool images for each labelled one, received {value!r}."
    if number and 0 < value < 1:
        return None
    return f"{key} must be a number between 0 and 1, received {value!r}."


def _sources(value: Any) -> tuple[str, ...] | None:
    """Return the places that a value names, None if it is no path and no list of paths."""
    entries = list(value) if isinstance(value, list | tuple) else [value]
    if not entries or not all(isinstance(e, str | os.PathLike) and os.fspath(e) for e in entries):
        return None
    return tuple(str(os.fspath(e)) for e in entries)
