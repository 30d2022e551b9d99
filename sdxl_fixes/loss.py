"""Losses of the residual r = prediction - target: l2, l1, and the two pseudo-Huber forms with a delta per
sample (arXiv:2403.16728).

    l2         r^2                                       l1    |r|
    huber      2 delta (sqrt(r^2 + delta^2) - delta)     l2 near 0, 2 delta |r| far out
    smooth_l1  2 (sqrt(r^2 + delta^2) - delta)           the form of latent consistency models; 2 |r| far out

The names are kohya's. sqrt(r^2 + delta^2) - delta cancels to 0 in float32 below |r| = 1e-4, so it is computed
as r^2 / (sqrt(r^2 + delta^2) + delta); r^2 overflows from 1.8e19 on, so from 2^60 on, where it is one, the
loss goes on as a line.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from sdxl_fixes.names import HUBER_C, HUBER_KINDS, HUBER_SCALE, HUBER_SCHEDULE, HUBER_SCHEDULES
from sdxl_fixes.schedule import Array, NoiseSchedule
from sdxl_fixes.tensors import append_dims

_LINE = 2.0**60


def l2(residual: torch.Tensor) -> torch.Tensor:
    """r^2, elementwise."""
    return residual**2


def l1(residual: torch.Tensor) -> torch.Tensor:
    """|r|, elementwise."""
    return residual.abs()


def smooth_l1(residual: torch.Tensor, delta: torch.Tensor | float) -> torch.Tensor:
    """2 (sqrt(r^2 + delta^2) - delta), elementwise; ``delta`` > 0 broadcasts against the residual."""
    square = residual.clamp(-_LINE, _LINE) ** 2
    beyond = torch.relu(residual.abs() - _LINE)  # 0 but there, and adds no gradient
    return 2 * square / (torch.sqrt(square + delta**2) + delta) + 2 * beyond


def huber(residual: torch.Tensor, delta: torch.Tensor | float) -> torch.Tensor:
    """2 delta (sqrt(r^2 + delta^2) - delta), elementwise; ``delta`` > 0 broadcasts against the residual."""
    return delta * smooth_l1(residual, delta)


class LossFunction(Protocol):
    """What a step's loss asks: a delta of every timestep, or None, and the loss of each element."""

    def delta(self, schedule: NoiseSchedule) -> Array | None: ...

    def __call__(
        self,
        prediction: torch.Tensor,
        target: torch.Tensor,
        delta: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
    ) -> torch.Tensor: ...


@dataclass(frozen=True)
class Loss:
    """An elementwise loss without parameters: ``l2`` or ``l1``."""

    kind: str = "l2"

    def __post_init__(self) -> None:
        if self.kind not in ("l2", "l1"):
            raise ValueError(
                f"unknown loss {self.kind!r}: expected l2 or l1, or ScheduledHuber for "
                f"{' and '.join(HUBER_KINDS)}"
            )

    def delta(self, schedule: NoiseSchedule) -> Array | None:
        """The loss has no delta."""
        return None

    def __call__(
        self,
        prediction: torch.Tensor,
        target: torch.Tensor,
        delta: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Loss of each element, float32, shape of ``prediction`` [B, ...]; ``mask`` (broadcastable, 0 to 1)
        multiplies it."""
        residual = prediction.float() - target.float()
        return _masked(l2(residual) if self.kind == "l2" else l1(residual), mask)


@dataclass(frozen=True)
class ScheduledHuber:
    """A pseudo-Huber loss whose delta follows the noise level of each sample.

    schedule     constant     delta = c scale
                 exponential  delta = c^(t/T) scale                         (1 to c)
                 snr          delta = ((1 - c)/(1 + sigma_t)^2 + c) scale   (near 1 to c; exactly c at SNR 0)
    l2_gradient  A smaller delta also shrinks the gradient, so a learning rate tuned for l2 is too low. This
                 keeps the norm of the gradient at the prediction what l2 would give, leaving its shape to
                 Huber: "sample" for each sample (a bad image then counts as much as under l2, bad pixels in
                 it do not), "batch" for the batch as a whole (bad images count less, too; pass the
                 ``weights`` that will multiply each sample's loss). No gradient flows through the factor.
    """

    kind: str = "huber"
    schedule: str = HUBER_SCHEDULE
    c: float = HUBER_C
    scale: float = HUBER_SCALE
    l2_gradient: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in HUBER_KINDS:
            raise ValueError(f"unknown Huber loss {self.kind!r}: expected one of {', '.join(HUBER_KINDS)}")
        if self.schedule not in HUBER_SCHEDULES:
            raise ValueError(
                f"unknown huber_schedule {self.schedule!r}: expected one of {', '.join(HUBER_SCHEDULES)}"
            )
        for name in ("c", "scale"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"huber_{name} must be a positive number, got {value}")
        if self.l2_gradient not in (None, "sample", "batch"):
            raise ValueError(f"unknown l2_gradient {self.l2_gradient!r}: expected sample, batch or None")

    def delta(self, schedule: NoiseSchedule) -> Array:
        """Delta of every timestep, float64, shape [T]."""
        c = self.c
        if self.schedule == "exponential":
            delta = c ** (np.arange(len(schedule)) / len(schedule))
        elif self.schedule == "snr":
            delta = (1 - c) / (1 + schedule.sigmas) ** 2 + c
        else:
            delta = np.full(len(schedule), c)
        return delta * self.scale

    def __call__(
        self,
        prediction: torch.Tensor,
        target: torch.Tensor,
        delta: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Loss of each element, float32, shape of ``prediction`` [B, ...]; ``delta`` has shape [B] or
        broadcasts; ``mask`` (broadcastable, 0 to 1) multiplies the loss; ``weights`` [B], which the caller
        will apply, matter to l2_gradient="batch" only. Raises ValueError without a delta."""
        if delta is None:
            raise ValueError("a Huber loss needs delta: look it up in delta(schedule) at the timesteps")
        residual = prediction.float() - target.float()
        delta = delta.float()
        delta = append_dims(delta, residual.ndim) if delta.ndim == 1 else delta
        loss = _masked(huber(residual, delta) if self.kind == "huber" else smooth_l1(residual, delta), mask)
        return (
            loss if self.l2_gradient is None else loss * self._gain(residual.detach(), delta, mask, weights)
        )

    def _gain(
        self,
        residual: torch.Tensor,
        delta: torch.Tensor,
        mask: torch.Tensor | None,
        weights: torch.Tensor | None,
    ) -> torch.Tensor:
        """|gradient of l2| / |gradient of this loss|, per sample or for the batch; 1 where both are 0."""
        slope = residual / torch.sqrt(residual**2 + delta**2) * (delta if self.kind == "huber" else 1.0)
        shares = torch.ones_like(residual) if weights is None else append_dims(weights, residual.ndim)
        over = list(range(1 if self.l2_gradient == "sample" else 0, residual.ndim))
        wanted, got = (
            (_masked(x, mask) * shares).square().sum(over, keepdim=True).sqrt() for x in (residual, slope)
        )
        return torch.where(got > 0, wanted / got.clamp_min(torch.finfo(got.dtype).tiny), torch.ones_like(got))


def _masked(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return values if mask is None else values * mask
