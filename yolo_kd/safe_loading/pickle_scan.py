"""A scan of the pickle in a checkpoint, without unpickling it.

A pickle is a program for a small stack machine: it can name any function and call it, and it states the sizes of its
tensors itself. `check_pickle` follows that program on stand-ins for the real objects and compares the stated sizes with
the records of the file. It is stricter than PyTorch's restricted loader, which decides by name alone and lets a file
call every class that it may name, with any arguments.
"""

from __future__ import annotations

import pickletools
import re
import struct
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from math import prod
from typing import Any

from yolo_kd.errors import CheckpointError

MAX_DIMENSIONS = 64  # the limit of PyTorch

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
        names: The names in the file that can run code.
        foreign: True if the file is no checkpoint at all.
    """

    def __init__(self, reason: str, names: tuple[str, ...] = (), foreign: bool = False):
        super().__init__(reason)
        self.path = "a checkpoint"
        self.reason = reason
        self.names = names
        self.foreign = foreign

    def __str__(self) -> str:
        return f"{self.path} was refused: {self.reason}."


def check_pickle(pickle: bytes, sizes: Mapping[str, int]) -> int:
    """Check that a pickle holds tensors and layers only, and that its tensors lie inside the records of the file.

    Args:
        pickle: The pickle.
        sizes: Size in bytes of each record of numbers, by its key.

    Returns:
        The size in bytes of all tensors together.

    Raises:
        Refused: With the reason.
    """
    if names := forbidden_names(pickle):
        raise Refused("it asks for names that can run code", names)
    walk = _Walk(sizes)
    try:
        for code, argument, _ in pickletools.genops(pickle):
            if (step := _STEPS.get(code.name)) is None:
                raise Refused(f"its pickle holds the instruction {code.name}, which torch.save does not write")
            step(walk, argument)
    except (IndexError, KeyError, TypeError, ValueError, AttributeError, struct.error) as error:
        raise Refused(f"its pickle is damaged ({type(error).__name__})", foreign=True) from error
    return walk.needed


def forbidden_names(pickle: bytes) -> tuple[str, ...]:
    """Return the names in a pickle that a checkpoint may not use, each once."""
    return tuple(dict.fromkeys(name for name in names_in(pickle) if not _is_allowed(name)))


def names_in(pickle: bytes) -> list[str]:
    """Return the names that a pickle, or several in a row, would import. Damage ends the list."""
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
    """Return a name as in Python 3; pickles of torch.save use the names of Python 2."""
    if (module, name) in NAME_MAPPING:
        module, name = NAME_MAPPING[module, name]
    return f"{IMPORT_MAPPING.get(module, module)}.{name}"


def _is_allowed(name: str) -> bool:
    pattern = any(pattern.fullmatch(name) for pattern in (_CLASS, _NAMESPACE, _DTYPE))
    return pattern or name in _CALLABLES or _storage(name) is not None


def _storage(name: str) -> str | None:
    match = _STORAGE.fullmatch(name)
    return match.group(1) if match and match.group(1) in BYTES else None


def amount(size: int) -> str:
    """Return a number of bytes as text."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            break
        size //= 1000
    return f"{size:,} {unit}" if size < 10**6 else "more than 1,000,000 TB"


def _text(value: Any) -> str:
    """Return a stand-in as short text for a message; nested tuples could be written out without end."""
    if isinstance(value, tuple) and len(value) == 1:
        value = value[0]
    return repr(value)[:60] if isinstance(value, str | int | float | None) else f"a {type(value).__name__.strip('_')}"


# ------------------------------------------------------------------------------------- stand-ins for the real objects
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
    """Anything else; `kind` is list, dict, tensor, method or the name of a class or function."""

    kind: str


_METHOD = _Thing("method")


class _Walk:
    """The state of the stack machine, and the steps that the table of instructions `_STEPS` refers to.

    Attributes:
        needed: Size in bytes of all tensors so far.
    """

    def __init__(self, sizes: Mapping[str, int]):
        self.sizes = sizes
        self.needed = 0
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def mark(self) -> None:
        self.outer.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        """Remove and return the values since the last mark."""
        items, self.stack = self.stack, self.outer.pop()
        return items

    def name(self, argument: str) -> None:
        self.push(_Name(_modern(*argument.split(" ", 1))))

    def remember(self, number: int) -> None:
        self.memo[number] = self.stack[-1]

    def tuple_of(self, count: int) -> None:
        self.stack[-count:] = [_Tuple(tuple(self.stack[-count:]))]

    def store_items(self, items: list[Any]) -> None:
        """Check the entries of a dictionary, given as key, value, key, value ..."""
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.store([value], key)

    def store(self, values: list[Any], key: Any = None) -> None:
        """Check entries of a list or a dictionary: data, never something that can be called."""
        for value in values:
            if isinstance(value, _Name) and not _DTYPE.fullmatch(value.name):
                raise Refused(f"it keeps {value.name} as a value instead of an object", (value.name,))
            if value is _METHOD and key != "forward":
                raise Refused(f"it puts a method in the place of {_text(key)}")

    def persistent_id(self) -> None:
        """Look up a storage and check its size."""
        word, kind, key, _location, count = self.stack.pop().items
        name = _storage(kind.name)
        if word != "storage" or name is None or type(count) is not int or type(key) is not str:
            raise Refused("it refers to numbers in a way that torch.save does not")
        held = self.sizes.get(key)
        if held is None or count < 0 or count * BYTES[name] != held:
            has = "which it does not hold" if held is None else f"of which it holds {amount(held)}"
            raise Refused(f"its record '{key[:40]}' claims {amount(max(count, 0) * BYTES[name])}, {has}")
        self.push(_Numbers(count, BYTES[name]))

    def new_object(self) -> None:
        """Make an object without calling its constructor."""
        arguments, made = self.stack.pop(), self.stack.pop()
        if not (_CLASS.fullmatch(made.name) or _NAMESPACE.fullmatch(made.name)) or arguments.items:
            raise Refused(f"it makes a {made.name}, which is no layer", (made.name,))
        self.push(_Thing(made.name))

    def build(self) -> None:
        """Set the state of an object."""
        state, made = self.stack.pop(), self.stack[-1]
        if not isinstance(made, _Thing) or made.kind in ("list", "dict", "tensor") or isinstance(state, _Name):
            raise Refused("it sets the state of something that has none")

    def reduce(self) -> None:
        """Call a function with a tuple of arguments."""
        arguments, called = self.stack.pop().items, self.stack.pop()
        name = called.name
        if _NAMESPACE.fullmatch(name) and not arguments:
            self.push(_Thing(name))
            return
        if name not in _CALLABLES:
            raise Refused(f"it calls {name}, which a checkpoint has no reason to", (name,))
        short, first, rest = name.rpartition(".")[2], arguments[:1], arguments[1:]
        made = _Thing(short)
        if short == "_rebuild_tensor_v2":
            self.tensor(*arguments[:4])
            made = _Thing("tensor")
        elif short.startswith("_rebuild_parameter"):
            made = _Thing("tensor")
            if first != (made,):
                raise Refused("it makes a parameter of something that is no tensor")
        elif short == "getattr":
            made = _METHOD
            if len(rest) != 1 or rest[0] not in _METHODS or not isinstance(first[0], _Name | _Thing):
                raise Refused(f"it reads the attribute {_text(rest)} of an object")
        elif short == "encode":
            if rest != ("latin1",):
                raise Refused(f"it encodes text as {_text(rest)}")
        elif short == "dtype":
            if not isinstance(first[0], str) or not _NUMPY_KIND.fullmatch(first[0]):
                raise Refused(f"it holds NumPy values of the kind {_text(first[0])}")
        elif any(isinstance(argument, _Name) for argument in arguments):
            raise Refused(f"it hands a name to {name}", (name,))
        self.push(made)

    def tensor(self, numbers: Any, offset: int, size: _Tuple, stride: _Tuple) -> None:
        """Check that a tensor lies inside its storage, and add its size."""
        shape, steps = size.items, stride.items
        if not isinstance(numbers, _Numbers) or any(type(n) is not int or n < 0 for n in (offset, *shape, *steps)):
            raise Refused("it describes a tensor in a way that torch.save does not")
        if len(shape) > MAX_DIMENSIONS:
            raise Refused(f"it describes a tensor of {len(shape)} dimensions")
        elements = prod(shape)
        last = offset + sum((n - 1) * step for n, step in zip(shape, steps, strict=True)) if elements else offset - 1
        if last >= numbers.count:
            raise Refused(
                f"a tensor of shape {str(list(shape))[:60]} claims {amount(elements * numbers.width)}, "
                f"its record holds {amount(numbers.count * numbers.width)}"
            )
        self.needed += elements * numbers.width


_Step = Callable[[_Walk, Any], None]

# The instructions that torch.save writes, by name. A file with any other instruction is refused.
_STEPS: dict[str, _Step] = {
    **dict.fromkeys(("PROTO", "STOP"), lambda _walk, _argument: None),
    **dict.fromkeys(("NONE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"), _Walk.push),
    "NEWTRUE": lambda walk, _: walk.push(True),
    "NEWFALSE": lambda walk, _: walk.push(False),
    "EMPTY_TUPLE": lambda walk, _: walk.push(_Tuple(())),
    "EMPTY_LIST": lambda walk, _: walk.push(_Thing("list")),
    "EMPTY_DICT": lambda walk, _: walk.push(_Thing("dict")),
    "GLOBAL": _Walk.name,
    "MARK": lambda walk, _: walk.mark(),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _Walk.remember),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda walk, number: walk.push(walk.memo[number])),
    "TUPLE": lambda walk, _: walk.push(_Tuple(tuple(walk.since_mark()))),
    "TUPLE1": lambda walk, _: walk.tuple_of(1),
    "TUPLE2": lambda walk, _: walk.tuple_of(2),
    "TUPLE3": lambda walk, _: walk.tuple_of(3),
    "APPEND": lambda walk, _: walk.store([walk.stack.pop()]),
    "APPENDS": lambda walk, _: walk.store(walk.since_mark()),
    "SETITEM": lambda walk, _: walk.store_items([walk.stack.pop(-2), walk.stack.pop()]),
    "SETITEMS": lambda walk, _: walk.store_items(walk.since_mark()),
    "BINPERSID": lambda walk, _: walk.persistent_id(),
    "NEWOBJ": lambda walk, _: walk.new_object(),
    "BUILD": lambda walk, _: walk.build(),
    "REDUCE": lambda walk, _: walk.reduce(),
}
