"""The repair of damaged images, which Ultralytics writes in place when it scans a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from ultralytics.data import utils

from yolo_kd.patches import replaced


@contextmanager
def repairs_written_to(folder: Path) -> Iterator[None]:
    """Write repaired images to another folder, for the duration, so that the data set does not change."""

    def write_elsewhere(file: str, write: Callable[[str], object]) -> None:
        write(str(folder / f"{uuid4().hex}{Path(file).suffix}"))

    with replaced(utils, "_replace_image", write_elsewhere):
        yield
