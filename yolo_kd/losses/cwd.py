"""Channel-wise distillation: where in the image each channel responds (Shu et al., ICCV 2021)."""

from __future__ import annotations

from torch import Tensor

from yolo_kd.losses.base import AboveZero, FeatureLoss
from yolo_kd.losses.kernels.channel_stats import standardising
from yolo_kd.losses.kernels.chunked import converted, sum_in_chunks
from yolo_kd.losses.kernels.ops import same_shape
from yolo_kd.losses.kernels.softmax_kl import softmax_kl
from yolo_kd.structures import LossInputs


def cwd(student: Tensor, teacher: Tensor, temperature: float = 1.0, standardised: bool = False) -> Tensor:
    """Divergence between the spatial distributions of each channel.

    L = τ² / (B C) Σ_b Σ_c KL(softmax_hw(t_bc / τ) ‖ softmax_hw(s_bc / τ))

    This is the paper's loss, including τ², which keeps the size of the gradient. C is the number of channels compared,
    the teacher's. A widespread detection port minimises cross-entropy instead and divides by the student's original
    width: its loss does not vanish at agreement, and its gradient is larger by C_teacher / C_student.

    Args:
        student: (B, C, H, W), already at the teacher's width.
        teacher: (B, C, H, W); detached here.
        temperature: τ, above zero. A larger one spreads the attention over more cells.
        standardised: Rescale each channel of both maps to mean 0 and variance 1 over the batch first.

    Returns:
        Scalar in nats, at least 0; zero if each channel differs at most by a constant.

    Raises:
        ValueError: If shapes differ.
    """
    same_shape(student=student, teacher=teacher)
    count = student.shape[0] * student.shape[1]
    factors = None
    if standardised:
        s_scale, t_scale = standardising(student), standardising(teacher)
        student = s_scale.through(student)
        # A softmax does not depend on the mean, so that the factor is all it needs of the rescaling.
        factors = s_scale.factor[:, None, None], t_scale.factor[:, None, None]
    overwrite = converted(student, teacher)

    def chunk_sum(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return softmax_kl(s, t, temperature, (2, 3), overwrite, factors)

    return sum_in_chunks(chunk_sum, student, teacher) / count


class CWD(FeatureLoss):
    """Channel-wise distillation of the heads' input features, summed over levels.

    Shu, Liu, Gao, Yan and Shen, "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021, arXiv
    2011.13256, the section on channel-wise distillation. One departure: both maps may be standardised first, as
    DAMO-YOLO does for its necks. The size of the activations sets how sharp a softmax over raw features is, and it
    differs from layer to layer. Standardisation gives τ the same meaning everywhere.

    The published form is a mean over images and channels of a divergence between distributions. It does not grow with
    batch size, width or image size.

    Args:
        temperature: τ, above 0. The paper uses 4 for segmentation; detection ports use 1.
        standardise: Rescale each channel of both maps to mean 0 and variance 1 over the batch first. False is the
            published form; its strength depends on the teacher's activations, and under a COCO-trained YOLOv8s it is
            about 35 times weaker.
        levels: Levels to use, all by default.
    """

    name = "cwd"
    columns = ("cwd_loss",)
    reads = frozenset({"features"})
    adapter = "conv1x1"
    paper = "Shu et al. 2021, arXiv 2011.13256"
    strength = 0.35

    temperature: AboveZero = 1.0
    standardise: bool = True

    def level_loss(self, inputs: LossInputs, level: int) -> Tensor:
        """Return the divergence of one level."""
        return cwd(*self.maps(inputs, level), self.temperature, self.standardise)
