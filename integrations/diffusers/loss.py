"""The one loss call of the scripts, F.mse_loss: the step's loss, as the flags ask for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sdxl_fixes.errors import FixError

from .run import BY_TIMESTEP, SESSION, without_them


def mse_loss(
    original: Callable[..., Any], input: torch.Tensor, target: torch.Tensor, *args: Any, **kwargs: Any
) -> Any:
    """Loss of the script's prediction [B, C, H, W], reduced as the script asks; anybody else's call is
    upstream's.

    With prior preservation there are two calls a step, one for each half of the batch: each half is a loss of
    its own, which the script adds up with its own weight."""
    run, step = SESSION.run, SESSION.step
    if run is None or step.timesteps is None or not SESSION.called_by_script():
        return original(input, target, *args, **kwargs)
    timesteps, step.noised = step.of(input), False
    step.counted += len(input) if torch.is_grad_enabled() else 0
    if step.counted > len(step.timesteps) and run.on & BY_TIMESTEP:
        raise FixError(
            "F.mse_loss was called again after the loss of a step's latents, and which of them is the step's "
            f"is not known: give --fixes {without_them(run)}"
        )
    if step.answer is not None and run.keep is not None:
        target = run.keep.target(step, input, target)
        SESSION.reached("keep")
    importance = None if run.timesteps is None else run.timesteps.weights(timesteps, step.size)
    for mark in ("loss", "weighting", "mse_loss"):
        SESSION.reached(mark)
    return run.step_loss(
        input, target, timesteps, importance=importance, reduction=kwargs.get("reduction", "mean")
    )
