"""Kohya's DDPMScheduler, made to follow the run's schedule: betas, alphas_cumprod, SNR table, noising and
velocity together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sdxl_fixes.trainers.run import Run

from .run import SESSION


def prepare(
    original: Callable[..., None], noise_scheduler: Any, device: torch.device, *args: Any, **kwargs: Any
) -> None:
    """After upstream's own preparation, whatever it did."""
    original(noise_scheduler, device, *args, **kwargs)
    if run := SESSION.on("schedule"):
        follow(noise_scheduler, run, device)


def rescale(original: Callable[..., None], noise_scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """Upstream's ZTSNR rescale, which runs before or after :func:`prepare` and leaves the SNR table of the
    other schedule behind."""
    if run := SESSION.on("schedule"):
        device = (
            noise_scheduler.all_snr.device if hasattr(noise_scheduler, "all_snr") else torch.device("cpu")
        )
        return follow(noise_scheduler, run, device)
    original(noise_scheduler, *args, **kwargs)


def follow(noise_scheduler: Any, run: Run, device: torch.device) -> None:
    """Put the run's schedule into every table of the instance, and noise in float32 whatever the latents'
    dtype."""
    schedule = run.schedule
    if len(schedule) != noise_scheduler.config.num_train_timesteps:
        raise ValueError(
            f"the trainer has {noise_scheduler.config.num_train_timesteps} timesteps, the schedule "
            f"{len(schedule)}: they must be equal"
        )
    noise_scheduler.betas = torch.from_numpy(schedule.betas.copy()).float()
    noise_scheduler.alphas = torch.from_numpy(schedule.alphas.copy()).float()
    noise_scheduler.alphas_cumprod = torch.from_numpy(schedule.alphas_cumprod.copy()).float()
    noise_scheduler.all_snr = torch.from_numpy(schedule.snr.copy()).float().to(device)

    def add_noise(
        original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        for fix in ("schedule", "noise"):
            SESSION.reached(fix)
        return run.noising.add_noise(original_samples, noise, timesteps)

    add_noise.run = run  # type: ignore[attr-defined]  # for noise.py, which asks whose perturbation this is; copies of a scheduler share it
    noise_scheduler.add_noise, noise_scheduler.get_velocity = add_noise, run.noising.get_velocity
