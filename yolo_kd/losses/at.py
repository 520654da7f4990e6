"""Attention transfer: which cells are active, whatever the channels mean (Zagoruyko & Komodakis, ICLR 2017)."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from yolo_kd.losses.base import FeatureLoss
from yolo_kd.losses.kernels.chunked import sum_in_chunks
from yolo_kd.losses.kernels.ops import same_shape
from yolo_kd.structures import LossInputs


def attention_map(feature: Tensor, p: float = 2.0) -> Tensor:
    """Return the spatial attention of each image as a vector of length one.

    Q = Σ_c |f_c|^p, divided by ‖Q‖₂ (section 3.1 of the paper)

    Args:
        feature: (B, C, H, W).
        p: Exponent, at least 1. A larger one puts more weight on the strongest activations.

    Returns:
        (B, H * W), at least 0; zero for an image without any activation.
    """
    power = feature.square() if p == 2 else feature.abs().pow(p)
    return F.normalize(power.sum(1).flatten(1), dim=1)


def attention_transfer(student: Tensor, teacher: Tensor, p: float = 2.0) -> Tensor:
    """Squared distance of attention maps of unit length, averaged over images.

    L = 1/B Σ_b ‖Q_S / ‖Q_S‖ - Q_T / ‖Q_T‖‖² = 1/B Σ_b 2 (1 - cos(Q_S, Q_T))

    The paper's equation 2 adds up distances. Its code adds up squared distances and divides by the number of cells, so
    that the strength falls with the image size. This function follows the code, without that division.

    Args:
        student: (B, C_student, H, W) of any precision.
        teacher: (B, C_teacher, H, W) of any width, precision and memory format; detached here.
        p: Exponent, at least 1.

    Returns:
        float32 scalar in [0, 2].

    Raises:
        ValueError: If batch, height or width differ.
    """
    same_shape(student=student[:, :1], teacher=teacher[:, :1])

    def chunk_sum(s: Tensor, t: Tensor) -> Tensor:
        s, t = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (s, t))
        return (attention_map(s, p) - attention_map(t, p)).square().sum()

    return sum_in_chunks(chunk_sum, student, teacher) / student.shape[0]


class AT(FeatureLoss):
    """Attention transfer between the input features of the heads, summed over levels.

    Zagoruyko and Komodakis, "Paying More Attention to Attention", ICLR 2017, arXiv 1612.03928, section 3.1: transfer of
    activations with the sum of p-th powers. It needs no adapter, because it sums over channels. One departure: the
    distance is summed over cells instead of averaged (see `attention_transfer`). The paper's β = 1000 over an average
    of n cells corresponds to a factor of 1000 / n here.

    The term is a mean over images of a distance between unit vectors. It does not grow with batch size, width or image
    size.

    Args:
        p: Exponent of the activations, in [1, 8]; the paper uses 2. Below 1 the gradient is infinite at zero, and above
            8 strong activations overflow.
        levels: Levels to use, all by default.
    """

    name = "at"
    columns = ("at_loss",)
    reads = frozenset({"features"})
    paper = "Zagoruyko & Komodakis 2017, arXiv 1612.03928"
    strength = 0.7

    p: Annotated[float, Field(ge=1, le=8)] = 2.0

    def level_loss(self, inputs: LossInputs, level: int) -> Tensor:
        """Return the attention transfer of one level."""
        return attention_transfer(*self.maps(inputs, level), self.p)
