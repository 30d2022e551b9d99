"""A trainer's scheduler as one noise schedule sees it: ``add_noise`` and ``get_velocity`` in float32 whatever
the latents' dtype."""

from __future__ import annotations

import torch

from sdxl_fixes import prediction
from sdxl_fixes.noise import InputPerturbation
from sdxl_fixes.schedule import NoiseSchedule
from sdxl_fixes.tensors import Table


class Noising:
    """The two functions that diffusers-type trainers call, with the names and arguments of diffusers'
    schedulers.

    ``perturbation`` perturbs the noise that the network sees, not the target's.
    """

    def __init__(self, schedule: NoiseSchedule, perturbation: InputPerturbation | None = None) -> None:
        self._alpha, self._sigma = (
            Table(schedule.sqrt_alphas_cumprod),
            Table(schedule.sqrt_one_minus_alphas_cumprod),
        )
        self._perturbation = perturbation

    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """Noisy samples [B, ...] in the samples' dtype; ``timesteps`` are integers of shape [B]."""
        ndim = original_samples.ndim
        seen = (
            noise
            if self._perturbation is None
            else self._perturbation(noise.to(torch.promote_types(noise.dtype, torch.float32)))
        )
        noisy = prediction.add_noise(
            original_samples, seen, self._alpha(timesteps, ndim), self._sigma(timesteps, ndim)
        )
        return noisy.to(original_samples.dtype)

    def get_velocity(
        self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """The v-prediction target [B, ...], float32 or better."""
        return prediction.target(
            "v_prediction",
            sample,
            noise,
            self._alpha(timesteps, sample.ndim),
            self._sigma(timesteps, sample.ndim),
        )
