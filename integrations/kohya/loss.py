"""Kohya's Huber threshold and elementwise loss."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from sdxl_fixes.loss import HUBER_KINDS, ScheduledHuber
from sdxl_fixes.trainers.run import delta_table

from .run import SESSION


def threshold(
    original: Callable[..., torch.Tensor | None], args: argparse.Namespace, timesteps: torch.Tensor, noise_scheduler: Any, **kwargs: Any
) -> torch.Tensor | None:
    """Delta of each sample, float32, shape [B], on the timesteps' device."""
    run = SESSION.on("loss")
    loss = run.settings.loss() if run else None
    if run is None or not isinstance(loss, ScheduledHuber):
        return original(args, timesteps, noise_scheduler, **kwargs)
    if loss.l2_gradient == "batch":
        run.step["weights"] = run.sample_weights(timesteps)
    table = delta_table(loss, run.schedule)
    return None if table is None else table(timesteps)


def conditional_loss(
    original: Callable[..., torch.Tensor],
    model_pred: torch.Tensor,
    target: torch.Tensor,
    loss_type: str,
    reduction: str,
    huber_c: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """huber and smooth_l1 in the form that does not cancel; l2 and l1 stay upstream's."""
    run = SESSION.on("loss") if loss_type in HUBER_KINDS else None
    loss = run.settings.loss() if run else None
    if huber_c is None or not isinstance(loss, ScheduledHuber):
        return original(model_pred, target, loss_type, reduction, huber_c, **kwargs)
    values = loss(model_pred, target, huber_c, weights=run.step.pop("weights", None) if run else None)
    return values if reduction == "none" else values.sum() if reduction == "sum" else values.mean()


def importance(
    original: Callable[..., torch.Tensor],
    model_pred: torch.Tensor,
    target: torch.Tensor,
    loss_type: str,
    reduction: str,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    """The loss (ours or upstream's) times the importance weight of each sample whose timestep our sampler drew."""
    run = SESSION.on("timesteps")
    drawn = run.step.pop("timesteps", None) if run else None
    weights = run.timesteps.weights(drawn) if run and run.timesteps and drawn is not None else None
    if weights is None:
        return original(model_pred, target, loss_type, reduction, *args, **kwargs)
    loss = original(model_pred, target, loss_type, "none", *args, **kwargs) * weights.reshape(-1, *[1] * (model_pred.ndim - 1))
    return loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.mean()
