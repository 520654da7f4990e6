"""Holistic distillation: a critic distinguishes teacher from student by whole score maps (Liu et al., 2019)."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from yolo_kd.losses.base import AboveZero, FeatureLoss
from yolo_kd.losses.kernels.chunked import sum_in_chunks
from yolo_kd.losses.kernels.ops import averaging, same_shape
from yolo_kd.structures import DetectorOutputs, LossInputs, PairSpec

STRENGTH = 0.1  # published λ, for student and critic alike
CRITIC_SIDE = 64  # cells along a side of the critic's input, close to the published 65
PENALTY = 10.0  # λ_gp


def critic_loss(student: Tensor, teacher: Tensor, form: str = "wgan-gp") -> Tensor:
    """Loss of the critic: it asks for high answers for the teacher and low ones for the student (equation 4).

    Args:
        student: Answers to the student's score maps, any shape.
        teacher: Answers to the teacher's score maps, the same shape.
        form: `wgan-gp`: mean D(S) − mean D(T). `hinge`: mean max(0, 1 − D(T)) + mean max(0, 1 + D(S)).

    Raises:
        ValueError: If shapes differ.
    """
    same_shape(student=student, teacher=teacher)
    if form == "hinge":
        return F.relu(1 - teacher).mean() + F.relu(1 + student).mean()
    return student.mean() - teacher.mean()


def adversarial_loss(student: Tensor) -> Tensor:
    """Loss of the student in either form: −mean D(S)."""
    return -student.mean()


def gradient_penalty(critic: nn.Module, student: Tensor, teacher: Tensor, blend: Tensor) -> Tensor:
    """Mean of (‖∇D‖₂ − 1)² at random points between the two models' maps, without λ_gp.

    Args:
        critic: Maps (B, C, H, W) to answers.
        student: (B, C, H, W).
        teacher: (B, C, H, W).
        blend: (B, 1, 1, 1) share of the teacher, uniform in [0, 1].
    """
    between = torch.lerp(student, teacher, blend).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)

    def chunk_sum(g: Tensor) -> tuple[Tensor, Tensor]:
        g = g.detach()
        norm = g.norm(dim=1, keepdim=True)
        slope = ((norm - 1) / norm).nan_to_num_(0.0, 0.0, 0.0)  # a gradient of zero has no direction
        return (norm - 1).square().sum() / len(student), slope.mul_(2 / len(student)) * g

    return sum_in_chunks(chunk_sum, gradient.flatten(1))


class SpectralConv2d(nn.Conv2d):
    """Convolution whose weight is divided by its largest singular value, estimated by power iteration in training."""

    u: Tensor

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.register_buffer("u", F.normalize(torch.randn(self.out_channels), dim=0))
        for _ in range(15):
            self._iterate()

    def _iterate(self) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            weight = self.weight.flatten(1)
            v = F.normalize(weight.T @ self.u, dim=0)
            u = F.normalize(weight @ v, dim=0)
            if self.training:
                self.u.copy_(u)
        return u, v

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution."""
        u, v = self._iterate()
        return self._conv_forward(x, self.weight / (u @ self.weight.flatten(1) @ v), self.bias)


class SelfAttention(nn.Module):
    """x + γ · attention over all cells; γ starts at zero."""

    def __init__(self, channels: int):
        super().__init__()
        self.query, self.key = nn.Conv2d(channels, channels // 8, 1), nn.Conv2d(channels, channels // 8, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor like x, (B, C, H, W)."""
        q, k, v = self.query(x).flatten(2), self.key(x).flatten(2), self.value(x).flatten(2)
        attention = (q.transpose(1, 2) @ k).softmax(-1)
        return x + self.gamma * (v @ attention.transpose(1, 2)).view_as(x)


class Critic(nn.Module):
    """One answer for a whole score map: (B, C, 64, 64) to (B, 1, 1, 1).

    Input normalisation, four convolutions with spectral norm that halve the map, attention after the last two of them,
    and a convolution over the whole remaining map.
    """

    def __init__(self, channels: int, width: int = 64):
        super().__init__()
        widths = (channels, width, 2 * width, 4 * width, 8 * width)
        layers: list[nn.Module] = [nn.BatchNorm2d(channels, track_running_stats=False)]
        for i in range(4):
            layers += [SpectralConv2d(widths[i], widths[i + 1], 4, 2, 1), nn.LeakyReLU(0.1)]
            layers += [SelfAttention(widths[i + 1])] if i >= 2 else []
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, CRITIC_SIDE // 16))

    def forward(self, maps: Tensor) -> Tensor:
        """Return the answers."""
        return self.layers(maps)


class Adversary(nn.Module):
    """The critic with its own optimiser: SGD, momentum 0.9, weight decay 1e-4.

    Momenta are buffers of this module, so that they move with it and a resumed run has them.

    Args:
        channels: Channels of the score maps.
        lr: Learning rate at the start of the training; it falls as (1 − progress)^0.9.
        form: See `critic_loss`.
    """

    def __init__(self, channels: int, lr: float, form: str):
        super().__init__()
        self.critic = Critic(channels)
        for i, parameter in enumerate(self.critic.parameters()):
            self.register_buffer(f"momentum_{i}", torch.zeros_like(parameter))
        self.lr, self.form = lr, form
        self._watched: list[tuple[Tensor, Tensor, float]] = []
        self._optimiser: torch.optim.SGD | None = None

    def answer(self, maps: Tensor) -> Tensor:
        """Return the critic's answers, (B, 1, 1, 1), with gradient to the maps and none to the critic."""
        self.critic.eval()
        self.critic.requires_grad_(False)
        try:
            return self.critic(maps)
        finally:
            self.critic.requires_grad_(True)

    def watch(self, student: Tensor, teacher: Tensor, progress: float, continues: bool = False) -> None:
        """Keep the maps that the next `step` learns from; `continues` adds them to those of the same batch."""
        self._watched = [*(self._watched if continues else []), (student.detach(), teacher.detach(), progress)]

    def step(self) -> None:
        """Train the critic once on the last maps, if there are any."""
        if not self._watched:
            return
        students, teachers, (progress, *_) = zip(*self._watched, strict=True)
        student, teacher = torch.cat(students), torch.cat(teachers)
        self._watched = []
        self.critic.train()
        with torch.enable_grad():
            loss = critic_loss(self.critic(student), self.critic(teacher), self.form)
            if self.form == "wgan-gp":
                blend = torch.rand(len(student), 1, 1, 1, device=student.device, dtype=student.dtype)
                loss = loss + PENALTY * gradient_penalty(self.critic, student, teacher, blend)
            (STRENGTH * loss).backward(inputs=list(self.critic.parameters()))  # the maps need no gradient
        if dist.is_available() and dist.is_initialized():
            for parameter in self.critic.parameters():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad.div_(dist.get_world_size()))
        optimiser = self._make_optimiser() if self._optimiser is None else self._optimiser
        optimiser.param_groups[0]["lr"] = self.lr * max(1 - progress, 0) ** 0.9
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    def _make_optimiser(self) -> torch.optim.SGD:
        """Make the optimiser at the first step, once the device is settled. It writes to this module's buffers."""
        self._optimiser = torch.optim.SGD(self.critic.parameters(), self.lr, momentum=0.9, weight_decay=1e-4)
        for i, parameter in enumerate(self.critic.parameters()):
            self._optimiser.state[parameter]["momentum_buffer"] = self.get_buffer(f"momentum_{i}")
        return self._optimiser


def score_maps(outputs: DetectorOutputs, levels: tuple[int, ...]) -> Tensor:
    """Return the class logits of some levels as one square map, (B, levels * nc, 64, 64), float32.

    Logits that overflowed count as zero. Products with two small matrices replace adaptive average pooling and are many
    times faster.
    """
    per_level = outputs.per_level(outputs.scores.nan_to_num(0.0, 0.0, 0.0))
    planes = []
    for i in levels:
        plane = per_level[i].transpose(1, 2).unflatten(-1, outputs.shapes[i]).float()
        rows, columns = (averaging(n, CRITIC_SIDE, plane) for n in outputs.shapes[i])
        planes.append(rows @ (plane @ columns.T))
    return torch.cat(planes, dim=1)


class Holistic(FeatureLoss):
    """Adversarial distillation of whole score maps, the third loss of structured knowledge distillation.

    Liu et al., "Structured Knowledge Distillation for Semantic Segmentation", CVPR 2019, arXiv 1903.04197, section 3.3.
    The term is mean D(T) − mean D(S): −mean D(S) as published, plus a summand that is constant for the student. With
    it, zero means that the critic cannot distinguish the two. The term may be negative, and its gradient need not
    vanish where student and teacher agree, because that depends on the critic. Departures:

    - The paper conditions the critic on the image. The published code shows it the score maps alone, and so does this
      loss.
    - A published map has 65x65 cells. Here each level is averaged or repeated to 64x64 cells, and levels are stacked.
    - The critic's input is always normalised with the statistics of the batch, and power iteration runs only in the
      critic's step, so that the student's loss is a function of its inputs. For that loss the critic runs in the
      precision of the student's layers; it is trained in float32.

    The critic has its own optimiser, which steps in `after_step` on the last batch that passed `forward` with gradient.
    That costs time and adds the instability of adversarial training. Of the shipped recipes only `structured_holistic`
    uses it.

    Args:
        critic_lr: Learning rate of the critic, above 0; it falls as (1 − progress)^0.9.
        form: `wgan-gp` or `hinge`, see `critic_loss`.
        levels: Levels to judge, all by default.
    """

    name = "holistic"
    columns = ("kholi_loss",)
    reads = frozenset({"scores"})
    teaches_classes = True
    paper = "Liu et al. 2019, arXiv 1903.04197"

    critic_lr: AboveZero = 4e-4
    form: Literal["wgan-gp", "hinge"] = "wgan-gp"

    def build(self, pair: PairSpec) -> None:
        """Make the critic."""
        super().build(pair)
        self.adversary = Adversary(pair.nc * len(self.level_indices), self.critic_lr, self.form)

    def self_trained(self) -> list[nn.Parameter]:
        """Return the critic's parameters."""
        return list(self.adversary.parameters())

    def after_step(self) -> None:
        """Train the critic once."""
        self.adversary.step()

    def forward(self, inputs: LossInputs) -> dict[str, Tensor]:
        """Return the only term, and keep the maps for the critic's next step."""
        same_shape(student=inputs.student.scores, teacher=inputs.teacher.scores)
        student = score_maps(inputs.student, self.level_indices)
        with torch.no_grad():
            teacher = score_maps(inputs.teacher, self.level_indices)
            reference = adversarial_loss(inputs.layer(self.adversary.answer, teacher))
        if student.requires_grad:
            self.adversary.watch(student, teacher, inputs.progress, inputs.continues)
        return {"kholi_loss": STRENGTH * (adversarial_loss(inputs.layer(self.adversary.answer, student)) - reference)}
