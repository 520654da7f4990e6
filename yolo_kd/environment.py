"""Checks of the installation and the processor before any work starts, and control of memory."""

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
    """Check that torchvision was built for the installed torch.

    With a CPU-only torch, a torchvision for CUDA fails at import or lacks its operators, and Ultralytics then fails in
    its first validation, after an epoch of training.

    Raises:
        SetupError: With both versions and the command that fixes it.
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
    """Return whether the processor has bfloat16 instructions (AVX512-BF16 or AMX); without them bfloat16 is slow."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, probe, lambda: False)()) for probe in probes)


def check_cpu_bf16() -> None:
    """Check that `amp=bf16` is faster than float32 on this processor.

    Raises:
        SetupError: If the processor has no bfloat16 instructions.
    """
    if not cpu_has_bf16():
        raise SetupError(
            "amp=bf16 needs a processor with bfloat16 instructions (AVX512-BF16 or AMX); on this one it is slower than "
            "float32. Use amp=False."
        )


@contextmanager
def reused_memory() -> Iterator[None]:
    """Let glibc keep freed memory for the next step instead of returning it to the system.

    Every step frees and allocates the same large buffers. By default the system provides each buffer anew and clears it
    page by page, which takes most of the time of elementwise arithmetic on feature maps. The peak memory of the process
    stays the same; memory is returned at the end. This has no effect with other C libraries.
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
    """Return free memory to the system, after work that is not repeated."""
    gc.collect()  # models and their hooks reference each other
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    trim = _of_libc("malloc_trim")
    if trim is not None:
        trim(0)


def _of_libc(name: str) -> Callable[..., int] | None:
    """Return a function of glibc, None with another C library."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        return getattr(ctypes.CDLL(None), name, None)
    except OSError:
        return None
