"""What a checkpoint file asks for, read without loading it.

A `.pt` file is a zip archive with one pickle, `data.pkl`, and one record of raw numbers per tensor. A pickle is a
program for a small stack machine: it can name any function and call it, and it states the sizes of its tensors itself.
`inspect` therefore walks through that program without carrying it out and compares what it states with what the file
holds. It stands in front of PyTorch's restricted loader and is stricter: that one decides by name, and lets a file call
every class it may name, with any arguments.
"""

from __future__ import annotations

import os
import pickletools
import re
import struct
import tarfile
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise
from math import prod
from typing import Any

from yolo_kd.errors import CheckpointError

MAX_PICKLE = 4 << 20  # bytes; a YOLOv9e in mid-run, the largest of Ultralytics' detectors, needs 0.9 MB
MAX_DIRECTORY = 8 << 20  # bytes of the table of contents, hence about 100,000 tensors
MAX_DIMENSIONS = 64  # PyTorch's own limit
MAX_GROWTH = 4  # tensors may share their numbers, but all of them together not need this much more than the file
MAX_SPARE = 64 << 20  # bytes that tensors of a small file may need beyond that

BYTES = {
    **dict.fromkeys(("ByteStorage", "CharStorage", "BoolStorage", "UntypedStorage"), 1),
    **dict.fromkeys(("HalfStorage", "BFloat16Storage", "ShortStorage"), 2),
    **dict.fromkeys(("FloatStorage", "IntStorage"), 4),
    **dict.fromkeys(("DoubleStorage", "LongStorage", "ComplexFloatStorage"), 8),
    "ComplexDoubleStorage": 16,
}
_STORAGE = re.compile(r"torch(?:\.storage)?\.(\w+Storage)")
_DTYPE = re.compile(r"torch\.(?:b?float|u?int|bool|complex)\d*")
_CLASS = re.compile(
    r"(?:torch\.nn\.modules|ultralytics\.nn\.modules|ultralytics\.nn\.tasks|ultralytics\.utils\.(?:loss|tal))(?:\.\w+)+"
)
_NAMESPACE = re.compile(r"ultralytics\.(?:yolo\.)?utils\.IterableSimpleNamespace")
_NUMPY_KIND = re.compile(r"[<>=|]?[biufc?]\d*")
_CALLABLES = frozenset(
    {
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_parameter_with_state",
        "torch.Size",
        "torch.device",
        "collections.OrderedDict",
        "builtins.set",
        "builtins.getattr",
        "_codecs.encode",
        "numpy.dtype",
        "numpy.core.multiarray.scalar",
        "numpy._core.multiarray.scalar",
        *(f"{m}.{c}" for m in ("pathlib", "pathlib._local") for c in ("PosixPath", "WindowsPath")),
    }
)
_METHODS = ("forward", "forward_fuse")  # what checkpoints of fused models hold of their own classes


class Refused(CheckpointError):
    """A file that must not be loaded.

    Args:
        reason: What is wrong, without a full stop.
        names: What it asked for that can run code.
        foreign: True if it is no checkpoint at all.
    """

    def __init__(self, reason: str, names: tuple[str, ...] = (), foreign: bool = False):
        super().__init__(reason)
        self.path = "a checkpoint"
        self.reason = reason
        self.names = names
        self.foreign = foreign

    def __str__(self) -> str:
        return f"{self.path} was refused: {self.reason}."


def inspect(path: str | os.PathLike[str]) -> None:
    """Check that a file is a checkpoint that holds tensors and known layers, and no more than its size allows.

    Nothing in it is carried out or unpacked. The memory needed depends on the table of contents and the pickle, both
    of which are limited, and not on what the file claims.

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
    if names := tuple(dict.fromkeys(n for n in names_in(pickle) if not _known(n))):
        raise Refused("it asks for names that can run code", names)
    try:
        walk = _Walk(sizes)
        walk.run(pickle)
    except (IndexError, KeyError, TypeError, ValueError, AttributeError, struct.error) as error:
        raise Refused(f"its pickle is damaged ({type(error).__name__})", foreign=True) from error
    if walk.needed > MAX_GROWTH * size + MAX_SPARE:
        raise Refused(f"its tensors claim {_amount(walk.needed)}, the whole file holds {_amount(size)}")


def names_in(pickle: bytes) -> list[str]:
    """Return the names that a pickle, or several in a row, would import; what is damaged ends the list."""
    names: list[str] = []
    texts: list[Any] = []
    memo: dict[Any, Any] = {}
    stream = BytesIO(pickle)
    try:
        while stream.tell() < len(pickle):
            for code, argument, _ in pickletools.genops(stream):
                if code.name in ("GLOBAL", "INST"):
                    names.append(_modern(*str(argument).split(" ", 1)))
                elif code.name == "STACK_GLOBAL":
                    names.append(_modern(*(str(text) for text in texts[-2:])))
                elif code.name in ("BINGET", "LONG_BINGET", "GET"):
                    texts.append(memo.get(int(str(argument))))
                elif code.name == "MEMOIZE":
                    memo[len(memo)] = texts[-1] if texts else None
                elif code.name in ("BINPUT", "LONG_BINPUT", "PUT"):
                    memo[int(str(argument))] = texts[-1] if texts else None
                elif "UNICODE" in code.name or "STRING" in code.name:
                    texts.append(argument)
    except (ValueError, TypeError, KeyError, IndexError, struct.error):
        pass
    return names


def _modern(module: str, name: str = "") -> str:
    """Return a name as Python 3 has it; pickles of torch.save use those of Python 2."""
    if (module, name) in NAME_MAPPING:
        module, name = NAME_MAPPING[module, name]
    return f"{IMPORT_MAPPING.get(module, module)}.{name}"


def _known(name: str) -> bool:
    known = any(pattern.fullmatch(name) for pattern in (_CLASS, _NAMESPACE, _DTYPE))
    return known or name in _CALLABLES or _storage(name) is not None


def _storage(name: str) -> str | None:
    match = _STORAGE.fullmatch(name)
    return match.group(1) if match and match.group(1) in BYTES else None


def _amount(size: int) -> str:
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            break
        size //= 1000
    return f"{size:,} {unit}" if size < 10**6 else "more than 1,000,000 TB"


def _text(value: Any) -> str:
    """Return a value of the stack machine for a message; a tuple of tuples could be written out without end."""
    if isinstance(value, tuple) and len(value) == 1:
        value = value[0]
    return repr(value)[:60] if isinstance(value, str | int | float | None) else f"a {type(value).__name__.strip('_')}"


def _other_kind(head: bytes) -> str | None:
    """Say what a file is that does not begin as a zip archive does, None for one that does."""
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
        return "it is an HDF5 file, of Keras perhaps"
    if head.startswith(b"\x80") and head[1] in range(2, 6):
        names = [n for n in names_in(head) if not _known(n)]
        asks = f" and asks for {', '.join(n[:80] for n in dict.fromkeys(names[:6]))}" if names else ""
        return (
            f"it is a bare pickle, as PyTorch before 1.6 wrote them,{asks}; such files are not opened. "
            "Load and save it again with a newer Ultralytics where you trust it"
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
    """Check the end of the archive: every reader of zip files must find the same table of contents, and a small one.

    Raises:
        Refused: If bytes follow the archive, or the table is larger than a checkpoint's.
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
        raise Refused(f"its table of contents claims {entries:,} parts in {_amount(directory)}")


def _records(archive: zipfile.ZipFile) -> tuple[dict[str, int], bytes]:
    """Return the size of every record of numbers by its key, and the pickle.

    Raises:
        Refused: If the archive is not laid out as torch.save does.
    """
    infos = archive.infolist()
    for info in infos:
        parts = info.orig_filename.replace("\\", "/").split("/")
        if ".." in parts or "" in parts[:1] or ":" in parts[0] or "\0" in info.orig_filename:
            raise Refused(f"its part {info.orig_filename[:80]!r} is named to be unpacked outside of its folder")
        if info.external_attr >> 28 == 0xA:
            raise Refused(f"its part {info.orig_filename[:80]!r} is a symbolic link")
        if info.compress_type != zipfile.ZIP_STORED:
            raise Refused(
                f"its part {info.orig_filename[:80]!r} is compressed, {_amount(info.compress_size)} that would become "
                f"{_amount(info.file_size)}; torch.save compresses nothing"
            )
        if info.file_size != info.compress_size or info.flag_bits & 1:
            raise Refused(f"its part {info.orig_filename[:80]!r} states two different sizes, or is encrypted")
    names = [info.orig_filename for info in infos]
    folders = {name.partition("/")[0] for name in names}
    if len(set(names)) < len(names):
        raise Refused("two of its parts have the same name")
    if any(name.partition("/")[2].startswith(("code/", "constants.pkl")) for name in names):
        raise Refused(
            "it is a TorchScript archive, an export; the checkpoint that it was made from is needed", (), True
        )
    places = sorted((info.header_offset, info.header_offset + 30 + info.compress_size) for info in infos)
    if any(end > start for (_, end), (start, _) in pairwise(places)):
        raise Refused("its parts overlap: the same bytes are used more than once")
    if len(folders) != 1 or (prefix := folders.pop()) + "/data.pkl" not in names:
        raise Refused("it is a zip archive without the part data.pkl that torch.save writes", foreign=True)
    by_name = {info.orig_filename: info for info in infos}
    if (size := by_name[f"{prefix}/data.pkl"].file_size) > MAX_PICKLE:
        raise Refused(f"its pickle has {_amount(size)}, more than the {_amount(MAX_PICKLE)} that a detector may need")
    sizes = {name[len(prefix) + 6 :]: info.file_size for name, info in by_name.items() if "/data/" in name}
    return sizes, archive.read(f"{prefix}/data.pkl")


# ------------------------------------------------------------------------------------------- the stack machine's values
@dataclass(frozen=True)
class _Name:
    """A class or function that the pickle names."""

    name: str


@dataclass(frozen=True)
class _Tuple:
    items: tuple[Any, ...]


@dataclass(frozen=True)
class _Numbers:
    """A storage: a record of raw numbers."""

    count: int
    width: int


@dataclass(frozen=True)
class _Thing:
    """Anything else; `kind` is list, dict, the name of a class, or a word for it."""

    kind: str


_METHOD = _Thing("method")


class _Walk:
    """Follows a pickle's instructions, those that torch.save writes, on values that stand for the real ones.

    Attributes:
        needed: Bytes of all tensors together.
    """

    def __init__(self, sizes: dict[str, int]):
        self.sizes = sizes
        self.needed = 0
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self, pickle: bytes) -> None:
        """Follow every instruction up to STOP.

        Raises:
            Refused: At the first one that a checkpoint does not contain.
        """
        for code, argument, _ in pickletools.genops(pickle):
            if code.name in _CONSTANT:
                self.stack.append(_CONSTANT[code.name](argument))
            elif (step := getattr(self, f"_{code.name.lower()}", None)) is not None:
                step(argument)
            elif code.name not in ("PROTO", "STOP"):
                raise Refused(f"its pickle holds the instruction {code.name}, which torch.save does not write")

    def _pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.outer.pop()
        return items

    def _mark(self, _: Any) -> None:
        self.outer.append(self.stack)
        self.stack = []

    def _global(self, argument: str) -> None:
        self.stack.append(_Name(_modern(*argument.split(" ", 1))))

    def _binput(self, number: int) -> None:
        self.memo[number] = self.stack[-1]

    def _binget(self, number: int) -> None:
        self.stack.append(self.memo[number])

    _long_binput, _long_binget = _binput, _binget

    def _tuple(self, _: Any) -> None:
        items = self._pop_mark()
        self.stack.append(_Tuple(tuple(items)))

    def _take(self, count: int) -> None:
        self.stack[-count:] = [_Tuple(tuple(self.stack[-count:]))]

    def _tuple1(self, _: Any) -> None:
        self._take(1)

    def _tuple2(self, _: Any) -> None:
        self._take(2)

    def _tuple3(self, _: Any) -> None:
        self._take(3)

    def _append(self, _: Any) -> None:
        self._store(self.stack.pop())

    def _appends(self, _: Any) -> None:
        for value in self._pop_mark():
            self._store(value)

    def _setitem(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._store(value, key)

    def _setitems(self, _: Any) -> None:
        items = self._pop_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            self._store(value, key)

    def _store(self, value: Any, key: Any = None) -> None:
        """Check a value that goes into a list or a dictionary: data, never something that can be called."""
        if isinstance(value, _Name) and not _DTYPE.fullmatch(value.name):
            raise Refused(f"it keeps {value.name} as a value instead of an object", (value.name,))
        if value is _METHOD and key != "forward":
            raise Refused(f"it puts a method in the place of {_text(key)}")

    def _binpersid(self, _: Any) -> None:
        word, kind, key, _location, count = self.stack.pop().items
        name = _storage(kind.name)
        if word != "storage" or name is None or type(count) is not int or type(key) is not str:
            raise Refused("it refers to numbers in a way that torch.save does not")
        held = self.sizes.get(key)
        if held is None or count < 0 or count * BYTES[name] != held:
            has = "which it does not hold" if held is None else f"of which it holds {_amount(held)}"
            raise Refused(f"its record '{key[:40]}' claims {_amount(max(count, 0) * BYTES[name])}, {has}")
        self.stack.append(_Numbers(count, BYTES[name]))

    def _newobj(self, _: Any) -> None:
        arguments, made = self.stack.pop(), self.stack.pop()
        if not (_CLASS.fullmatch(made.name) or _NAMESPACE.fullmatch(made.name)) or arguments.items:
            raise Refused(f"it makes a {made.name}, which is no layer", (made.name,))
        self.stack.append(_Thing(made.name))

    def _build(self, _: Any) -> None:
        state, made = self.stack.pop(), self.stack[-1]
        if not isinstance(made, _Thing) or made.kind in ("list", "dict", "tensor") or isinstance(state, _Name):
            raise Refused("it sets the state of something that has none")

    def _reduce(self, _: Any) -> None:
        arguments, called = self.stack.pop().items, self.stack.pop()
        name = called.name
        if _NAMESPACE.fullmatch(name) and not arguments:
            self.stack.append(_Thing(name))
            return
        if name not in _CALLABLES:
            raise Refused(f"it calls {name}, which a checkpoint has no reason to", (name,))
        short = name.rpartition(".")[2]
        if short == "_rebuild_tensor_v2":
            self._tensor(*arguments[:4])
            made: Any = _Thing("tensor")
        elif short.startswith("_rebuild_parameter"):
            if arguments[0] != _Thing("tensor"):
                raise Refused("it makes a parameter of something that is no tensor")
            made = _Thing("tensor")
        elif short == "getattr":
            if len(arguments) != 2 or arguments[1] not in _METHODS or not isinstance(arguments[0], _Name | _Thing):
                raise Refused(f"it reads the attribute {_text(arguments[1:])} of an object")
            made = _METHOD
        elif short == "encode":
            if arguments[1:] != ("latin1",):
                raise Refused(f"it encodes text as {_text(arguments[1:])}")
            made = _Thing("bytes")
        elif short == "dtype":
            if not isinstance(arguments[0], str) or not _NUMPY_KIND.fullmatch(arguments[0]):
                raise Refused(f"it holds NumPy values of the kind {_text(arguments[0])}")
            made = _Thing(short)
        else:
            if any(isinstance(argument, _Name) for argument in arguments):
                raise Refused(f"it hands a name to {name}", (name,))
            made = _Thing(short)
        self.stack.append(made)

    def _tensor(self, numbers: Any, offset: int, size: _Tuple, stride: _Tuple) -> None:
        """Check that a tensor lies inside its storage and add what it needs."""
        shape, steps = size.items, stride.items
        if not isinstance(numbers, _Numbers) or any(type(n) is not int or n < 0 for n in (offset, *shape, *steps)):
            raise Refused("it describes a tensor in a way that torch.save does not")
        if len(shape) > MAX_DIMENSIONS:
            raise Refused(f"it describes a tensor of {len(shape)} dimensions")
        elements = prod(shape)
        last = offset + sum((n - 1) * step for n, step in zip(shape, steps, strict=True)) if elements else offset - 1
        if last >= numbers.count:
            raise Refused(
                f"a tensor of shape {str(list(shape))[:60]} claims {_amount(elements * numbers.width)}, "
                f"its record holds {_amount(numbers.count * numbers.width)}"
            )
        self.needed += elements * numbers.width


_CONSTANT: dict[str, Callable[[Any], Any]] = {
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    **dict.fromkeys(
        ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"), lambda a: a
    ),
    "EMPTY_TUPLE": lambda _: _Tuple(()),
    "EMPTY_LIST": lambda _: _Thing("list"),
    "EMPTY_DICT": lambda _: _Thing("dict"),
    "EMPTY_SET": lambda _: _Thing("set"),
}
