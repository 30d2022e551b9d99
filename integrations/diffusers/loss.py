"""The one loss call of the scripts, F.mse_loss, with the loss and the weights that the flags ask for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sdxl_fixes.trainers.run import Run, delta_table

from .run import SESSION


def mse_loss(original: Callable[..., Any], input: torch.Tensor, target: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Loss of the script's prediction [B, C, H, W], reduced as the script asks; anybody else's call is upstream's."""
    run = SESSION.run
    if run is None or "timesteps" not in run.step or not SESSION.called_by_script():
        return original(input, target, *args, **kwargs)
    timesteps = _timesteps(run, len(input))
    if run.timesteps is not None and run.timesteps.weights(timesteps) is not None:
        SESSION.on("timesteps")
    weights = run.sample_weights(timesteps)
    SESSION.on("weighting")
    if SESSION.on("loss"):
        loss = run.settings.loss()
        table = delta_table(loss, run.schedule)
        delta = None if table is None else table(timesteps)
        values = loss(input, target, delta, weights=weights)  # type: ignore[arg-type]
    else:
        values = original(input, target, reduction="none")
    if weights is not None:
        values = values * weights.reshape(-1, *[1] * (values.ndim - 1))
    reduction = kwargs.get("reduction", "mean")
    return values if reduction == "none" else values.sum() if reduction == "sum" else values.mean()


def _timesteps(run: Run, count: int) -> torch.Tensor:
    """Those of the ``count`` samples of this call. With prior preservation there are two calls a step: first the prior half, whose
    timesteps come second, then the instance half. Both are weighted: a weight belongs to a timestep."""
    drawn: torch.Tensor = run.step["timesteps"]
    if count == len(drawn):
        return drawn
    if 2 * count != len(drawn):
        raise RuntimeError(
            f"sdxl-fixes: the loss is of {count} samples and {len(drawn)} were noised, so their timesteps are not known: "
            "give --fixes all,-loss,-weighting,-timesteps"
        )
    instance, prior = drawn.chunk(2)
    run.step["prior"] = not run.step["prior"]
    return prior if run.step["prior"] else instance
