"""What this installation and this processor can do, checked before any work starts."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import torch

from yolo_kd.errors import EnvironmentError_


def check_torchvision() -> None:
    """Check that torchvision was built for the torch that is installed.

    A CPU-only torch beside a torchvision built for CUDA imports with an error or lacks its operators, and Ultralytics
    then fails in its first validation, an epoch into the training.

    Raises:
        EnvironmentError_: Naming both versions and the command that mends it.
    """
    try:
        import torchvision

        torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except (ImportError, RuntimeError, AttributeError, OSError) as error:
        try:
            vision = version("torchvision")
        except PackageNotFoundError:
            vision = "missing"
        raise EnvironmentError_(
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
        EnvironmentError_: If the processor has no bfloat16 instructions.
    """
    if not cpu_has_bf16():
        raise EnvironmentError_(
            "amp=bf16 was asked for on a processor without bfloat16 instructions (AVX512-BF16 or AMX), where it would "
            "be slower than float32. Use amp=False."
        )
