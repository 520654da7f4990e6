"""Files of a run that survive a kill, a full disk and a damaged file: whole or absent, never half."""

from __future__ import annotations

import errno
import io
import os
import pickletools
import shlex
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from ultralytics.engine import trainer as engine

from yolo_kd import patches
from yolo_kd.errors import CheckpointError, SaveError

PARTIAL = ".partial"  # ends the name of a file that is being written

_UNWRITABLE = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EIO", "EACCES", "EPERM", "ENOTDIR", "EISDIR", "ESTALE")
    if hasattr(errno, name)
}


def partial_of(path: Path) -> Path:
    """Return where the content of `path` stands until it is whole; always the same name, so nothing piles up."""
    return path.with_name(path.name + PARTIAL)


def previous_of(path: Path) -> Path:
    """Return where the predecessor of a checkpoint stands: `last.prev.pt` for `last.pt`."""
    return path.with_name(f"{path.stem}.prev{path.suffix}")


# ------------------------------------------------------------------------------------------------ writing


def write_atomically(path: Path, data: bytes, *, keep: Path | None = None) -> None:
    """Replace a file by new content, so that at every moment the old or the new one is there, whole.

    Args:
        path: The file. Its folder is made where it is missing.
        data: Its content.
        keep: Where the file that stood there stays, from the moment in which the new one is whole; None for nowhere.

    Raises:
        OSError: If the disk is full or the folder cannot be written to. Then `path` is what it was.
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
    """Put a file that was written beside `path` in its place, once the disk has it."""
    with open(partial, "rb+") as file:
        os.fsync(file.fileno())
    if keep is not None and path.exists():
        _second_name(path, keep)
    os.replace(partial, path)
    _sync_folder(path.parent)


def _second_name(path: Path, name: Path) -> None:
    """Give a file another name besides its own, without a moment in which either name is missing."""
    link = partial_of(name)
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, link)
    os.replace(link, name)
    # where both were the same file already, POSIX leaves the link as well
    link.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Have the folder's names on the disk as well, where the system can."""
    if os.name != "posix":
        return
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class RecordedFile:
    """Stands in for a path that Ultralytics writes checkpoints to, and records what it would have written."""

    def __init__(self, name: str, files: dict[str, bytes]):
        self.name = name
        self._files = files

    def __truediv__(self, name: str) -> RecordedFile:
        return RecordedFile(name, self._files)

    def mkdir(self, *_: Any, **__: Any) -> None:
        """Make nothing: the folder is made when something is written."""

    def write_bytes(self, data: bytes) -> int:
        """Record the content."""
        self._files[self.name] = data
        return len(data)


@contextmanager
def recorded(trainer: Any) -> Iterator[dict[str, bytes]]:
    """Record by name what Ultralytics' `save_model` writes, instead of letting it write in place."""
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
    """Return a serialised checkpoint of this process with one plain entry more."""
    state = torch.load(io.BytesIO(checkpoint), map_location="cpu", weights_only=False)
    buffer = io.BytesIO()
    torch.save({**state, key: value}, buffer)
    return buffer.getvalue()


@contextmanager
def stripping_atomically(
    last: Path, extra: Mapping[str, Any], quiet: Callable[[], AbstractContextManager] = nullcontext
) -> Iterator[None]:
    """Let Ultralytics strip finished checkpoints beside their place, and put them there when they are whole.

    `last.pt` comes last, after the final validation: until then it is a checkpoint that a run killed here resumes from.

    Args:
        last: The run's `last.pt`.
        extra: Plain entries that the finished files hold besides.
        quiet: Makes a context in which Ultralytics' announcements are not shown.
    """
    original = engine.strip_optimizer
    begun: list[Path] = []

    def strip(f: str | Path, s: str = "", updates: dict[str, Any] | None = None) -> dict[str, Any]:
        path = Path(s or f)
        partial = partial_of(path)
        begun.append(partial)
        try:
            with quiet():  # it would announce the name that stands for a moment only
                combined = original(f, str(partial), {**(updates or {}), **extra})
        except RuntimeError as error:  # torch's writer knows no errno
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
    """Remove what a kill in the middle of writing has left."""
    for file in folder.glob(f"*{PARTIAL}"):
        with suppress(OSError):
            file.unlink()


def resume_command(last: Path, alone: bool) -> str:
    """Return the command that goes on with a run."""
    return f"yolo-kd train {'kd=none ' if alone else ''}{shlex.quote(f'resume={last}')}"


def unwritable(error: OSError, last: Path, alone: bool) -> SaveError | None:
    """Return the sentence for an error of a full disk or a folder that cannot be written to; None for any other.

    Args:
        error: What the system said.
        last: The run's `last.pt`.
        alone: Whether the run has no teacher.
    """
    if error.errno not in _UNWRITABLE:
        return None
    where = error.filename or last.parent
    room = ""
    with suppress(OSError):
        room = f", {shutil.disk_usage(last.parent).free / 1e6:.0f} MB are free there"
    kept = "No checkpoint had been written yet: start the run again once there is room."
    if last.exists():
        kept = f"The last checkpoint is whole: once it can be written to, go on with {resume_command(last, alone)}"
    return SaveError(f"{where} could not be written ({error.strerror or error}{room}). {kept}")


# ------------------------------------------------------------------------------------------------ reading


def damage(path: Path) -> str:
    """Say what is wrong with a checkpoint file as a file, or return an empty string.

    Every byte is compared with the checksum that was written with it, which torch does not do when it loads: a file
    with a flipped bit loads, with a wrong weight. What the file asks to load is not judged here, and nothing is loaded.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                return ""  # not written by torch, hence nothing that an interruption has done
            if (wrong := archive.testzip()) is not None:
                return f"the checksum of its part {wrong} is wrong"
            for name in archive.namelist():
                if name.endswith("/data.pkl"):
                    for _ in pickletools.genops(archive.read(name)):
                        pass
    except OSError as error:
        return error.strerror or str(error)
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, RuntimeError) as error:
        size = path.stat().st_size
        return "it is empty" if not size else f"it is cut short or overwritten: {error}, {size} bytes"
    return ""


def usable(path: Path) -> Path:
    """Return the checkpoint to resume from: `path`, or its predecessor where `path` is damaged or missing.

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
                "resume. Start it again with the command that it was started with."
            )
        return path
    if not path.is_file() or not (reason := damage(path)):
        return path
    if not previous.is_file():
        if not zipfile.is_zipfile(path):
            return path  # the loader says it better: it also knows other kinds of files
        also = "is not beside it"
    elif not (also := damage(previous)):
        return previous
    else:
        also = f"cannot be read either: {also}"
    raise CheckpointError(
        f"resume={path} is not a loadable checkpoint: {reason}. Its predecessor {previous.name} {also}. Name another "
        "checkpoint of the run, such as an epochN.pt of save_period=, or start it again."
    )


def restore(path: Path) -> str:
    """Put the predecessor of a damaged or missing checkpoint in its place, and return a sentence that says so.

    A damaged file is kept beside it, as `last.damaged.pt`.
    """
    previous = previous_of(path)
    if path.exists():
        reason = damage(path)
        aside = path.with_name(f"{path.stem}.damaged{path.suffix}")
        _second_name(path, aside)
        said = f"{path} is damaged ({reason}) and was set aside as {aside.name}"
    else:
        said = f"{path} is missing"
    _second_name(previous, path)
    return f"{said}; going on from its predecessor {previous.name}, which is one checkpoint older."
