"""sdxl_fixes.diffusers: put a noise schedule into a diffusers scheduler."""

from __future__ import annotations

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
    if schedule.residual_signal == 0 and (name not in ("DDPMScheduler", "DDIMScheduler") or predicted == "epsilon"):
        raise ValueError(
            f"{name} with {predicted} cannot sample an infinite terminal sigma: use DDIMScheduler or DDPMScheduler with v_prediction, "
            "or schedule.with_terminal_sigma(20000, 'rescale')"
        )
    if "rescale_betas_zero_snr" not in scheduler.config:
        del changes["rescale_betas_zero_snr"]
    return type(scheduler).from_config(dict(scheduler.config), **changes)
