"""Where a script steps its optimizer and saves its model: the weights' average is updated, and saved beside
it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .run import SESSION


def stepped(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """An optimizer's step; those that accelerate leaves out (accumulation, an overflow in fp16) change
    nothing."""
    result = original(self, *args, **kwargs)
    run, accelerator = SESSION.on("ema"), SESSION.accelerator
    if run is None or run.ema is None or accelerator is None or self is not accelerator._optimizers[-1]:
        return result
    if accelerator.sync_gradients and not self.step_was_skipped:
        run.ema.update(accelerator)
    return result


def save_pipeline(
    original: Callable[..., Any], self: Any, save_directory: Any, *args: Any, **kwargs: Any
) -> Any:
    """A trained pipeline's folder, and in it ``unet_ema``, where diffusers' own ``--use_ema`` has it, too."""
    result = original(self, save_directory, *args, **kwargs)
    if (run := SESSION.on("ema")) and run.ema is not None and SESSION.called_by_script():
        with run.ema.applied():
            self.unet.save_pretrained(Path(save_directory) / "unet_ema")
        SESSION.reached("ema")
    return result


def save_lora(original: Callable[..., Any], cls: type, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
    """A LoRA's file, and another in the folder ``ema`` beside it. What is saved are the trained parameters
    themselves under other names, so each is known by where it lies."""
    result = original(cls, save_directory, *args, **kwargs)
    if (run := SESSION.on("ema")) and run.ema is not None and run.ema.begun:
        average = run.ema

        def averaged(value: Any) -> Any:
            if not isinstance(value, dict):
                return value
            return {
                name: average.of(tensor) if isinstance(tensor, torch.Tensor) else tensor
                for name, tensor in value.items()
            }

        given = {name: averaged(value) for name, value in kwargs.items()}
        original(cls, Path(save_directory) / "ema", *map(averaged, args), **given)
        SESSION.reached("ema")
    return result
