"""The schedulers of the pipelines that a script makes, for validation images and for the saved folder: the
trained schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdxl_fixes.trainers.run import Run

from .run import SESSION

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


def scheduler(made: SchedulerMixin) -> SchedulerMixin:
    """A scheduler of the same class with the trained schedule and prediction type: the exact drop-in where
    there is one, else diffusers' own with trailing spacing, which samples an infinite terminal sigma from
    4096. Saved, stock diffusers loads it.
    """
    if not (run := SESSION.on("previews")) or ("trained_betas" not in made.config and not run.noising.flow):
        return made
    if run.noising.flow:  # the one class of which a saved folder says it to stock diffusers
        return run.schedule.scheduler("unipc", run.prediction_type)
    from sdxl_fixes.schedulers import CLASSES, config_for, fix_scheduler

    # and drop-ins refuse it
    meaningless = run.prediction_type == "epsilon" and run.schedule.zero_terminal
    if type(made).__name__ in CLASSES and not meaningless:
        return fix_scheduler(made, run.schedule, run.prediction_type)
    return type(made).from_config(config_for(type(made), run.schedule, run.prediction_type, made.config))


def of_flow(made: SchedulerMixin, run: Run) -> SchedulerMixin:
    """Of the same class, or UniPC where that cannot sample rectified flow."""
    from sdxl_fixes.schedulers import CLASSES, fix_scheduler

    if type(made).__name__ not in CLASSES:
        return run.schedule.scheduler("unipc", run.prediction_type)
    return fix_scheduler(made, run.schedule, run.prediction_type)
