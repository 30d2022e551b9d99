"""The schedulers of the pipelines that a script makes, for validation images and for the saved folder: the
trained schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .run import SESSION

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


def scheduler(made: SchedulerMixin) -> SchedulerMixin:
    """A scheduler of the same class with the trained schedule and prediction type: the exact drop-in where
    there is one, else diffusers' own with trailing spacing, which samples an infinite terminal sigma from
    4096. Saved, stock diffusers loads it.
    """
    if "trained_betas" not in made.config or not (run := SESSION.on("previews")):
        return made
    from sdxl_fixes.schedulers import CLASSES, config_for, fix_scheduler

    # and drop-ins refuse it
    meaningless = run.prediction_type == "epsilon" and run.schedule.zero_terminal
    if type(made).__name__ in CLASSES and not meaningless:
        return fix_scheduler(made, run.schedule, run.prediction_type)
    return type(made).from_config(config_for(type(made), run.schedule, run.prediction_type, made.config))
