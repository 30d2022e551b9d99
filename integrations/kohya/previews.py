"""Kohya's preview samplers, made to sample the trained schedule."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sdxl_fixes.checkpoint import samplable
from sdxl_fixes.errors import FixError
from sdxl_fixes.log import warn
from sdxl_fixes.trainers.run import Run

from .run import SESSION

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


_OURS = "_sdxl_fixes_run"  # an attribute of the schedulers that are made here


def called(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """A preview is made. Raises FixError if it is not with a scheduler of ours."""
    run = SESSION.on("previews")
    if run is not None and getattr(self.scheduler, _OURS, None) is not run:
        raise FixError(
            "this sd-scripts does not make the scheduler of its previews where we look for it, so they would "
            "sample SDXL's own schedule: leave out --sample_prompts, or give --fixes all,-previews"
        )
    return original(self, *args, **kwargs)


def scheduler(original: Callable[..., SchedulerMixin], **kwargs: Any) -> SchedulerMixin:
    """Upstream's choice of class with the run's schedule and x0 not clipped (latents do not end at 1): the
    exact drop-in where there is one, else upstream's own with trailing spacing and a finite stand-in for an
    infinite terminal sigma; of flow, which upstream's cannot sample, Euler's."""
    made = original(**kwargs)
    run = SESSION.on("previews")
    if run is None:
        return made
    made = _following(made, run)
    setattr(made, _OURS, run)
    return made


def _following(made: SchedulerMixin, run: Run) -> SchedulerMixin:
    from sdxl_fixes.schedulers import CLASSES, config_for, fix_scheduler

    schedule = samplable(run.schedule) if run.prediction_type == "epsilon" else run.schedule
    cls = type(made)
    if cls.__name__ in CLASSES:
        return fix_scheduler(made, schedule, run.prediction_type)
    if run.noising.flow:
        _warn(cls.__name__)
        return schedule.scheduler("euler", run.prediction_type)
    return cls.from_config(config_for(cls, schedule, run.prediction_type, made.config))


@functools.cache  # once, not with every preview
def _warn(name: str) -> None:
    warn(f"{name} cannot sample rectified flow: previews are made with Euler's steps")
