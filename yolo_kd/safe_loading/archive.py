"""A check of a checkpoint file before anything loads it.

A `.pt` file is a zip archive with one pickle, `data.pkl`, and one record of raw numbers per tensor. `inspect` checks
the archive here and its pickle with `pickle_scan`. Nothing is unpacked or unpickled.
"""

from __future__ import annotations

import os
import struct
import tarfile
import zipfile
from itertools import pairwise
from typing import Any

from yolo_kd.safe_loading.pickle_scan import Refused, amount, check_pickle, forbidden_names

MAX_PICKLE = 4 << 20  # bytes; a checkpoint of YOLOv9e, the largest detector, needs 0.9 MB during training
MAX_DIRECTORY = 8 << 20  # bytes of the table of contents, enough for about 100,000 tensors
MAX_GROWTH = 4  # all tensors together may need this many times the size of the file, because they can share numbers
MAX_SPARE = 64 << 20  # bytes that the tensors may need beyond that


def inspect(path: str | os.PathLike[str]) -> None:
    """Check that a file is a checkpoint of tensors and layers, which needs no more memory than its size allows.

    The memory for this check depends on the table of contents and the pickle, both of which are limited, and not on
    what the file claims.

    Raises:
        Refused: With the reason.
    """
    with open(path, "rb") as file:
        if (kind := _other_kind(file.read(1 << 16))) is not None:
            raise Refused(kind, foreign=True)
        _check_end(file)
        try:
            with zipfile.ZipFile(file) as archive:
                sizes, pickle = _records(archive)
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError) as error:
            raise Refused(f"it is damaged or incomplete ({error})", foreign=True) from error
        size = file.seek(0, os.SEEK_END)
    needed = check_pickle(pickle, sizes)
    if needed > MAX_GROWTH * size + MAX_SPARE:
        raise Refused(f"its tensors claim {amount(needed)}, the whole file holds {amount(size)}")


def _other_kind(head: bytes) -> str | None:
    """Return what a file is, judged by its first bytes; None if it is a zip archive."""
    start = head.lstrip()[:64].lower()
    if head.startswith(b"PK\x03\x04"):
        return None
    if not head:
        return "the file is empty"
    if start.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS, not the file itself; fetch it with: git lfs pull"
    if start.startswith((b"<!doctype", b"<html")):
        return "it is a web page, so the download went wrong; download the file again"
    if head[257:262] == b"ustar" or _is_tar(head):
        return "it is a tar archive, which torch.save has not written since 2016"
    if head.startswith(b"\x89HDF"):
        return "it is an HDF5 file, perhaps from Keras"
    if head.startswith(b"\x80") and head[1] in range(2, 6):
        names = forbidden_names(head)
        asks = f" and asks for {', '.join(name[:80] for name in names[:6])}" if names else ""
        return (
            f"it is a bare pickle, as PyTorch before 1.6 wrote them,{asks}; such files are not opened. "
            "If you trust it, load it and save it again with a newer Ultralytics"
        )
    if head.startswith((b"\x08\x03", b"\x08\x04", b"\x08\x05", b"\x08\x06", b"\x08\x07", b"\x08\x08", b"\x08\x09")):
        return "it is an ONNX file; distillation needs the checkpoint that it was exported from"
    return "it begins as no file of torch.save does"


def _is_tar(head: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(head[:512], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _check_end(file: Any) -> None:
    """Check that the table of contents is at the end, where every zip reader finds the same one, and is small.

    Raises:
        Refused: If bytes follow the archive, or the table is larger than that of a checkpoint.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - 98, 0))
    tail = file.read()
    end = tail[-22:]
    if len(end) < 22 or not end.startswith(b"PK\x05\x06") or end[20:22] != b"\0\0":
        raise Refused("it is cut short, or something was appended to it", foreign=True)
    entries, _, directory, offset = struct.unpack("<HHII", end[8:20])[0:4]
    large = tail[:56]
    if len(tail) == 98 and tail[56:60] == b"PK\x06\x07":
        if not large.startswith(b"PK\x06\x06"):
            raise Refused("its table of contents is damaged", foreign=True)
        entries, directory, offset = struct.unpack("<32xQQQ", large)
    if directory > MAX_DIRECTORY or offset > size:
        raise Refused(f"its table of contents claims {entries:,} entries in {amount(directory)}")


def _records(archive: zipfile.ZipFile) -> tuple[dict[str, int], bytes]:
    """Return the size of every record of numbers by its key, and the pickle.

    Raises:
        Refused: If the archive does not have the layout of torch.save.
    """
    infos = archive.infolist()
    for info in infos:
        path = info.orig_filename.replace("\\", "/").split("/")
        if ".." in path or "" in path[:1] or ":" in path[0] or "\0" in info.orig_filename:
            raise Refused(f"its entry {info.orig_filename[:80]!r} has a path outside of its folder")
        if info.external_attr >> 28 == 0xA:
            raise Refused(f"its entry {info.orig_filename[:80]!r} is a symbolic link")
        if info.compress_type != zipfile.ZIP_STORED:
            raise Refused(
                f"its entry {info.orig_filename[:80]!r} is compressed, {amount(info.compress_size)} that would become "
                f"{amount(info.file_size)}; torch.save compresses nothing"
            )
        if info.file_size != info.compress_size or info.flag_bits & 1:
            raise Refused(f"its entry {info.orig_filename[:80]!r} states two different sizes, or is encrypted")
    names = [info.orig_filename for info in infos]
    folders = {name.partition("/")[0] for name in names}
    if len(set(names)) < len(names):
        raise Refused("two of its entries have the same name")
    if any(name.partition("/")[2].startswith(("code/", "constants.pkl")) for name in names):
        raise Refused(
            "it is a TorchScript archive, an export; the checkpoint that it was made from is needed", (), True
        )
    places = sorted((info.header_offset, info.header_offset + 30 + info.compress_size) for info in infos)
    if any(end > start for (_, end), (start, _) in pairwise(places)):
        raise Refused("its entries overlap: the same bytes are used more than once")
    if len(folders) != 1 or (prefix := folders.pop()) + "/data.pkl" not in names:
        raise Refused("it is a zip archive without the entry data.pkl that torch.save writes", foreign=True)
    by_name = {info.orig_filename: info for info in infos}
    if (size := by_name[f"{prefix}/data.pkl"].file_size) > MAX_PICKLE:
        raise Refused(f"its pickle has {amount(size)}, more than the {amount(MAX_PICKLE)} that a detector may need")
    sizes = {name[len(prefix) + 6 :]: info.file_size for name, info in by_name.items() if "/data/" in name}
    return sizes, archive.read(f"{prefix}/data.pkl")
