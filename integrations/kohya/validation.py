"""What kohya's trainers do that the stable training loss needs to see, and where its numbers go."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from sdxl_fixes.errors import FixError
from sdxl_fixes.names import FLOW

from .run import SESSION

if TYPE_CHECKING:
    from accelerate import Accelerator


_EXACT = (torch.float32, torch.float64)


def called(
    original: Callable[..., Any],
    self: torch.nn.Module,
    x: torch.Tensor,
    timesteps: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The U-Net's call; what follows the timesteps is its conditioning."""
    run = SESSION.on("schedule")
    trains_flow = run is not None and run.noising.flow and torch.is_grad_enabled()
    if trains_flow and timesteps.dtype not in _EXACT:
        raise FixError(
            f"{FLOW} tells the U-Net timesteps in float32, and they came to it as {timesteps.dtype}, which "
            "rounds them (DeepSpeed with fp16 casts what a model is given): train without it, or in bf16"
        )
    if SESSION.run is not None and SESSION.run.stable_loss is not None:
        if SESSION.run.stable_loss.called(self, x, *args, **kwargs):
            SESSION.reached("validation")
    return original(self, x, timesteps, *args, **kwargs)


def step_done(
    original: Callable[..., Any],
    pipe_class: Any,
    accelerator: Accelerator,
    args: argparse.Namespace,
    epoch: int | None,
    steps: int,
    *rest: Any,
    **kwargs: Any,
) -> Any:
    """The place of the previews, where both trainers come once after every optimizer step (then without an
    epoch), in every process and with the weights of a schedule-free optimizer that previews are made with."""
    if epoch is None and SESSION.run is not None and SESSION.run.stable_loss is not None:
        if numbers := SESSION.run.stable_loss.step(steps, accelerator):
            _log(accelerator, args, numbers, steps)
    return original(pipe_class, accelerator, args, epoch, steps, *rest, **kwargs)


def _log(accelerator: Accelerator, args: argparse.Namespace, numbers: dict[str, float], step: int) -> None:
    """To the trackers as the script writes its own loss: the network trainer counts wandb's steps by calls,
    and tells the step beside."""
    if not hasattr(args, "network_module"):
        accelerator.log(numbers, step=step)
        return
    for tracker in accelerator.trackers:
        if tracker.name == "wandb":
            tracker.log({**numbers, "global_step": step})
        else:
            tracker.log(numbers, step=step)
