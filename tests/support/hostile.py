"""Hostile checkpoints: each builder writes one file, and its name says what the file tries."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import pickletools
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from ultralytics.nn.tasks import DetectionModel

MARKER = "ran"  # an attack that succeeds leaves a file of this name in the current folder


class Call:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple:
        return self.function, self.arguments


class Numbers:
    """Refers to a record of the archive as a storage does."""

    def __init__(self, key: str, count: int, kind: Any = torch.FloatStorage):
        self.pid = ("storage", kind, key, "cpu", count)


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return obj.pid if isinstance(obj, Numbers) else None


def pickled(content: Any, protocol: int = 2) -> bytes:
    stream = io.BytesIO()
    _Pickler(stream, protocol).dump(content)
    return stream.getvalue()


def archive(path: Path, data: bytes, records: dict[str, bytes] | None = None, prefix: str = "x") -> Path:
    """Write a file in the layout of torch.save with any pickle and records."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        file.writestr(f"{prefix}/data.pkl", data)
        file.writestr(f"{prefix}/version", b"3\n")
        for name, record in (records or {}).items():
            file.writestr(f"{prefix}/data/{name}", record)
    return path


def tensor(numbers: Numbers, size: tuple, stride: tuple, offset: int = 0) -> Call:
    return Call(torch._utils._rebuild_tensor_v2, numbers, offset, size, stride, False, OrderedDict())


def _calls(function: Callable[..., Any], *arguments: Any) -> Callable[[Path, Path], Path]:
    return lambda path, _good: archive(path, pickled({"model": Call(function, *arguments)}))


def _tensor(size: tuple, stride: tuple, count: int = 1, held: int = 4, offset: int = 0) -> Callable[[Path, Path], Path]:
    content = {"model": tensor(Numbers("0", count), size, stride, offset)}
    return lambda path, _good: archive(path, pickled(content), {"0": bytes(held)})


def _named(module: str, name: str) -> Callable[[Path, Path], Path]:
    """Name a class that is not installed, which Ultralytics would install from the package index."""
    data = b"\x80\x02}X\x05\x00\x00\x00model" + f"c{module}\n{name}\n".encode() + b")Rs."
    return lambda path, _good: archive(path, data)


def zeros_deflated(size: int) -> bytes:
    """Return `size` zeros, a multiple of a mebibyte, as a raw deflate stream: a thousandth of that."""
    block = zlib.compressobj(9, zlib.DEFLATED, -15)
    chunk = block.compress(bytes(1 << 20)) + block.flush(zlib.Z_FULL_FLUSH)
    return chunk * (size >> 20) + zlib.compressobj(9, zlib.DEFLATED, -15).flush(zlib.Z_FINISH)


def bomb(path: Path, _good: Path | None = None) -> Path:
    """Ten records of 1 GiB of zeros in a file of 1 MB: all of them share the same compressed bytes."""
    size, count = 1 << 30, 10
    stream = zeros_deflated(size)
    crc = 0
    for _ in range(size >> 20):
        crc = zlib.crc32(_ZEROS, crc)
    plain = pickled({"model": [tensor(Numbers(str(i), size // 4), (size // 4,), (1,)) for i in range(count)]})
    parts = [(b"x/data.pkl", 0, zlib.crc32(plain), plain, len(plain)), (b"x/data/0", 8, crc, stream, size)]
    out, directory = bytearray(), bytearray()
    for name, method, check, data, unpacked in parts:
        fields = struct.pack("<HHHHHIIIHH", 20, 0, method, 0, 0x21, check, len(data), unpacked, len(name), 0)
        names = [name] if not method else [f"x/data/{i}".encode() for i in range(count)]
        for entry in names:
            directory += (
                b"PK\1\2" + struct.pack("<H", 20) + fields + struct.pack("<HHHII", 0, 0, 0, 0, len(out)) + entry
            )
        out += b"PK\3\4" + fields + name + data
    entries = 1 + count
    end = b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, entries, entries, len(directory), len(out), 0)
    path.write_bytes(bytes(out + directory + end))
    return path


_ZEROS = bytes(1 << 20)


def _with_entry(name: str, link: bool = False) -> Callable[[Path, Path], Path]:
    def write(path: Path, good: Path) -> Path:
        path.write_bytes(good.read_bytes())
        info = zipfile.ZipInfo(name)
        if link:
            info.create_system, info.external_attr = 3, 0o120777 << 16
        with zipfile.ZipFile(path, "a") as file:
            file.writestr(info, b"../../" + MARKER.encode())
        return path

    return write


def _compressed(path: Path, good: Path) -> Path:
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for info in source.infolist():
            target.writestr(info.filename, source.read(info))
    return path


def _twice(path: Path, good: Path) -> Path:
    path.write_bytes(good.read_bytes())
    with zipfile.ZipFile(path, "a") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile notices the second name
        name = next(n for n in file.namelist() if n.endswith("data.pkl"))
        file.writestr(name, pickled({"model": Call(os.system, f"touch {MARKER}")}))
    return path


def _changed(change: Callable[[Any], None]) -> Callable[[Path, Path], Path]:
    """Take a good checkpoint and change its model, as somebody with torch.save can."""

    def write(path: Path, good: Path) -> Path:
        content = torch.load(good, weights_only=False)
        change(content["model"])
        torch.save(content, path)
        return path

    return write


def _bytes(change: Callable[[bytes], bytes]) -> Callable[[Path, Path], Path]:
    def write(path: Path, good: Path) -> Path:
        path.write_bytes(change(good.read_bytes()))
        return path

    return write


def _legacy(path: Path, _good: Path) -> Path:
    torch.save({"model": Call(os.system, f"touch {MARKER}")}, path, _use_new_zipfile_serialization=False)
    return path


def _tar(path: Path, _good: Path) -> Path:
    with tarfile.open(path, "w") as file:
        info = tarfile.TarInfo("../../" + MARKER)
        info.size = 3
        file.addfile(info, io.BytesIO(b"ran"))
    return path


def _directory(path: Path, _good: Path) -> Path:
    """Claim a table of contents of 4 GB."""
    path.write_bytes(b"PK\3\4" + bytes(100) + b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 65535, 65535, 2**32 - 2, 4, 0))
    return path


def _nested_tuples(path: Path, _good: Path) -> Path:
    """Tuples of tuples, each holding the one before twice: 2**200 values when written out."""
    data = (
        b"\x80\x02)q\x00"
        + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(200))
        + b"cbuiltins\ngetattr\nh\x05R."
    )
    return archive(path, data)


def _instruction(opcode: pickletools.OpcodeInfo) -> Callable[[Path, Path], Path]:
    """Write a pickle with one instruction in it, on a stack with a dictionary, a mark and a number."""
    reader = opcode.arg
    if reader is None:
        argument = b""
    elif reader.n == pickletools.UP_TO_NEWLINE:
        argument = {"STRING": b"''\n", "INST": b"torch\nSize\n"}.get(opcode.name, b"0\n")
    else:
        argument = bytes(reader.n if reader.n > 0 else 8)  # a length of zero takes 8 bytes at most
    data = b"\x80\x02}(K\x01" + opcode.code.encode("latin-1") + argument + b"."
    return lambda path, _good: archive(path, data)


def _put_hook(model: Any) -> None:
    model._forward_hooks[0] = nn.Identity()


def _put_method(model: Any) -> None:
    model.__dict__["float"] = model.model[0].forward


def _put_class(model: Any) -> None:
    model.model[0].act_class = DetectionModel


def _put_module(model: Any) -> None:
    model.__dict__["eval"] = nn.Identity()


def _spoil_yaml(**values: Any) -> Callable[[Any], None]:
    return lambda model: model.yaml.update(values)


_TOUCH = f"touch {MARKER}"
_WRITE = f"open({MARKER!r}, 'w').close()"
_NESTED = pickled({"model": Call(os.system, _TOUCH)})

# name -> how the file is written from a good one, and a pattern of the answer
RUNS_CODE: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "os.system": (_calls(os.system, _TOUCH), r"asks for \w+\.system, and loading those can run code"),
    "builtins.eval": (_calls(eval, f"__import__('os').system('{_TOUCH}')"), r"asks for builtins\.eval"),
    "builtins.exec": (_calls(exec, _WRITE), r"asks for builtins\.exec"),
    "file write": (_calls(builtins.open, MARKER, "w"), r"asks for (_?io|builtins)\.open"),
    "nested pickle": (_calls(pickle.loads, _NESTED), r"asks for _?pickle\.loads"),
    "torch.load": (_calls(torch.load, MARKER), r"asks for torch\.serialization\.load"),
    "import": (_calls(__import__, "this"), r"asks for builtins\.__import__"),
    "install": (_named("no_such_package_to_install", "Thing"), r"asks for no_such_package_to_install\.Thing"),
    "STACK_GLOBAL": (
        lambda path, _: archive(path, pickled({"model": Call(os.system, _TOUCH)}, protocol=4)),
        r"asks for \w+\.system",
    ),
    "old format": (_legacy, r"a bare pickle, as PyTorch before 1\.6 .* asks for \w+\.system"),
    "bare pickle": (
        lambda path, _: path.write_bytes(pickled(Call(os.system, _TOUCH), 4)) and path,
        r"a bare pickle, .* asks for \w+\.system",
    ),
    "second pickle": (_twice, "two of its entries have the same name"),
    "call of a layer": (_calls(nn.Linear, 10**5, 10**6), r"asks for torch\.nn\.modules\.linear\.Linear"),
    "model from an address": (_calls(DetectionModel, "http://localhost:9/x.yaml"), r"asks for .*DetectionModel"),
    "bytearray": (_calls(bytearray, 10**12), r"asks for builtins\.bytearray"),
    "tensor by size": (_calls(torch.Tensor, 10**12), r"asks for torch\.\w*\.?Tensor"),
    "getattr": (_calls(getattr, nn.Identity(), "register_forward_hook"), "reads the attribute"),
    "codec": (_calls(__import__("_codecs").encode, "x", "rot13"), "encodes text as 'rot13'|asks for _codecs.encode"),
    "class as a value": (
        _changed(_put_class),
        r"asks for ultralytics\.nn\.tasks\.DetectionModel|keeps .*DetectionModel",
    ),
    "method as a value": (_changed(_put_method), "asks for builtins.getattr|puts a method in the place of 'float'"),
    "hook": (_changed(_put_hook), "its layers have hooks"),
    "module as a method": (_changed(_put_module), "a function in the place of 'eval'"),
}

GROWS: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "bomb": (bomb, r"its entry 'x/data/0' is compressed, 1 MB that would become 1 GB"),
    "compressed": (_compressed, "is compressed, .* torch.save compresses nothing"),
    "storage of terabytes": (_tensor((1,), (1,), count=10**12), "record '0' claims 4 TB, of which it holds 4 bytes"),
    "storage that is not there": (
        lambda path, _: archive(path, pickled({"model": Numbers("7", 10**12)})),
        "its record '7' claims 4 TB, which it does not hold",
    ),
    "size beyond the storage": (_tensor((10**6, 10**6), (10**6, 1)), "claims 4 TB, its record holds 4 bytes"),
    "stride beyond the storage": (_tensor((2,), (10**12,)), r"a tensor of shape \[2\] claims"),
    "offset beyond the storage": (_tensor((1,), (1,), offset=10**12), r"a tensor of shape \[1\] claims"),
    "expanded": (_tensor((10**6, 10**6), (0, 0)), "its tensors claim 4 TB, the whole file holds"),
    "expanded in many": (
        lambda path, _: archive(
            path, pickled({"model": [tensor(Numbers("0", 1), (10**6,), (0,)) for _ in range(50)]}), {"0": bytes(4)}
        ),
        "its tensors claim 200 MB, the whole file holds",
    ),
    "negative size": (_tensor((-1,), (1,)), "describes a tensor in a way that torch.save does not"),
    "dimensions": (_tensor((2,) * 100, (0,) * 100), "a tensor of 100 dimensions"),
    "numbers without end": (_tensor((1 << 1000, 1 << 1000), (0, 0)), "claim more than 1,000,000 TB"),
    "large pickle": (
        lambda path, _: archive(path, b"\x80\x02](" + b"]" * (5 << 20) + b"e."),
        "its pickle has .* MB, more than the 4 MB",
    ),
    "table of contents": (_directory, "its table of contents claims"),
    "nested tuples": (_nested_tuples, "reads the attribute|is damaged"),
    "description of a giant": (
        _changed(_spoil_yaml(width_multiple=1e9, scales=None)),
        r"a multiple of depth or width must lie in \(0, 10\]",
    ),
    "scale without numbers": (
        _changed(_spoil_yaml(scales={"n": 5}, scale="n")),
        r"is not a model YAML for a detector",
    ),
    "description of another": (
        _changed(_spoil_yaml(scales={"n": [10, 10, 10**6]}, scale="n")),
        r"its description builds [\d,]+ parameters, it holds",
    ),
    "description of downloads": (
        _changed(_spoil_yaml(backbone=[[-1, 1, "TorchVision", [8, "resnet18", "DEFAULT", True, 2]]])),
        "'TorchVision' is no layer",
    ),
}  # fmt: skip

MISLEADS: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "traversal": (_with_entry(f"model/../../{MARKER}"), "has a path outside of its folder"),
    "absolute name": (_with_entry(f"/tmp/{MARKER}"), "has a path outside of its folder"),
    "drive": (_with_entry(f"C:\\{MARKER}"), "has a path outside of its folder"),
    "symbolic link": (_with_entry("model/data/link", link=True), "is a symbolic link"),
    "cut short": (_bytes(lambda data: data[: len(data) // 2]), "it is cut short, or something was appended"),
    "appended": (_bytes(lambda data: data + _NESTED), "it is cut short, or something was appended"),
    "prepended": (_bytes(lambda data: _NESTED + data), "a bare pickle"),
    "wrong magic": (_bytes(lambda data: b"GIF89a" + data[6:]), "it begins as no file of torch.save does"),
    "flipped bits": (_bytes(lambda data: data[:3000] + bytes(100) + data[3100:]), "damaged"),
    "empty": (_bytes(lambda data: b""), "the file is empty"),
    "tar": (_tar, "it is a tar archive"),
    "onnx": (_bytes(lambda data: b"\x08\x08\x12\x07pytorch"), "it is an ONNX file"),
    "web page": (_bytes(lambda data: b"<html>Not found</html>"), "it is a web page"),
}  # fmt: skip

# what torch.save writes; every other instruction of the stack machine must be refused
WRITTEN = frozenset({
    "PROTO", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT",
    "BINUNICODE", "EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT", "GLOBAL", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET",
    "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "APPEND", "APPENDS", "SETITEM", "SETITEMS", "BINPERSID", "NEWOBJ", "BUILD",
    "REDUCE",
})  # fmt: skip
INSTRUCTIONS: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    f"instruction {opcode.name}": (_instruction(opcode), f"its pickle holds the instruction {opcode.name}, which")
    for opcode in pickletools.opcodes
    if opcode.name not in WRITTEN
}

ATTACKS = {**RUNS_CODE, **GROWS, **MISLEADS, **INSTRUCTIONS}
