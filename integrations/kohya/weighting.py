"""Kohya's SNR weights, from the run's schedule instead of the scheduler's cached table; one lookup per batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sdxl_fixes.trainers.run import Run, weight_table
from sdxl_fixes.weighting import Debiased, EpsilonLike, MinSNR, PlusVLike, Weighting

from .run import SESSION


def min_snr(
    original: Callable[..., torch.Tensor],
    loss: torch.Tensor,
    timesteps: torch.Tensor,
    noise_scheduler: Any,
    gamma: float,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    """min-SNR, finite at SNR 0, with the floor if asked for."""
    if run := SESSION.on("weighting"):
        return _weighted(loss, timesteps, run, MinSNR(gamma, run.settings.min_snr_floor))
    return original(loss, timesteps, noise_scheduler, gamma, *args, **kwargs)


def debiased(
    original: Callable[..., torch.Tensor], loss: torch.Tensor, timesteps: torch.Tensor, noise_scheduler: Any, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """Debiased estimation, capped at SNR 0."""
    if run := SESSION.on("weighting"):
        return _weighted(loss, timesteps, run, Debiased())
    return original(loss, timesteps, noise_scheduler, *args, **kwargs)


def epsilon_like(
    original: Callable[..., torch.Tensor], loss: torch.Tensor, timesteps: torch.Tensor, noise_scheduler: Any, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """The v loss with the eps loss's weight."""
    if run := SESSION.on("weighting"):
        return _weighted(loss, timesteps, run, EpsilonLike())
    return original(loss, timesteps, noise_scheduler, *args, **kwargs)


def plus_v_like(
    original: Callable[..., torch.Tensor],
    loss: torch.Tensor,
    timesteps: torch.Tensor,
    noise_scheduler: Any,
    v_pred_like_loss: float,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    """The eps loss plus a share of it weighted as a v loss, capped at SNR 0."""
    if run := SESSION.on("weighting"):
        return _weighted(loss, timesteps, run, PlusVLike(v_pred_like_loss))
    return original(loss, timesteps, noise_scheduler, v_pred_like_loss, *args, **kwargs)


def _weighted(loss: torch.Tensor, timesteps: torch.Tensor, run: Run, weighting: Weighting) -> torch.Tensor:
    return loss * weight_table(weighting, run.schedule, run.prediction_type)(timesteps)
