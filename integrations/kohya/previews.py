"""Kohya's preview samplers, made to sample the trained schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sdxl_fixes.checkpoint import samplable
from sdxl_fixes.diffusers import with_schedule

from .run import SESSION


def scheduler(original: Callable[..., Any], **kwargs: Any) -> Any:
    """Upstream's choice of class with the run's schedule, trailing spacing, and x0 not clipped (latents do not end at 1)."""
    made = original(**kwargs)
    run = SESSION.on("previews")
    if run is None:
        return made
    exact = type(made).__name__ in ("DDIMScheduler", "DDPMScheduler") and run.prediction_type != "epsilon"
    options = {"clip_sample": False} if "clip_sample" in made.config else {}
    return with_schedule(made, run.schedule if exact else samplable(run.schedule), run.prediction_type, **options)
