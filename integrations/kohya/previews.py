"""Kohya's preview samplers, made to sample the trained schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sdxl_fixes.checkpoint import samplable
from sdxl_fixes.diffusers import with_schedule

from .run import SESSION


def scheduler(original: Callable[..., Any], **kwargs: Any) -> Any:
    """Upstream's choice of class with the run's schedule and x0 not clipped (latents do not end at 1): the
    exact drop-in where there is one, else upstream's own with trailing spacing and a finite stand-in for an
    infinite terminal sigma."""
    made = original(**kwargs)
    run = SESSION.on("previews")
    if run is None:
        return made
    from sdxl_fixes.schedulers import CLASSES, fix_scheduler

    options: dict[str, Any] = {"clip_sample": False} if "clip_sample" in made.config else {}
    if type(made).__name__ in CLASSES:
        schedule = samplable(run.schedule) if run.prediction_type == "epsilon" else run.schedule
        return fix_scheduler(made, schedule, run.prediction_type, **options)
    return with_schedule(made, samplable(run.schedule), run.prediction_type, **options)
