"""What groups of flat keys have in common: they are read from a mapping, written back, and listed with their help."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from typing_extensions import Self

from yolo_kd.config.source import Item, raise_if
from yolo_kd.config.validation import validate


class KeyGroup:
    """Base of the pydantic dataclasses whose fields are keys of a training."""

    __pydantic_fields__: Any

    @classmethod
    def documented(cls) -> dict[str, str]:
        """Return the keys with what each of them does."""
        fields = cls.__pydantic_fields__.items()
        return {field.alias or name: field.description for name, field in fields}

    @classmethod
    def of(cls, keys: Mapping[str, Any]) -> Self:
        """Return the group with the values of a mapping; other keys are ignored, and None stands for the default.

        Raises:
            ConfigError: With one sentence for every mistake.
        """
        problems: list[str] = []
        given = {key: Item(keys[key]) for key in cls.documented() if keys.get(key) is not None}
        made = validate(cls, Item(given), problems)
        raise_if(problems)
        assert made is not None
        return made

    def to_keys(self) -> dict[str, Any]:
        """Return the mapping that `of` reads, of plain types."""
        names = [field.alias or name for name, field in self.__pydantic_fields__.items()]
        plain = (list(value) if isinstance(value, tuple) else value for value in asdict(self).values())  # type: ignore[call-overload]
        return dict(zip(names, plain, strict=True))
