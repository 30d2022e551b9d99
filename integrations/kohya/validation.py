"""What kohya's trainers do that the stable and the held-out loss and the weights' average need to see, and
where their numbers go."""

from __future__ import annotations

import argparse
import contextlib
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from sdxl_fixes.errors import FixError
from sdxl_fixes.names import FLOW
from sdxl_fixes.trainers.ema import Average

from . import ema, heldout
from .run import AFTER_STEPS, SESSION

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
    if SESSION.run is not None and SESSION.run.heldout is not None:
        if SESSION.run.heldout.called(self, x):
            SESSION.reached("heldout")
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
    """The place of the previews, where both trainers come before the first step, once after every optimizer
    step (then without an epoch) and after every epoch, in every process and with the weights of a
    schedule-free optimizer that previews are made with."""
    run = SESSION.run
    if run is None:
        return original(pipe_class, accelerator, args, epoch, steps, *rest, **kwargs)
    SESSION.reached(AFTER_STEPS)
    if epoch == 0 and run.heldout is not None:
        _, vae, _, text_encoders, *_ = rest
        heldout.begin(accelerator, vae, text_encoders)
    if run.ema is not None:
        ema.watch(accelerator)
        if epoch is None:
            run.ema.update(accelerator)
    if epoch is None and (numbers := run.numbers(steps, accelerator)):
        _log(accelerator, args, numbers, steps)
    with contextlib.ExitStack() as stack:
        if run.ema is not None and run.flags.ema_evaluated:
            pipe_class = functools.partial(_averaged, run.ema, stack, pipe_class)
        return original(pipe_class, accelerator, args, epoch, steps, *rest, **kwargs)


def _averaged(
    average: Average, stack: contextlib.ExitStack, pipe_class: Any, *args: Any, **kwargs: Any
) -> Any:
    """The pipeline of previews, which is made when they are due, with the average's weights until they are
    done."""
    stack.enter_context(average.applied())
    return pipe_class(*args, **kwargs)


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
