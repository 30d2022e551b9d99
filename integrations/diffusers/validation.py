"""What the scripts do that the stable training loss needs to see, and where its numbers go (its latents come
from ``schedule``)."""

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
    return original(self, sample, timestep, *args, **kwargs)


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
        or run.stable_loss is None
        or step is None
        or not self.sync_gradients
        or not SESSION.called_by_script()
    ):
        return result
    if numbers := run.stable_loss.step(step, self):
        original(self, numbers, step)
    return result
