"""Kohya's loss of a step: what its functions are told is handed to the one :class:`StepLoss`, which knows
delta, weights and masks.

Kohya spreads a step's loss over four functions. Here ``conditional_loss`` returns it with the weights in it,
``apply_masked_loss`` computes it again with the mask (a gain that follows l2's gradient depends on it), and
the weighting functions find their work done.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from sdxl_fixes.errors import FixError
from sdxl_fixes.trainers.run import Run

from .run import SESSION

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

ACTS = frozenset(("loss", "weighting", "timesteps", "keep"))


def batch(original: Callable[..., Any], self: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
    """The network trainer's batch, whose loss weights (of regularisation images) it will apply after ours."""
    run = SESSION.run
    if run is not None and getattr(run.step_loss.function, "l2_gradient", None) == "batch":
        SESSION.step.later = batch.get("loss_weights")
    return original(self, batch, *args, **kwargs)


def threshold(
    original: Callable[..., torch.Tensor | None],
    args: argparse.Namespace,
    timesteps: torch.Tensor,
    noise_scheduler: SchedulerMixin,
    **kwargs: Any,
) -> torch.Tensor | None:
    """Delta of each sample, float32, [B], on the timesteps' device; our loss looks it up by itself.
    (Upstream's, with v-prediction on an accelerator, indexes a table there with timesteps here and stops, and
    forgets --huber_scale.)"""
    run = SESSION.on("loss")
    return (
        original(args, timesteps, noise_scheduler, **kwargs)
        if run is None
        else run.step_loss.delta(timesteps)
    )


def conditional_loss(
    original: Callable[..., torch.Tensor],
    model_pred: torch.Tensor,
    target: torch.Tensor,
    loss_type: str,
    reduction: str,
    huber_c: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """The step's loss, weights included; each element's where ``reduction`` is "none"."""
    run = SESSION.run
    if run is None or not run.on & ACTS:
        return original(model_pred, target, loss_type, reduction, huber_c, **kwargs)
    values = None
    if SESSION.step.answer is not None and run.keep is not None:
        target = run.keep.target(SESSION.step, model_pred, target)
        SESSION.reached("keep")
    if "loss" not in run.on:
        values = original(model_pred, target, loss_type, "none", huber_c, **kwargs)
    elif loss_type != run.flags.loss_type:
        raise FixError(
            f"the trainer asks for the loss {loss_type!r}, --loss_type is "
            f"{run.flags.loss_type}: give --fixes all,-loss"
        )
    SESSION.step.residual = (model_pred, target, values)
    for mark in ("loss", "weighting", "conditional_loss"):
        SESSION.reached(mark)
    SESSION.step.loss = _loss(run, None, reduction)
    return SESSION.step.loss


def masked(original: Callable[..., torch.Tensor], loss: torch.Tensor, batch: Any) -> torch.Tensor:
    """The loss of each element under the batch's mask."""
    run = SESSION.run
    if run is None or SESSION.step.residual is None:
        return original(loss, batch)
    if loss is not SESSION.step.loss:
        raise FixError(
            "the trainer changes the loss before its mask, which this plugin does not expect: give --fixes "
            "all,-loss,-weighting,-timesteps"
        )
    SESSION.reached("apply_masked_loss")
    return _loss(run, original(torch.ones_like(loss), batch), "none")


def weighted(
    original: Callable[..., torch.Tensor],
    loss: torch.Tensor,
    timesteps: torch.Tensor,
    noise_scheduler: SchedulerMixin,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    """Upstream's place for an SNR weight, which the loss has already."""
    if SESSION.on("weighting") is None:
        return original(loss, timesteps, noise_scheduler, *args, **kwargs)
    SESSION.reached(original.__name__)
    return loss


def _loss(run: Run, mask: torch.Tensor | None, reduction: str) -> torch.Tensor:
    step = SESSION.step
    assert step.residual is not None
    prediction, target, values = step.residual
    timesteps = step.of(prediction)
    importance = run.timesteps.weights(timesteps) if run.timesteps is not None and step.sampled else None
    later = None if step.later is None else step.later.to(timesteps.device)
    return run.step_loss(prediction, target, timesteps, mask, importance, later, values, reduction)
