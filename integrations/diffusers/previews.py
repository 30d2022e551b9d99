"""The schedulers of the pipelines that a script makes, for validation images and for the saved folder: the trained schedule."""

from __future__ import annotations

import inspect
from typing import Any

from sdxl_fixes.checkpoint import samplable, scheduler_config

from .run import SESSION


def scheduler(made: Any) -> Any:
    """A scheduler of the same class with the trained schedule and prediction type, trailing; saved, stock diffusers loads it.

    Zero terminal SNR is written as rescale_betas_zero_snr, which DDIM and DDPM sample exactly and Euler, DPM++ and UniPC from sigma
    4096; classes that would ignore it get betas that end there.
    """
    if "trained_betas" not in made.config or not (run := SESSION.on("previews")):
        return made
    knows = "rescale_betas_zero_snr" in inspect.signature(type(made).__init__).parameters
    config = scheduler_config(run.schedule, run.prediction_type)
    if not knows and config["rescale_betas_zero_snr"]:
        config = samplable(run.schedule).to_config(run.prediction_type)
    if not knows:
        config.pop("rescale_betas_zero_snr")
    return type(made).from_config(dict(made.config), **config)
