"""Changes to the training noise: input perturbation and offset noise."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class InputPerturbation:
    """Input perturbation (arXiv:2301.11706 Alg. 1): the network sees noise + gamma xi, the target keeps the
    noise alone.

    ``random=True`` draws a strength uniformly from [0, gamma) for every sample. Generation is unchanged.
    """

    gamma: float = 0.1
    random: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.gamma) and self.gamma >= 0):
            raise ValueError(f"ip_noise_gamma must be a number of at least 0, got {self.gamma}")

    def __call__(self, noise: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Perturbed noise, shape of ``noise`` [B, ...]."""
        strength = self.gamma * (_per_sample_uniform(noise, generator) if self.random else 1.0)
        return noise + strength * torch.randn(
            noise.shape, dtype=noise.dtype, device=noise.device, generator=generator
        )


@dataclass(frozen=True)
class OffsetNoise:
    """Adds one normal number per sample and channel, times ``strength``, to the noise, target included.

    ``random=True`` draws a strength uniformly from [0, strength) for every sample.
    """

    strength: float
    random: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.strength) and self.strength >= 0):
            raise ValueError(f"noise_offset must be a number of at least 0, got {self.strength}")

    def __call__(self, noise: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Noise with an offset, shape of ``noise`` [B, C, ...]."""
        strength = self.strength * (_per_sample_uniform(noise, generator) if self.random else 1.0)
        shape = (*noise.shape[:2], *[1] * (noise.ndim - 2))
        return noise + strength * torch.randn(
            shape, dtype=noise.dtype, device=noise.device, generator=generator
        )


def _per_sample_uniform(noise: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    shape = (len(noise), *[1] * (noise.ndim - 1))
    return torch.rand(shape, dtype=noise.dtype, device=noise.device, generator=generator)
