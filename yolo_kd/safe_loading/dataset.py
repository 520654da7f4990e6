"""Safe reading of data sets: a data YAML can hold a script, and the label cache of its images is a pickle.

Ultralytics runs the script of a data YAML (`download:`) when images are missing, and unpickles `labels.cache` without
restriction. Inside `restricted_data` it does neither.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from ultralytics.data import dataset as ultralytics_dataset
from ultralytics.data import utils as ultralytics_data
from ultralytics.nn import tasks
from ultralytics.utils import DATASETS_DIR, LOGGER, ROOT, YAML

from yolo_kd.errors import DataError
from yolo_kd.patches import replaced

MAX_BYTES = 4 << 20
MAX_DEPTH = 50
MAX_NODES = 200_000  # with every alias written out; a thousand class names need two thousand
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".xz", ".bz2", ".txz", ".tbz2")

_CACHE_NAMES = frozenset(
    {
        *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        *((m, c) for m in ("pathlib", "pathlib._local") for c in ("PosixPath", "WindowsPath", "PurePosixPath")),
    }
)
_UNRESTRICTED = ultralytics_dataset.load_dataset_cache_file
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@contextmanager
def restricted_data() -> Iterator[list[str]]:
    """Make Ultralytics read data sets without running code from them, for the duration.

    Yields:
        A list that receives a sentence for every script that was left out.
    """
    left_out: list[str] = []

    class GuardedYAML(YAML):
        _instance = None

        @classmethod
        def load(cls, file: Any = "data.yaml", append_filename: bool = False) -> dict[str, Any]:
            if Path(file).suffix.lower() not in (".yaml", ".yml"):
                raise DataError(f"{file} is no YAML file")
            check_size(file)
            data: dict[str, Any] = super().load(file, append_filename=append_filename)
            if _is_script(data.get("download")) and not _is_shipped(file):
                data["download"] = None
                left_out.append(
                    f"{file} wants to run a script to fetch its images ('download:'), which yolo-kd never does. Read "
                    'it, fetch the images yourself, or let Ultralytics run it: python -c "from ultralytics.data.utils '
                    f"import check_det_dataset as c; c('{file}')\""
                )
            return data

    with ExitStack() as stack:
        stack.enter_context(replaced(ultralytics_data, "YAML", GuardedYAML))
        stack.enter_context(replaced(tasks, "YAML", GuardedYAML))  # the aliases of a model YAML can multiply as well
        if ultralytics_dataset.load_dataset_cache_file in (_UNRESTRICTED, read_label_cache):
            # otherwise a check reads no cache file at all, and its function stays
            stack.enter_context(replaced(ultralytics_dataset, "load_dataset_cache_file", read_label_cache))
        yield left_out


@contextmanager
def optional_train() -> Iterator[None]:
    """Let Ultralytics read data YAMLs without training images, for the duration; their `train` is then None."""
    reader = ultralytics_data.YAML  # not the original: it may be restricted

    class Lenient(reader):  # type: ignore[misc, valid-type]
        _instance = None

        @classmethod
        def load(cls, file: Any = "data.yaml", append_filename: bool = False) -> dict[str, Any]:
            return {"train": None, **super().load(file, append_filename=append_filename)}

    with replaced(ultralytics_data, "YAML", Lenient):
        yield


def is_local_yaml(data: str) -> bool:
    """Return whether a data set is a YAML file on this machine, or one that Ultralytics ships."""
    if "://" in data or ":/" in data or not data.lower().endswith((".yaml", ".yml")):
        return False
    return Path(data).is_file() or len(Path(data).parts) == 1


def places_of(file: str | Path, split: str) -> list[str]:
    """Return the paths that a data YAML names for a split, without Ultralytics' check, which may download.

    Args:
        file: The data YAML.
        split: train or val.

    Raises:
        DataError: If the file cannot be read or names no images for the split.
    """
    check_size(file)
    try:
        data = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{file} cannot be read as a data YAML: {error}") from error
    data = data if isinstance(data, dict) else {}
    named = data.get(split) or (data.get("validation") if split == "val" else None)
    if not named:
        raise DataError(f"{file} names no images in {split}:.")
    names = named if isinstance(named, list) else [named]
    if not all(isinstance(text, str) for text in (data.get("path") or "", *names)):
        raise DataError(f"{file}: 'path' and '{split}' must be text.")
    root = Path(data.get("path") or Path(file).parent)
    roots = (root, DATASETS_DIR / root, Path(file).parent / root)  # Ultralytics looks in the first two
    root = next((place for place in roots if place.exists()), root)
    return [str(root / name) for name in names]


def check_size(file: str | os.PathLike[str]) -> None:
    """Check that a YAML file stays small when it is read: no multiplying aliases, no deep nesting.

    Raises:
        DataError: If it grows, is no file, or is not YAML.
    """
    if not os.path.isfile(file):
        raise DataError(f"{file} is not a file")
    with open(file, "rb") as stream:
        data = stream.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise DataError(f"{file} is larger than {MAX_BYTES >> 20} MB, which no data YAML is")
    anchors: dict[str, int] = {}
    open_ones: list[tuple[int, str | None]] = [(0, None)]  # number of nodes and anchor of each open collection
    try:
        for event in yaml.parse(data.decode("utf-8", errors="ignore"), Loader=_LOADER):
            nodes, anchor = 0, getattr(event, "anchor", None)
            if isinstance(event, yaml.CollectionStartEvent):
                open_ones.append((1, anchor))
            elif isinstance(event, yaml.CollectionEndEvent):
                nodes, anchor = open_ones.pop()
            elif isinstance(event, yaml.AliasEvent):
                nodes, anchor = anchors.get(str(event.anchor), 1), None
            elif isinstance(event, yaml.ScalarEvent):
                nodes = 1
            if anchor is not None and not isinstance(event, yaml.CollectionStartEvent):
                anchors[anchor] = nodes
            outer, name = open_ones[-1]
            open_ones[-1] = outer + nodes, name
            if open_ones[-1][0] > MAX_NODES:
                raise DataError(f"{file} has aliases that multiply to more than {MAX_NODES:,} values")
            if len(open_ones) > MAX_DEPTH:
                raise DataError(f"{file} is nested more than {MAX_DEPTH} deep")
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark is not None else ""
        reason = getattr(error, "problem", None) or str(error)
        raise DataError(f"{file} is not valid YAML ({where}{reason})") from error


def _is_script(download: Any) -> bool:
    """Return whether Ultralytics would run the value of `download:` as code instead of fetching an archive."""
    if not download:
        return False
    text = str(download).lower()
    return not (isinstance(download, str) and text.startswith("http") and text.split("?")[0].endswith(ARCHIVES))


def _is_shipped(file: Any) -> bool:
    """Return whether a data YAML is part of the installed Ultralytics, whose scripts are trusted like its code."""
    return (ROOT / "cfg" / "datasets").resolve() in Path(file).resolve().parents


class _CacheUnpickler(pickle.Unpickler):
    """An unpickler of arrays and paths, the only objects in a label cache."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _CACHE_NAMES:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


def read_label_cache(path: Path) -> dict[str, Any]:
    """Read a label cache. If it fails, Ultralytics reads the label files and writes another cache.

    Args:
        path: A `.cache` file: a NumPy file of one dictionary.

    Raises:
        pickle.UnpicklingError: If the file asks for more than arrays, paths and plain values.
    """
    data = Path(path).read_bytes()
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(stream)
    if shape != () or dtype != np.dtype(object):
        raise pickle.UnpicklingError("not a label cache")
    try:
        return _CacheUnpickler(stream).load().item()
    except pickle.UnpicklingError as error:
        LOGGER.warning(
            f"{path} asks for {error}, which no label cache needs. It was not loaded; the label files are read again."
        )
        raise
