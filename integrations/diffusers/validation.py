"""The call of the network: what it is told, and what the stable and the held-out loss need to see of it;
where their numbers go (the stable loss's latents come from ``schedule``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from .run import SESSION

if TYPE_CHECKING:
    from accelerate import Accelerator


def called(
    original: Callable[..., Any],
    self: torch.nn.Module,
    sample: torch.Tensor,
    timestep: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The U-Net's call; what follows the timestep is its conditioning."""
    if SESSION.run is not None and SESSION.run.stable_loss is not None:
        if SESSION.run.stable_loss.called(self, sample, *args, **kwargs):
            SESSION.reached("validation")
    if SESSION.run is not None and SESSION.run.heldout is not None:
        if SESSION.run.heldout.called(self, sample):
            SESSION.reached("heldout")
    if (told := _told(timestep)) is not None:
        SESSION.reached("UNet2DConditionModel.forward")
    return original(self, sample, timestep if told is None else told, *args, **kwargs)


def controls(
    original: Callable[..., Any],
    self: torch.nn.Module,
    sample: torch.Tensor,
    timestep: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The call of a ControlNet beside the U-Net."""
    told = _told(timestep)
    return original(self, sample, timestep if told is None else told, *args, **kwargs)


def _told(timestep: Any) -> torch.Tensor | None:
    """What the network is told of flow in place of the script's timesteps [B], rows of the schedule, within a
    training step; None elsewhere: pipelines and the stable loss tell T s by themselves."""
    run, rows = SESSION.on("schedule"), SESSION.step.timesteps
    if run is None or not run.noising.flow or rows is None or not isinstance(timestep, torch.Tensor):
        return None
    known = timestep.shape == rows.shape and not timestep.is_floating_point()
    return run.noising.told(timestep) if known else None


def log(
    original: Callable[..., Any],
    self: Accelerator,
    values: Any,
    step: int | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The script's log, which every process comes to after an optimizer step (and in some scripts after each
    micro-step, too)."""
    result = original(self, values, step, *args, **kwargs)
    run = SESSION.run
    if (
        run is None
        or not run.evaluated
        or step is None
        or not self.sync_gradients
        or not SESSION.called_by_script()
    ):
        return result
    if numbers := run.numbers(step, self):
        original(self, numbers, step)
    return result
