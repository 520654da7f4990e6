"""Focal and global feature distillation (Yang et al., 2022)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from yolo_kd.losses.base import AboveZero, AtLeastZero, FeatureLoss
from yolo_kd.losses.kernels.boxes import box_cells, cell_weights, paint
from yolo_kd.losses.kernels.fgd_moments import context_weights, pair_moments
from yolo_kd.losses.kernels.layout import sum_cells
from yolo_kd.losses.kernels.ops import EPS, attention, same_shape
from yolo_kd.structures import LossInputs, PairSpec

# The setting in which the normalised sums equal the published ones: width of an FPN, cells per level (P3 to P5 at
# 640 px), objects per image (COCO)
CHANNELS, CELLS, OBJECTS = 256, 2800, 7
UNITS = (CHANNELS * OBJECTS, CHANNELS, CHANNELS, CELLS, CHANNELS * CELLS)  # in the order of `Sums`


class Sums(NamedTuple):
    """The terms of the loss. The attention term is split in two, because its halves grow differently.

    Attributes:
        fg: Error inside boxes.
        bg: Error outside boxes.
        channel: Difference of the channel attentions.
        spatial: Difference of the spatial attentions.
        rela: Error after the context blocks.
    """

    fg: Tensor
    bg: Tensor
    channel: Tensor
    spatial: Tensor
    rela: Tensor


class ContextBlock(nn.Module):
    """Global context block, which adds information from the whole map to every cell (section 3.3).

    p = softmax over the cells of a 1x1 convolution to one channel; c = Σ_hw p F; the result is
    F + conv1x1(ReLU(LN(conv1x1(c)))) with half as many hidden channels. The last convolution starts at zero, so that
    the block starts as the identity.

    Args:
        channels: Width of the map.
    """

    def __init__(self, channels: int):
        super().__init__()
        hidden = max(1, channels // 2)
        self.mask = nn.Conv2d(channels, 1, 1)
        self.add = nn.Sequential(
            nn.Conv2d(channels, hidden, 1),
            nn.LayerNorm([hidden, 1, 1]),
            nn.ReLU(inplace=True),
            last := nn.Conv2d(hidden, channels, 1),
        )
        nn.init.kaiming_normal_(self.mask.weight, mode="fan_in", nonlinearity="relu")
        for zero in (self.mask.bias, last.weight, last.bias):
            if zero is not None:
                nn.init.zeros_(zero)

    def forward(self, feature: Tensor) -> Tensor:
        """Return the (B, C, H, W) map with its context added."""
        flat = feature.flatten(2)
        p = context_weights(flat, *self.mask_parameters())
        return feature + self.transform(sum_cells(flat, p))[..., None, None]

    def mask_parameters(self) -> tuple[Tensor, Tensor]:
        """Return weight (C,) and bias (1,) of the convolution to one channel."""
        return self.mask.weight.flatten(), self.mask.get_parameter("bias")

    def transform(self, context: Tensor) -> Tensor:
        """Return the summand of every cell, (B, C), for a context c, (B, C)."""
        return self.add(context[..., None, None]).flatten(1)


def focal_masks(
    boxes: Tensor, image_index: Tensor, batch_size: int, image_size: tuple[int, int], shape: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Return the weights of cells inside and outside boxes (equations 2, 3 and 5).

    Inside a box, a cell weighs one over the number of cells of the box, so that every object counts the same; where
    boxes overlap, the smallest one decides. Outside, a cell weighs one over the number of background cells of its
    image. As in the published code, and unlike the paper's H_r W_r, the cells of a box are counted after rounding
    outwards, see `box_cells`.

    Args:
        boxes: (M, 4) in pixels, xyxy; M may be zero.
        image_index: (M,) int64 image of each box.
        batch_size: B.
        image_size: Height and width of the images in pixels.
        shape: Height and width of the level in cells.

    Returns:
        Foreground and background weights, (B, H, W) each, float32. For an image without background, or without a box,
        the respective weights are zero.
    """
    cells = box_cells(boxes, image_size, shape)
    fg = paint(cell_weights(cells), cells, image_index, batch_size, shape)
    bg = (fg == 0).to(fg)
    return fg, bg / bg.sum((1, 2), keepdim=True).clamp(min=1)


def fgd_sums(
    student: Tensor,
    teacher: Tensor,
    fg: Tensor,
    bg: Tensor,
    student_context: ContextBlock,
    teacher_context: ContextBlock,
    temperature: float = 0.5,
) -> Sums:
    """Return the terms of one level as published: sums over channels and cells, averaged over images.

    fg    = 1/N Σ A_S A_C M_fg (S - T)²      bg with M_bg instead; A_S, A_C: the teacher's attention (equations 6, 7)
    mask  = 1/N (Σ |A_C(S) - A_C(T)| + Σ |A_S(S) - A_S(T)|)      channel + spatial here (equation 8)
    rela  = 1/N Σ (G_s(S) - G_t(T))²      G: context blocks, one for each side (equation 10)

    The published loss of a level is alpha fg + beta bg + gamma (channel + spatial) + lam rela. The teacher's map is
    constant, but its context block is trained like the student's.

    Args:
        student: (B, C, H, W), already at the teacher's width, with gradient. Half precision is converted to float32.
        teacher: (B, C, H, W); detached here.
        fg: (B, H, W) foreground weights of `focal_masks`.
        bg: (B, H, W) background weights.
        student_context: Context block of the student's side.
        teacher_context: Context block of the teacher's side.
        temperature: T of both attentions, above zero.

    Raises:
        ValueError: If shapes differ.
    """
    same_shape(student=student, teacher=teacher)
    same_shape(fg=fg, bg=bg, cells=teacher[:, 0])
    n, _, h, w = student.shape
    masks = student_context.mask_parameters(), teacher_context.mask_parameters()
    m = pair_moments(student.flatten(2), teacher.detach().flatten(2), temperature, *masks)
    spatial, channel = attention(m.t_spatial, temperature), attention(m.t_channel, temperature)
    error = (m.attended * spatial).view(n, h, w)
    # The context blocks add one number k to all cells of a channel: Σ (d + k)² = Σ d² + 2 k Σ d + HW k²
    k = student_context.transform(m.s_context) - teacher_context.transform(m.t_context)
    return Sums(
        fg=(error * fg).sum() / n,
        bg=(error * bg).sum() / n,
        channel=(attention(m.s_channel, temperature) - channel).abs().sum() / n,
        spatial=(attention(m.s_spatial, temperature) - spatial).abs().sum() / n,
        rela=(m.squares + 2 * k * m.differences + h * w * k.square()).sum() / n,
    )


def normalise(sums: Sums, fg: Tensor, bg: Tensor, channels: int) -> Sums:
    """Divide each published sum by the numbers that it grows with, which leaves means.

    fg becomes the attended squared error averaged over objects and channels (zero without objects). bg is averaged over
    background cells and channels, channel over channels, spatial over cells, rela over channels and cells.

    Args:
        sums: From `fgd_sums`.
        fg: (B, H, W) foreground weights.
        bg: (B, H, W) background weights.
        channels: C.
    """
    n, cells = fg.shape[0], fg[0].numel()
    return Sums(
        fg=sums.fg / (channels * fg.sum() / n + EPS),
        bg=sums.bg / (channels * bg.sum() / n + EPS),
        channel=sums.channel / channels,
        spatial=sums.spatial / cells,
        rela=sums.rela / (channels * cells),
    )


class FGD(FeatureLoss):
    """Focal and global knowledge distillation of neck features.

    Yang et al., "Focal and Global Knowledge Distillation for Detectors", CVPR 2022, arXiv 2111.11837, section 3. Focal:
    squared error weighted by the teacher's attention, separately inside and outside boxes, and agreement of the
    attentions themselves. Global: squared error after a context block on each side.

    The published loss consists of sums. Its foreground term grows with the number of boxes (mosaic!) and of channels,
    its relation term with channels times cells. Here each term is a mean (see `normalise`) times the number of summands
    at 256 channels, 2800 cells per level (P3 to P5 at 640 px) and 7 objects per image (COCO). The published constants
    therefore stay valid and keep their balance in that setting, and the strength is the same at any image size, batch
    size, width and number of boxes. `strength` comes from a measurement, because the published rows were tuned for
    linear FPN maps and task losses of another size. Levels are added, as published.

    Published rows (temperature; alpha, beta, gamma, lam):
        RetinaNet, GFL, SOLO      0.5; 1e-3, 5e-4, 5e-4, 5e-6 (the defaults)
        RepPoints                 0.5; 1.6e-3, 8e-4, 8e-4, 8e-6
        FCOS                      0.8; 1.6e-3, 8e-4, 8e-4, 8e-6 (the paper says 0.5 everywhere)
        YOLOX                     0.5; 2e-3, 1e-3, 1e-3, 1e-5
        Faster and Mask R-CNN     0.5; 5e-5, 2.5e-5, 5e-5, 5e-7

    Other departures:

    - The 1x1 adapter is present for equal widths too.
    - Boxes are clipped to the image, because negative coordinates wrap around in the published code.
    - Nothing is divided by the multi-scale factor, unlike in the published YOLOX variant.
    - The default of gamma is that of the one-stage configurations, half the default of the published class.

    The loss is zero if the student's map equals the teacher's and both context blocks are equal, as they effectively
    are at the start.

    Args:
        alpha: Strength of the foreground term, at least 0.
        beta: Strength of the background term, at least 0.
        gamma: Strength of the attention term, at least 0.
        lam: Strength of the relation term (the paper's λ), at least 0.
        temperature: T of the attentions, above 0.
        levels: Levels to use, all by default.
    """

    name = "fgd"
    columns = ("fgd_loss",)
    reads = frozenset({"features", "targets"})
    adapter = "conv1x1"
    paper = "Yang et al. 2022, arXiv 2111.11837"
    strength = 1.2

    alpha: AtLeastZero = 1e-3
    beta: AtLeastZero = 5e-4
    gamma: AtLeastZero = 5e-4
    lam: AtLeastZero = 5e-6
    temperature: AboveZero = 0.5

    def build(self, pair: PairSpec) -> None:
        """Make a context block for each side of each level."""
        super().build(pair)
        self.student_context = nn.ModuleList(ContextBlock(pair.teacher_channels[i]) for i in self.level_indices)
        self.teacher_context = nn.ModuleList(ContextBlock(pair.teacher_channels[i]) for i in self.level_indices)

    def level_loss(self, inputs: LossInputs, level: int) -> Tensor:
        """Return the five terms of one level."""
        student, teacher = self.maps(inputs, level)
        fg, bg = self._masks(inputs, level)
        s_context, t_context = (self.of_level(blocks, level) for blocks in (self.student_context, self.teacher_context))
        sums = fgd_sums(student, teacher, fg, bg, s_context, t_context, self.temperature)
        means = normalise(sums, fg, bg, teacher.shape[1])
        strengths = (self.alpha, self.beta, self.gamma, self.gamma, self.lam)
        return torch.stack([a * unit * mean for a, unit, mean in zip(strengths, UNITS, means, strict=True)])

    @staticmethod
    def _masks(inputs: LossInputs, level: int) -> tuple[Tensor, Tensor]:
        """Return the foreground and background weights of a level, computed once per step."""
        t, shape = inputs.targets, inputs.teacher.shapes[level]
        if t is None:
            raise ValueError("loss 'fgd' reads ground-truth boxes, but its inputs have no targets")
        return inputs.once(
            ("focal_masks", level), lambda: focal_masks(t.boxes, t.image_index, t.batch_size, t.image_size, shape)
        )
