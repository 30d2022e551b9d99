"""Kohya's SNR weights, from the run's schedule instead of the scheduler's cached table; one lookup per batch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from sdxl_fixes.schedule import NoiseSchedule
from sdxl_fixes.tables import Table
from sdxl_fixes.weighting import Debiased, EpsilonLike, MinSNR, PlusVLike, Weighting

from .run import SESSION, Run


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


def sample_weights(run: Run, timesteps: torch.Tensor) -> torch.Tensor | None:
    """What the step will multiply each sample's loss by: the weights of all flags and of the timestep sampler, [B]; None for 1."""
    chosen = run.weightings if "weighting" in run.on else ()
    parts = [weight_table(weighting, run.schedule, run.prediction_type)(timesteps) for weighting in chosen]
    importance = run.timesteps.weights(timesteps) if run.timesteps and "timesteps" in run.on else None
    parts += [] if importance is None else [importance]
    return functools.reduce(torch.mul, parts) if parts else None


def _weighted(loss: torch.Tensor, timesteps: torch.Tensor, run: Run, weighting: Weighting) -> torch.Tensor:
    return loss * weight_table(weighting, run.schedule, run.prediction_type)(timesteps)


@functools.lru_cache(maxsize=8)
def weight_table(weighting: Weighting, schedule: NoiseSchedule, prediction_type: str) -> Table:
    """Weight of every timestep."""
    return Table(weighting.table(schedule, prediction_type))
