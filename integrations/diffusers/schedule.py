"""Schedulers that follow a noise schedule: with_schedule for everybody, and the schedulers that a patched
script loads."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch

from sdxl_fixes.checkpoint import scheduler_config
from sdxl_fixes.errors import FlagError
from sdxl_fixes.prediction import check_prediction_type
from sdxl_fixes.schedule import EXACT_KEY, NoiseSchedule
from sdxl_fixes.trainers.run import Run

from . import previews
from .run import SESSION, refuse_edm

# their add_noise is variance preserving and takes timesteps
TIMESTEP_SPACE = ("DDPMScheduler", "DDIMScheduler")


def with_schedule(
    scheduler: Any, schedule: NoiseSchedule, prediction_type: str | None = None, **options: Any
) -> Any:
    """A new scheduler of the same class that follows ``schedule``, with trailing spacing.

    ``prediction_type`` None keeps the scheduler's own; ``options`` are more of its config
    (``timestep_spacing="leading"``). Works for training (``noise_scheduler``) and for generation
    (``pipe.scheduler``); a saved one loads in plain diffusers. DDPMScheduler and DDIMScheduler also take an
    infinite terminal sigma with v_prediction and sample. Raises ValueError for schedulers without betas, and
    for an infinite terminal sigma in any other class (they return NaN) or with epsilon.
    """
    if prediction_type is not None:
        check_prediction_type(prediction_type)
    name = type(scheduler).__name__
    if "trained_betas" not in scheduler.config:
        raise ValueError(
            f"{name} takes no betas, so it cannot follow a noise schedule: use a DDPM-type "
            "scheduler such as DDIMScheduler"
        )
    changes = {**schedule.to_config(prediction_type), **options}
    predicted = changes.get("prediction_type", scheduler.config.get("prediction_type", "epsilon"))
    if predicted == "flow_prediction":
        raise ValueError(
            f"{name} does not follow a noise schedule when it predicts flow: use one of "
            "diffusers' flow-matching schedulers"
        )
    if schedule.residual_signal == 0 and (
        name not in ("DDPMScheduler", "DDIMScheduler") or predicted == "epsilon"
    ):
        raise ValueError(
            f"{name} with {predicted} cannot sample an infinite terminal sigma: use DDIMScheduler or "
            "DDPMScheduler with v_prediction, "
            "or schedule.with_terminal_sigma(20000, 'rescale')"
        )
    # of the schedule that it had
    config = {key: value for key, value in scheduler.config.items() if key != EXACT_KEY}
    if "rescale_betas_zero_snr" not in inspect.signature(type(scheduler).__init__).parameters:
        # a class that ignores the flag keeps it, and one made from its config would obey it
        for keys in (config, changes):
            keys.pop("rescale_betas_zero_snr", None)
    made = type(scheduler).from_config(config, **changes)
    reached = NoiseSchedule.from_alphas_cumprod(made.alphas_cumprod).terminal_sigma
    if reached != schedule.terminal_sigma and not math.isclose(
        reached, schedule.terminal_sigma, rel_tol=0.01
    ):
        raise ValueError(
            f"{name} keeps betas in float32 and would end at sigma {reached:.6g} instead of "
            f"{schedule.terminal_sigma:.6g}: "
            "use method 'rescale' or 'tail', or a smaller terminal sigma"
        )
    return made


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


def _for_training(scheduler: Any, run: Run) -> Any:
    name = type(scheduler).__name__
    if name not in TIMESTEP_SPACE:
        return _sigma_space(scheduler, run)
    if "schedule" in run.on:
        scheduler = type(scheduler).from_config(
            scheduler_config(run.schedule, run.prediction_type, scheduler.config, knows_infinity=True)
        )
        scheduler.alphas_cumprod = torch.from_numpy(run.schedule.alphas_cumprod.copy()).float()
    noising = run.noising
    ours = bool({"schedule", "noise"} & run.on)
    upstream = scheduler.add_noise

    def add_noise(
        original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        SESSION.step.timesteps = timesteps  # for the loss, which is not told
        if run.stable_loss is not None:
            run.stable_loss.noised(original_samples)
        for mark in ("schedule", "noise"):
            SESSION.reached(mark)
        return (
            noising.add_noise(original_samples, noise, timesteps)
            if ours
            else upstream(original_samples, noise, timesteps)
        )

    scheduler.add_noise = add_noise
    if ours:
        scheduler.get_velocity = noising.get_velocity
    return scheduler


def _sigma_space(scheduler: Any, run: Run) -> Any:
    """EDM-style training: of all fixes only the schedule applies."""
    refuse_edm(run.on)
    if "schedule" not in run.on:
        return scheduler
    if run.schedule.residual_signal == 0:
        raise FlagError(
            "EDM-style training needs a finite sigma: give --terminal_sigma 20000 --terminal_sigma_method "
            "rescale instead of "
            "--zero_terminal_snr, or train without --do_edm_style_training"
        )
    made = with_schedule(scheduler, run.schedule, run.prediction_type)
    upstream = made.add_noise

    def add_noise(*args: Any, **kwargs: Any) -> Any:
        SESSION.reached("schedule")
        return upstream(*args, **kwargs)

    made.add_noise = add_noise
    return made
