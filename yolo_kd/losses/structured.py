"""Structured knowledge distillation of points and of pairs of points (Liu et al., 2019)."""

from __future__ import annotations

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from yolo_kd.losses.base import AtLeastZero, FeatureLoss
from yolo_kd.losses.kernels.ops import same_shape
from yolo_kd.losses.kernels.points import weighted_binary_kl
from yolo_kd.structures import DetectorOutputs, LossInputs

# weight 1.0: the gradient into the neck is about a third of the task loss's (table and command in docs/losses.md)
PIXEL_GAIN = 0.3
PAIR_GAIN = 2.0
PUBLISHED_EPS = 1e-8  # added to a node's norm
UNIT_EPS = 1e-4  # smallest norm of a node: bounds the gradient of nodes that are all zero


def pixel_wise(student: Tensor, teacher: Tensor) -> Tensor:
    """Pixel-wise distillation as published (equation 1), for one softmax over classes.

    L = −Σ_{n,h,w} Σ_c softmax(t)_c · log softmax(s)_c / (H W): a cross-entropy, summed over the batch

    With one class it is 0 for any student, and detectors do not score classes with a softmax: see
    `pixel_wise_sigmoid`.

    Args:
        student: (B, C, H, W) raw class logits.
        teacher: (B, C, H, W) raw class logits; detached here.

    Returns:
        Scalar, at least the teacher's entropy; it grows with B.

    Raises:
        ValueError: If shapes differ.
    """
    same_shape(student=student, teacher=teacher)
    cross_entropy = -(teacher.detach().softmax(1) * student.log_softmax(1)).sum()
    return cross_entropy / (student.shape[2] * student.shape[3])


def pixel_wise_sigmoid(student: Tensor, teacher: Tensor) -> Tensor:
    """Pixel-wise distillation for heads of independent sigmoids.

    L = Σ_{b,i} Σ_c KL(σ(t) ‖ σ(s)) / max(Σ_{b,i} o_i, B), with o_i the teacher's largest class probability at a point

    As published, every point counts the same, background included. A detector has about a hundred background points for
    each point on an object. Like a detection loss, the sum is therefore divided by a soft count of the points on
    objects, and by at least one per image, which keeps the term small for batches without objects.

    Args:
        student: (B, A, nc) raw class logits of any precision.
        teacher: (B, A, nc) raw class logits; detached here.

    Returns:
        float32 scalar, at least 0 except for rounding.

    Raises:
        ValueError: If shapes differ.
    """
    same_shape(student=student, teacher=teacher)
    positives = teacher.detach().amax(-1).float().sigmoid()
    divergence = weighted_binary_kl(student, teacher, torch.ones_like(positives))
    return divergence / positives.sum().clamp(min=student.shape[0])


def pool_by_scale(feature: Tensor, scale: float = 0.5) -> Tensor:
    """Max-pool to nodes as published, with windows of int(H · scale) by int(W · scale) cells, smaller at the border.

    Args:
        feature: (B, C, H, W).
        scale: Side of a window as a share of the map, in (0, 1].

    Returns:
        (B, C, h, w), 2x2 for a scale of 0.5 and even sides. Windows have at least one cell; without that bound the
        published code fails.
    """
    kernel = max(int(feature.shape[2] * scale), 1), max(int(feature.shape[3] * scale), 1)
    return F.max_pool2d(feature, kernel, stride=kernel, ceil_mode=True)


def pool_to_nodes(feature: Tensor, nodes: int) -> Tensor:
    """Max-pool to at most `nodes` by `nodes` nodes, with windows of equal size, smaller at the border.

    Args:
        feature: (B, C, H, W).
        nodes: Largest number of nodes along a side; a map without more cells than that does not change.
    """
    kernel = math.ceil(feature.shape[2] / nodes), math.ceil(feature.shape[3] / nodes)
    return F.max_pool2d(feature, kernel, stride=kernel, ceil_mode=True)


def affinity(feature: Tensor, published: bool = True) -> Tensor:
    """Cosine similarity between all pairs of nodes of each image.

    Args:
        feature: (B, C, H, W).
        published: Compute no gradient through the norm, as in the published code. The gradient then has a component
            along the node itself, which changes lengths without end and does not change the loss. Otherwise it is the
            gradient of the cosine.

    Returns:
        (B, H * W, H * W), in [-1, 1].
    """
    nodes = feature.flatten(2)
    if published:
        unit = nodes / (nodes.detach().square().sum(1, keepdim=True).sqrt() + PUBLISHED_EPS)
    else:
        unit = F.normalize(nodes, dim=1, eps=UNIT_EPS)
    return unit.transpose(1, 2) @ unit


def pair_wise(student: Tensor, teacher: Tensor, published: bool = True) -> Tensor:
    """Pair-wise distillation of maps that are already pooled to nodes (equation 3); widths may differ.

    L = Σ_{b,i,j} (a_ij^S − a_ij^T)² / (B · nodes²)

    Args:
        student: (B, C_student, h, w).
        teacher: (B, C_teacher, h, w); detached here.
        published: See `affinity`; it changes the gradient only.

    Returns:
        Scalar in [0, 4].

    Raises:
        ValueError: If batch or spatial sizes differ.
    """
    same_shape(student=student[:, :1], teacher=teacher[:, :1])
    return (affinity(student, published) - affinity(teacher.detach(), published)).square().mean()


class Structured(FeatureLoss):
    """Structured knowledge distillation: class scores at each point, similarities between pairs of nodes.

    Liu et al., "Structured Knowledge Distillation for Semantic Segmentation", CVPR 2019, arXiv 1903.04197, sections 3.1
    and 3.2; the authors' extension to dense prediction applies it to FCOS. The paper's adversarial training is the loss
    `holistic`: a recipe with both losses is the whole paper. Departures:

    - Pixel-wise: binary divergences instead of a softmax, because YOLO heads score classes independently; divided by
      the teacher's soft number of positive points, not summed over the batch (see `pixel_wise_sigmoid`).
    - Pair-wise: 10x10 nodes instead of 2x2, because the similarities of so few pooled maxima are all near one. Mean
      over levels. The paper averages within nodes, the published code takes the maximum; this loss follows the code,
      except that the norm of a node has a gradient (see `affinity`). With `nodes: 2` and even sides the loss equals
      the published one.
    - The published weights λ_pi = 10 and λ_pa = 0.5 belong to those sums; after this normalisation both start at 1.

    Args:
        lam_pi: Strength of the pixel-wise term, at least 0.
        lam_pa: Strength of the pair-wise term, at least 0.
        nodes: Largest number of nodes along a side of a map, a whole number of at least 2.
        levels: Levels of both terms, all by default.
    """

    name = "structured"
    columns = ("kpix_loss", "kpair_loss")
    reads = frozenset({"features", "scores"})
    teaches_classes = True
    paper = "Liu et al. 2019, arXiv 1903.04197"

    lam_pi: AtLeastZero = 1.0
    lam_pa: AtLeastZero = 1.0
    nodes: Annotated[int, Field(ge=2)] = 10

    def forward(self, inputs: LossInputs) -> dict[str, Tensor]:
        """Return the pixel-wise and the pair-wise term."""
        s, t = inputs.student, inputs.teacher
        same_shape(student=s.scores, teacher=t.scores)
        pixel = pixel_wise_sigmoid(self._scores(s), self._scores(t))
        pairs = []
        for i in self.level_indices:
            same_shape(student=s.features[i][:, :1], teacher=t.features[i][:, :1])
            # A maximum is exact in any precision, and few nodes are left to convert.
            student, teacher = (pool_to_nodes(x.features[i], self.nodes).float() for x in (s, t))
            pairs.append(pair_wise(student, teacher.contiguous(), published=False))
        pair = torch.stack(pairs).mean()
        return {"kpix_loss": PIXEL_GAIN * self.lam_pi * pixel, "kpair_loss": PAIR_GAIN * self.lam_pa * pair}

    def _scores(self, outputs: DetectorOutputs) -> Tensor:
        """Return the raw class logits of the points on the levels in use, (B, A, nc)."""
        if len(self.level_indices) == len(outputs.shapes):
            return outputs.scores
        per_level = outputs.per_level(outputs.scores)
        return torch.cat([per_level[i] for i in self.level_indices], 1)
