"""The scripts' timestep draw, torch.randint(0, T, (B,)): of the run's density, stratified, shifted by
resolution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sdxl_fixes.errors import FixError

from .run import SESSION


def randint(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The run's own sampler for the script's call of that shape; every other call is torch's, that of a
    uniform sampler within it too."""
    run = SESSION.run
    if (
        run is None
        or run.timesteps is None
        or SESSION.drawing
        or len(args) != 3
        or args[:2] != (0, len(run.schedule))
        or len(args[2]) != 1
    ):
        return original(*args, **kwargs)
    if not SESSION.called_by_script():
        return original(*args, **kwargs)
    SESSION.reached("timesteps")
    if run.timesteps.base is not None and SESSION.step.size is None:
        raise FixError(
            "--resolution_shift: the script draws its timesteps before any noise of the latents by "
            "torch.randn_like, so their size is not known: leave the flag out"
        )
    SESSION.drawing = True
    try:
        return run.timesteps.draw(args[2][0], kwargs.get("device", "cpu"), size=SESSION.step.size)
    finally:
        SESSION.drawing = False


def randn_like(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The script's noise, which it draws before its timesteps, is of the latents' size."""
    noise = original(*args, **kwargs)
    run = SESSION.run
    shifts = run is not None and run.timesteps is not None and run.timesteps.base is not None
    if shifts and noise.ndim == 4 and SESSION.called_by_script():
        SESSION.step.size = (noise.shape[-2], noise.shape[-1])
    return noise


def check_size(latents: torch.Tensor) -> None:
    """Raise FixError if ``latents`` [B, C, H, W], which are noised now, are of another size than the
    timesteps were drawn for."""
    run, size = SESSION.run, tuple(latents.shape[-2:])
    if run is not None and run.timesteps is not None and run.timesteps.base is not None:
        if SESSION.step.size != size:
            raise FixError(
                f"--resolution_shift: the timesteps were drawn for latents of {SESSION.step.size}, and "
                f"noised are latents of {size}: leave the flag out"
            )
