"""Where kohya's trainers save a model: the weights' average is saved beside it by the same function."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sdxl_fixes.errors import FixError
from sdxl_fixes.trainers.run import Run

from .run import SESSION

if TYPE_CHECKING:
    from accelerate import Accelerator


def save(original: Callable[..., Any], output: str, *args: Any, **kwargs: Any) -> Any:
    """A full model's file or folder, or a network's file, and beside it the average's. Raises FixError, when
    the model is saved, for an average that no step has reached."""
    result = original(output, *args, **kwargs)
    if (run := SESSION.on("ema")) and run.ema is not None:
        if not run.ema.begun:
            raise FixError(
                f"--ema_decay: {output} is saved, and no optimizer step was seen before, so there is no "
                "average: leave the flag out"
            )
        tidy(run)
        file = run.ema.beside(output)
        with run.ema.applied():
            original(str(file), *args, **kwargs)
        SESSION.reached("ema")
    return result


def tidy(run: Run) -> None:
    """The averages go of models that the trainer has removed, which it does with these flags alone: what is
    gone without them was moved."""
    if run.ema is not None and (
        getattr(run.args, "save_last_n_steps", None) or getattr(run.args, "save_last_n_epochs", None)
    ):
        run.ema.tidy()


def watch(accelerator: Accelerator) -> None:
    """A network of any kind saves itself: let it save the average, too."""
    for model in accelerator._models:
        network = accelerator.unwrap_model(model)
        own = getattr(network, "save_weights", None)
        if callable(own) and not isinstance(own, functools.partial):
            network.save_weights = functools.partial(save, own)
