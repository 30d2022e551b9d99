"""A trainer's scheduler as one noise schedule sees it: noise, target and the timestep that the network is
told, in float32 whatever the latents' dtype."""

from __future__ import annotations

import torch

from sdxl_fixes import prediction
from sdxl_fixes.checkpoint import Sampling
from sdxl_fixes.names import FLOW
from sdxl_fixes.noise import InputPerturbation
from sdxl_fixes.tensors import Table


class Noising:
    """The two functions that diffusers-type trainers call, with the names and arguments of diffusers'
    schedulers, and :meth:`told`. ``timesteps`` are rows of the schedule's tables, integers of shape [B].

    ``perturbation`` perturbs the noise that the network sees, not the target's.
    """

    def __init__(self, trained: Sampling, perturbation: InputPerturbation | None = None) -> None:
        self.flow = trained.prediction_type == FLOW
        alpha, sigma, told = trained.schedule.levels(self.flow)
        self._alpha, self._sigma, self._told = Table(alpha), Table(sigma), Table(told)
        self._perturbation = perturbation

    def told(self, timesteps: torch.Tensor) -> torch.Tensor:
        """What the network is told: the timesteps themselves, for flow T s as float32 (float16 and bfloat16
        hold no fraction of a large number), [B]."""
        return self._told(timesteps) if self.flow else timesteps

    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """Noisy samples [B, ...] in the samples' dtype."""
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
        """The target of v-prediction, for flow that of flow_prediction, [B, ...], float32 or better."""
        return prediction.target(
            FLOW if self.flow else "v_prediction",
            sample,
            noise,
            self._alpha(timesteps, sample.ndim),
            self._sigma(timesteps, sample.ndim),
        )
