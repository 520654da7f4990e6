"""What this installation and this processor can do, checked before any work starts."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

import torch

from yolo_kd.errors import SetupError


def check_torchvision() -> None:
    """Check that torchvision was built for the torch that is installed.

    A CPU-only torch beside a torchvision built for CUDA imports with an error or lacks its operators, and Ultralytics
    then fails in its first validation, an epoch into the training.

    Raises:
        SetupError: Naming both versions and the command that mends it.
    """
    try:
        import torchvision

        torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except (ImportError, RuntimeError, AttributeError, OSError) as error:
        try:
            vision = version("torchvision")
        except PackageNotFoundError:
            vision = "missing"
        raise SetupError(
            f"torchvision {vision} does not work with torch {torch.__version__}: {str(error).splitlines()[0]}. "
            "Reinstall the matching pair: pip install --force-reinstall ultralytics torch torchvision"
        ) from error


def cpu_has_bf16() -> bool:
    """Return whether the processor multiplies bfloat16 natively (AVX512-BF16 or AMX); without, it is only slower."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, probe, lambda: False)()) for probe in probes)


def check_cpu_bf16() -> None:
    """Check that `amp=bf16` makes sense on this processor.

    Raises:
        SetupError: If the processor has no bfloat16 instructions.
    """
    if not cpu_has_bf16():
        raise SetupError(
            "amp=bf16 was asked for on a processor without bfloat16 instructions (AVX512-BF16 or AMX), where it would "
            "be slower than float32. Use amp=False."
        )


@contextmanager
def reused_memory() -> Iterator[None]:
    """Have glibc keep freed memory for the next step instead of handing it back to the system.

    A step frees and allocates the same large buffers over and over. By default each comes fresh from the system, which
    clears it page by page, and elementwise arithmetic on feature maps spends most of its time on that. The most memory
    that the process holds stays the same; it is only given back at the end. Does nothing with other C libraries.
    """
    mallopt = _of_libc("mallopt")
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    if mallopt is not None:
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_max, 0)
    try:
        yield
    finally:
        if mallopt is not None:
            mallopt(trim_threshold, 128 * 1024)  # glibc's defaults
            mallopt(mmap_max, 65536)
        release_memory()


def release_memory() -> None:
    """Hand memory that is free back to the system, after work that will not be repeated."""
    gc.collect()  # models and their hooks hold each other
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    trim = _of_libc("malloc_trim")
    if trim is not None:
        trim(0)


def _of_libc(name: str) -> Callable[..., int] | None:
    """Return a function of glibc, None elsewhere."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        return getattr(ctypes.CDLL(None), name, None)
    except OSError:
        return None
