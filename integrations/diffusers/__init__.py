"""sdxl_fixes.diffusers: put a noise schedule into a diffusers scheduler."""

from __future__ import annotations

import inspect
import math
from typing import Any

from sdxl_fixes.prediction import check_prediction_type
from sdxl_fixes.schedule import NoiseSchedule


def with_schedule(scheduler: Any, schedule: NoiseSchedule, prediction_type: str | None = None, **options: Any) -> Any:
    """A new scheduler of the same class that follows ``schedule``, with trailing spacing.

    ``prediction_type`` None keeps the scheduler's own; ``options`` are more of its config (``timestep_spacing="leading"``). Works for
    training (``noise_scheduler``) and for generation (``pipe.scheduler``); a saved one loads in plain diffusers. DDPMScheduler and
    DDIMScheduler also take an infinite terminal sigma with v_prediction and sample. Raises ValueError for schedulers without betas,
    and for an infinite terminal sigma in any other class (they return NaN) or with epsilon.
    """
    if prediction_type is not None:
        check_prediction_type(prediction_type)
    name = type(scheduler).__name__
    if "trained_betas" not in scheduler.config:
        raise ValueError(f"{name} takes no betas, so it cannot follow a noise schedule: use a DDPM-type scheduler such as DDIMScheduler")
    changes = {**schedule.to_config(prediction_type), **options}
    predicted = changes.get("prediction_type", scheduler.config.get("prediction_type", "epsilon"))
    if predicted == "flow_prediction":
        raise ValueError(f"{name} does not follow a noise schedule when it predicts flow: use one of diffusers' flow-matching schedulers")
    if schedule.residual_signal == 0 and (name not in ("DDPMScheduler", "DDIMScheduler") or predicted == "epsilon"):
        raise ValueError(
            f"{name} with {predicted} cannot sample an infinite terminal sigma: use DDIMScheduler or DDPMScheduler with v_prediction, "
            "or schedule.with_terminal_sigma(20000, 'rescale')"
        )
    config = dict(scheduler.config)
    if "rescale_betas_zero_snr" not in inspect.signature(type(scheduler).__init__).parameters:
        for keys in (config, changes):  # a class that ignores the flag keeps it, and one made from its config would obey it
            keys.pop("rescale_betas_zero_snr", None)
    made = type(scheduler).from_config(config, **changes)
    reached = NoiseSchedule.from_alphas_cumprod(made.alphas_cumprod).terminal_sigma
    if reached != schedule.terminal_sigma and not math.isclose(reached, schedule.terminal_sigma, rel_tol=0.01):
        raise ValueError(
            f"{name} keeps betas in float32 and would end at sigma {reached:.6g} instead of {schedule.terminal_sigma:.6g}: "
            "use method 'rescale' or 'tail', or a smaller terminal sigma"
        )
    return made
