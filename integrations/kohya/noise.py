"""Kohya's noising step: the timesteps that the rest of the step is of, and input perturbation with a strength
for every sample."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from sdxl_fixes.errors import FixError
from sdxl_fixes.noise import InputPerturbation

from .run import SESSION

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


def noised(
    original: Callable[..., Any],
    args: argparse.Namespace,
    noise_scheduler: SchedulerMixin,
    latents: torch.Tensor,
    *rest: Any,
    **kwargs: Any,
) -> Any:
    """Upstream's own function. If a random strength of input perturbation is asked for, its perturbation is
    switched off, and ours, which it calls at the same point, is in its place: the random numbers are drawn in
    upstream's order.

    For flow the network is told T s in place of the timestep. The noise is nothing but the target of every
    trainer that does not ask for v-prediction, so noise - x0 takes its place."""
    run, step = SESSION.run, SESSION.step
    if run is None or not run.on:
        return original(args, noise_scheduler, latents, *rest, **kwargs)
    noising, keep = run.noising, run.keep
    step.sampled, step.residual, step.size = False, None, (latents.shape[-2], latents.shape[-1])
    if run.stable_loss is not None:
        run.stable_loss.noised(latents)
    if run.perturbation is not None:
        args = argparse.Namespace(**{**vars(args), "ip_noise_gamma": None})
        if getattr(noise_scheduler.add_noise, "run", None) is not run:  # else its own add_noise perturbs
            noise_scheduler = _Perturbing(noise_scheduler, run.perturbation)
    made = original(args, noise_scheduler, latents, *rest, **kwargs)
    if len(made) != 3:
        raise FixError(
            f"{original.__name__}: expected noise, noisy latents and timesteps from it, found {len(made)} "
            "values: this sd-scripts is newer than this plugin, so update sdxl-fixes, or give --fixes none"
        )
    noise, noisy, timesteps = made
    step.timesteps = timesteps
    if keep is not None:
        keep.noised(step, latents, noise, timesteps)
    if noising.flow:
        SESSION.reached(original.__name__)
        noise = noising.get_velocity(latents, noise, timesteps)
    return noise, noisy, noising.told(timesteps)


class _Perturbing:
    """A scheduler whose ``add_noise`` perturbs the noise; everything else is the scheduler's own."""

    def __init__(self, scheduler: SchedulerMixin, perturbation: InputPerturbation) -> None:
        self.__dict__.update(_scheduler=scheduler, _perturbation=perturbation)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> Any:
        SESSION.reached("noise")
        return self._scheduler.add_noise(original_samples, self._perturbation(noise), timesteps)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_scheduler"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._scheduler, name, value)
