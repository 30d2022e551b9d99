"""Kohya's noising step: input perturbation with a strength of its own for every sample."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from sdxl_fixes.noise import InputPerturbation

from .run import SESSION


def noise_and_timesteps(
    original: Callable[..., Any], args: argparse.Namespace, noise_scheduler: Any, latents: torch.Tensor, *rest: Any, **kwargs: Any
) -> Any:
    """Upstream's own function with its input perturbation switched off and ours, which it calls at the same point, in its place: the
    random numbers are drawn in upstream's order."""
    run = SESSION.on("noise")
    perturbation = run.settings.perturbation() if run else None
    if perturbation is None:
        return original(args, noise_scheduler, latents, *rest, **kwargs)
    plain = argparse.Namespace(**{**vars(args), "ip_noise_gamma": None})
    return original(plain, _Perturbing(noise_scheduler, perturbation), latents, *rest, **kwargs)


class _Perturbing:
    """A scheduler whose ``add_noise`` perturbs the noise; everything else is the scheduler's own."""

    def __init__(self, scheduler: Any, perturbation: InputPerturbation) -> None:
        self.__dict__.update(_scheduler=scheduler, _perturbation=perturbation)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> Any:
        return self._scheduler.add_noise(original_samples, self._perturbation(noise), timesteps)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_scheduler"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._scheduler, name, value)
