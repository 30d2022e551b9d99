"""The schedulers that a patched script loads: they follow the run's schedule."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from sdxl_fixes.checkpoint import TIMESTEP_CLASSES
from sdxl_fixes.errors import FixError, FlagError
from sdxl_fixes.schedule import NoiseSchedule
from sdxl_fixes.trainers.run import Run

from . import previews
from .run import BY_TIMESTEP, SESSION, refuse_edm, without_them
from .timesteps import check_size

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


def load(original: Callable[..., Any], cls: type, *args: Any, **kwargs: Any) -> Any:
    """A scheduler from its folder: the script's own is what it trains with, a pipeline's samples what was
    trained.

    Pipelines that come before the training scheduler (the class images of prior preservation) sample the base
    model as it is.
    """
    made = original(cls, *args, **kwargs)
    run = SESSION.run
    if run is None or not run.on or isinstance(made, tuple):
        return made
    if not SESSION.called_by_script():
        return previews.scheduler(made) if SESSION.training else made
    SESSION.training = True
    return _for_training(made, run)


def configured(original: Callable[..., Any], cls: type, *args: Any, **kwargs: Any) -> Any:
    """A scheduler that the script makes of another's config, for validation images."""
    made = original(cls, *args, **kwargs)
    run = SESSION.on("previews")
    asked = sys._getframe(2).f_globals is SESSION.script  # not by from_pretrained, nor by ourselves
    if run is None or not (run.noising.flow and SESSION.training and asked and hasattr(cls, "set_timesteps")):
        return made
    return previews.of_flow(made, run)


def _for_training(scheduler: SchedulerMixin, run: Run) -> SchedulerMixin:
    if type(scheduler).__name__ not in TIMESTEP_CLASSES:
        return _sigma_space(scheduler, run)
    if "schedule" in run.on:
        scheduler = _following(scheduler, run)
        scheduler.alphas_cumprod = torch.from_numpy(run.schedule.alphas_cumprod.copy()).float()
    noising = run.noising
    ours = bool({"schedule", "noise"} & run.on)
    upstream = scheduler.add_noise

    def add_noise(
        original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        _remember(timesteps, run)
        check_size(original_samples)
        if run.stable_loss is not None:
            run.stable_loss.noised(original_samples)
        if run.keep is not None:
            run.keep.noised(SESSION.step, original_samples, noise, timesteps)
        for mark in ("schedule", "noise"):
            SESSION.reached(mark)
        return (
            noising.add_noise(original_samples, noise, timesteps)
            if ours
            else upstream(original_samples, noise, timesteps)
        )

    target = noising.get_velocity if ours else scheduler.get_velocity

    def get_velocity(sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        SESSION.reached("get_velocity")
        return target(sample, noise, timesteps)

    scheduler.add_noise, scheduler.get_velocity = add_noise, get_velocity
    return scheduler


def _remember(timesteps: torch.Tensor, run: Run) -> None:
    """For the loss, which is not told. Raises FixError where latents were noised twice before it."""
    step, training = SESSION.step, torch.is_grad_enabled()
    if training and step.noised and run.on & BY_TIMESTEP:
        raise FixError(
            "latents were noised twice before a loss was computed, so whose timesteps it is of is not known: "
            f"give --fixes {without_them(run)}"
        )
    step.timesteps, step.noised, step.counted = timesteps, training, 0


def _following(scheduler: SchedulerMixin, run: Run) -> SchedulerMixin:
    """diffusers' own class with the run's schedule."""
    from sdxl_fixes.schedulers import config_for

    cls = type(scheduler)
    # of flow the script makes the target that it makes of v-prediction: with our get_velocity
    known = "v_prediction" if run.noising.flow else run.prediction_type
    return cls.from_config(config_for(cls, run.schedule, known, scheduler.config))


def _sigma_space(scheduler: SchedulerMixin, run: Run) -> SchedulerMixin:
    """EDM-style training: of all fixes only the schedule applies."""
    refuse_edm(run.on)
    if "schedule" not in run.on:
        return scheduler
    if run.schedule.zero_terminal:
        raise FlagError(
            "EDM-style training needs a finite sigma: give --terminal_sigma 20000 --terminal_sigma_method "
            "rescale instead of "
            "--zero_terminal_snr, or train without --do_edm_style_training"
        )
    made = _following(scheduler, run)
    reached, asked = NoiseSchedule.from_alphas_cumprod(made.alphas_cumprod), run.schedule
    if not math.isclose(reached.terminal_sigma, asked.terminal_sigma, rel_tol=0.01):
        raise FlagError(
            f"{type(made).__name__} keeps betas in float32 and would end at sigma "
            f"{reached.terminal_sigma:.6g} instead of {asked.terminal_sigma:.6g}: use "
            "--terminal_sigma_method rescale or tail, or a smaller terminal sigma"
        )
    upstream = made.add_noise

    def add_noise(*args: Any, **kwargs: Any) -> Any:
        SESSION.reached("schedule")
        return upstream(*args, **kwargs)

    made.add_noise = add_noise
    return made
