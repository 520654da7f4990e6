"""Writes and checks the files of a run, which are whole or absent after a kill and on a full disk."""

from __future__ import annotations

import errno
import io
import os
import pickletools
import shlex
import shutil
import zipfile
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from ultralytics.engine import trainer as engine

from yolo_kd import patches
from yolo_kd.errors import CheckpointError, SaveError
from yolo_kd.safe_loading.restricted import quiet

PARTIAL = ".partial"  # suffix of a file that is being written

_UNWRITABLE = {"ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EIO", "EACCES", "EPERM", "ENOTDIR", "EISDIR", "ESTALE"}


def partial_of(path: Path) -> Path:
    """Return the file that is written in place of `path` until it is whole; one name, so files do not accumulate."""
    return path.with_name(path.name + PARTIAL)


def previous_of(path: Path) -> Path:
    """Return the path of a checkpoint's predecessor: `last.prev.pt` for `last.pt`."""
    return path.with_name(f"{path.stem}.prev{path.suffix}")


# ------------------------------------------------------------------------------------------------ writing


def write_atomically(path: Path, data: bytes, *, keep: Path | None = None) -> None:
    """Replace the content of a file, so that the old or the new file exists as a whole at any time.

    Args:
        path: The file. Its folder is created if it is missing.
        data: The content.
        keep: Path that keeps the previous file once the new one is whole; None to keep none.

    Raises:
        OSError: If the disk is full or the folder cannot be written to. `path` is then unchanged.
    """
    partial = partial_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        partial.write_bytes(data)
        commit(partial, path, keep=keep)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error


def commit(partial: Path, path: Path, *, keep: Path | None = None) -> None:
    """Rename a partial file to `path` after it is on the disk."""
    with open(partial, "rb+") as file:
        os.fsync(file.fileno())
    if keep is not None and path.exists():
        _second_name(path, keep)
    os.replace(partial, path)
    _sync_folder(path.parent)


def _second_name(path: Path, name: Path) -> None:
    """Give a file a second name, so that neither name is missing at any time."""
    link = partial_of(name)
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, link)
    os.replace(link, name)
    # if both names were the same file already, POSIX leaves the link
    link.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Write the names in a folder to the disk if the system supports it."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class RecordedFile:
    """Replaces a path that Ultralytics writes checkpoints to, and records their content."""

    def __init__(self, name: str, files: dict[str, bytes]):
        self.name = name
        self._files = files

    def __truediv__(self, name: str) -> RecordedFile:
        return RecordedFile(name, self._files)

    def mkdir(self, *_: Any, **__: Any) -> None:
        """Do nothing: the folder is created when a file is written."""

    def write_bytes(self, data: bytes) -> int:
        """Record the content."""
        self._files[self.name] = data
        return len(data)


@contextmanager
def recorded(trainer: Any) -> Iterator[dict[str, bytes]]:
    """Record the files that Ultralytics' `save_model` writes, by name, instead of writing them."""
    files: dict[str, bytes] = {}
    paths = {name: getattr(trainer, name) for name in ("wdir", "last", "best")}
    try:
        for name, path in paths.items():
            setattr(trainer, name, RecordedFile(path.name, files))
        yield files
    finally:
        for name, path in paths.items():
            setattr(trainer, name, path)


def with_entry(checkpoint: bytes, key: str, value: Any) -> bytes:
    """Add a plain entry to a serialised checkpoint of this process."""
    state = torch.load(io.BytesIO(checkpoint), map_location="cpu", weights_only=False)
    buffer = io.BytesIO()
    torch.save({**state, key: value}, buffer)
    return buffer.getvalue()


@contextmanager
def stripping_atomically(last: Path, extra: Mapping[str, Any]) -> Iterator[None]:
    """Let Ultralytics strip finished checkpoints into partial files, and rename these when they are whole.

    `last.pt` is replaced last, after the final validation: until then, a run that is killed can resume from it.

    Args:
        last: The run's `last.pt`.
        extra: Plain entries to add to the finished files.
    """
    original = engine.strip_optimizer
    begun: list[Path] = []

    def strip(f: str | Path, s: str = "", updates: dict[str, Any] | None = None) -> dict[str, Any]:
        path = Path(s or f)
        partial = partial_of(path)
        begun.append(partial)
        try:
            with quiet():  # Ultralytics would log the name of the partial file
                combined = original(f, str(partial), {**(updates or {}), **extra})
        except RuntimeError as error:  # torch's writer sets no errno
            if "inline_container" not in str(error) and "PytorchStreamWriter" not in str(error):
                raise
            raise OSError(errno.ENOSPC, "the file came out too short, the disk may be full", str(path)) from error
        if combined and path != last:
            commit(partial, path)
        return combined

    try:
        with patches.replaced(engine, "strip_optimizer", strip):
            yield
        if partial_of(last) in begun and partial_of(last).exists():
            commit(partial_of(last), last)
            previous_of(last).unlink(missing_ok=True)
    finally:
        for partial in begun:
            with suppress(OSError):
                partial.unlink()


def clear_partials(folder: Path) -> None:
    """Remove the partial files of a process that was killed while writing."""
    for file in folder.glob(f"*{PARTIAL}"):
        with suppress(OSError):
            file.unlink()


def resume_command(last: Path, alone: bool) -> str:
    """Return the command that resumes a run."""
    return f"yolo-kd train {'kd=none ' if alone else ''}{shlex.quote(f'resume={last}')}"


def unwritable(error: OSError, last: Path, alone: bool) -> SaveError | None:
    """Return the error for a full disk or a folder that cannot be written to, None for any other.

    Args:
        error: The system's error.
        last: The run's `last.pt`.
        alone: Whether the run has no teacher.
    """
    if errno.errorcode.get(error.errno or 0) not in _UNWRITABLE:
        return None
    room = ""
    with suppress(OSError):
        room = f", {shutil.disk_usage(last.parent).free / 1e6:.0f} MB are free there"
    kept = "There is no checkpoint yet: start the run again once files can be written."
    if last.exists():
        kept = f"The last checkpoint is whole. Once files can be written, continue with {resume_command(last, alone)}"
    return SaveError(f"{error.filename or last.parent} could not be written ({error.strerror or error}{room}). {kept}")


# ------------------------------------------------------------------------------------------------ reading


def damage(path: Path) -> str:
    """Return the damage of a checkpoint file, an empty string if there is none.

    The content is compared with the checksums in the file. torch does not do so: it loads a file with a flipped bit,
    with a wrong weight. Nothing is loaded here.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                return ""  # not written by torch, so not damaged by an interruption
            if (wrong := archive.testzip()) is not None:
                return f"the checksum of its entry {wrong} is wrong"
            for name in archive.namelist():
                if name.endswith("/data.pkl"):
                    deque(pickletools.genops(archive.read(name)), maxlen=0)  # reads them all
    except OSError as error:
        return error.strerror or str(error)
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, RuntimeError) as error:
        size = path.stat().st_size
        return "it is empty" if not size else f"it is cut short or overwritten: {error}, {size} bytes"
    return ""


def usable(path: Path) -> Path:
    """Return the checkpoint to resume from: `path`, or its predecessor if `path` is damaged or missing.

    Raises:
        CheckpointError: If neither can be read.
    """
    previous = previous_of(path)
    if not path.exists():
        if previous.is_file() and not damage(previous):
            return previous
        if path.name == "last.pt" and (path.parent.parent / "args.yaml").exists():
            raise CheckpointError(
                f"resume={path} does not exist: this run ended before its first checkpoint, so there is nothing to "
                "resume. Start it again with its original command."
            )
        return path
    if not path.is_file() or not (reason := damage(path)):
        return path
    if not previous.is_file():
        if not zipfile.is_zipfile(path):
            return path  # the loader's message is better: it distinguishes other kinds of files
        also = "does not exist"
    elif not (also := damage(previous)):
        return previous
    else:
        also = f"cannot be read either: {also}"
    raise CheckpointError(
        f"resume={path} is not a loadable checkpoint: {reason}. Its predecessor {previous.name} {also}. Name another "
        "checkpoint of the run, such as an epochN.pt of save_period=, or start it again."
    )


def restore(path: Path) -> str:
    """Replace a damaged or missing checkpoint by its predecessor, and return a sentence for the log.

    A damaged file is kept as `last.damaged.pt`.
    """
    previous = previous_of(path)
    state = "is missing"
    if path.exists():
        kept = path.with_name(f"{path.stem}.damaged{path.suffix}")
        state = f"is damaged ({damage(path)}) and was renamed to {kept.name}"
        _second_name(path, kept)
    _second_name(previous, path)
    return f"{path} {state}; continuing from its predecessor {previous.name}, which is one checkpoint older."
