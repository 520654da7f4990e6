"""Keys of the unlabeled images: images without labels that a training learns from besides the labeled ones."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic.dataclasses import dataclass
from typing_extensions import Self

from yolo_kd.config.groups import KeyGroup
from yolo_kd.config.plugins import split_names
from yolo_kd.config.validation import CONFIG, Number, Text, mistakes

SOURCE_KEY = "unlabeled"
DISTILL: Final = "distill"
PSEUDO: Final = "pseudo"
BOTH: Final = "both"
MODES = (DISTILL, PSEUDO, BOTH)

Share = Annotated[Number, Field(gt=0, lt=1)]


def _key(name: str) -> str:
    return SOURCE_KEY if name == "source" else f"unlabeled_{name}"


def _places(value: Any) -> Any:
    """Return one place, or `[a, b]` as a command line has it, as a tuple of texts; a single path may hold commas."""
    if isinstance(value, str) and value.startswith("["):
        value = [name.strip("'\"") for name in split_names(value)]
    entries = value if isinstance(value, list | tuple) else [value]
    return tuple(os.fspath(entry) if isinstance(entry, os.PathLike) else entry for entry in entries)


Places = Annotated[
    tuple[Text, ...],
    Field(min_length=1),
    BeforeValidator(_places),
    WithJsonSchema(
        {
            "title": "a folder, a glob, a .txt of paths, a data YAML, or a list of those",
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
            ],
        }
    ),
]


@dataclass(frozen=True, config=ConfigDict(**CONFIG, alias_generator=_key))
class UnlabeledOptions(KeyGroup):
    """How a training uses images without labels. The descriptions of the fields are their documentation."""

    source: Places = Field(
        description="Images without labels: a folder, glob, .txt of paths, data YAML (its train), or a list of those."
    )
    ratio: Annotated[Number, Field(ge=0)] = Field(
        default=1.0, description="Unlabeled images in a batch for each labeled one; 0 is a training without them."
    )
    mode: Literal["distill", "pseudo", "both"] = Field(
        default=DISTILL,
        description="What learns from them: distill (the terms), pseudo (the task loss, by the teacher's boxes), both.",
    )
    conf: Share = Field(
        default=0.4, description="Class probability above which a detection of the teacher there counts as an object."
    )
    low: Share = Field(
        default=0.1, description="Detections between this and unlabeled_conf count neither as object nor background."
    )
    iou: Share = Field(default=0.7, description="Overlap above which two detections of one class count as one.")

    @model_validator(mode="after")
    def _leaves_a_band(self) -> Self:
        if self.low >= self.conf:
            sentence = f"unlabeled_low={self.low:g} must lie below unlabeled_conf={self.conf:g}: between the two, a"
            raise mistakes([((_key("low"),), f"{sentence} detection is neither object nor background.")])
        return self

    @classmethod
    def of(cls, keys: Mapping[str, Any]) -> Self | None:  # type: ignore[override]
        """Read the keys of `UNLABELED_KEYS`; None without unlabeled images, or with a ratio of 0.

        Raises:
            ConfigError: With one sentence for every mistake.
        """
        if all(keys.get(key) is None for key in UNLABELED_KEYS):
            return None
        made = super().of(keys)
        return made if made.ratio else None

    def describe(self, labelled: bool = True) -> str:
        """Return a sentence for the log about what the unlabeled images teach.

        Args:
            labelled: Whether there are labeled images as well.
        """
        certain = f"the teacher's detections above {self.conf:g} (overlap {self.iou:g})"
        if not self.labels:
            alone = (
                "" if labelled else " No image has a label, so there is no task loss: only the teacher is learnt from."
            )
            return f"Unlabeled images have no task loss; terms that read boxes take {certain}.{alone}"
        band = f"between {self.low:g} and {self.conf:g} they are neither object nor background"
        terms = "the terms act there as well" if self.distils else "the terms act on labeled images only"
        return f"On unlabeled images the task loss takes {certain}, weighted by confidence; {band}; {terms}."

    @property
    def distils(self) -> bool:
        """Whether the recipe's terms act on unlabeled images."""
        return self.mode in (DISTILL, BOTH)

    @property
    def labels(self) -> bool:
        """Whether the teacher's detections serve as labels for the task loss."""
        return self.mode in (PSEUDO, BOTH)


UNLABELED_KEYS = UnlabeledOptions.documented()
