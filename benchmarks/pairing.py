"""Noise paired with its picture: of k draws, the one nearest to the latents ("immiscible" or k-nearest noise,
arXiv:2406.12303), and what it leaks, in closed form.

Paired noise points towards its picture. So pure noise, which zero terminal SNR promises at the last timestep,
says something of the picture after all, and generation, which starts from unpaired noise, has nothing there.
"""

from __future__ import annotations

import math

import numpy as np
import torch


def nearest(
    latents: torch.Tensor, noise: torch.Tensor, k: int, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Of ``noise`` and k - 1 more draws (each [B, ...]) the one nearest to ``latents``, sample by sample."""
    best, least = noise, _distance(latents, noise)
    for _ in range(k - 1):
        other = torch.randn(noise.shape, generator=generator)
        distance = _distance(latents, other)
        nearer = distance < least
        best = torch.where(nearer.reshape(-1, *[1] * (noise.ndim - 1)), other, best)
        least = torch.minimum(distance, least)
    return best


def _distance(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return (first - second).flatten(1).square().sum(1)


def largest(k: int) -> tuple[float, float]:
    """Mean and variance of the largest of k standard normal numbers (by quadrature, to 1e-9)."""
    x = np.linspace(-12, 12, 24001)
    density = np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(x))])
    mass = k * density * below ** (k - 1)
    mass /= mass.sum()
    mean = float((x * mass).sum())
    return mean, float(((x - mean) ** 2 * mass).sum())


def projection(k: int, energy: float = 1.0) -> float:
    """Mean component of the chosen noise along its picture, in standard deviations of the noise, for latents
    of mean square ``energy`` in many dimensions.

    The choice is of the largest x0.eps - |eps|^2/2, which over draws has variance D (energy + 1/2) in D
    dimensions; its correlation with eps's component along x0 is sqrt(energy/(energy + 1/2)).
    """
    return math.sqrt(energy / (energy + 0.5)) * largest(k)[0]


def leak(k: int, share: float, energy: float = 1.0) -> float:
    """The share of a coordinate's variance (the brightness's, say) that is read from the paired noise by the
    best straight line, where the coordinate has ``share`` of the latents' squared length."""
    signal = share * projection(k, energy) ** 2
    left = 1 - share * energy / (energy + 0.5) * (1 - largest(k)[1])
    return signal / (signal + left)
