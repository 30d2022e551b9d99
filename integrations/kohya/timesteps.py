"""Kohya's timestep draw: of the run's density, stratified, shifted by resolution."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .run import SESSION


def draw(
    original: Callable[..., torch.Tensor],
    min_timestep: int,
    max_timestep: int,
    b_size: int,
    device: torch.device,
) -> torch.Tensor:
    """The run's own sampler; a fixed timestep (validation asks for min = max) stays upstream's."""
    run = SESSION.on("timesteps") if min_timestep < max_timestep else None
    if run is None or run.timesteps is None:
        return original(min_timestep, max_timestep, b_size, device)
    SESSION.reached("timesteps")
    SESSION.step.sampled = True
    return run.timesteps.draw(b_size, device, size=SESSION.step.size)
