"""Data for which a perfect model and the right samples are known in closed form, so that a scheduler can be
judged without training.

Every coordinate is N(mean, scale^2) by itself. Scale 1 is a single latent value; scale 64 the brightness of a
128 x 128 latent canvas (the mean of its values times 128, one coordinate of an orthonormal basis); 8 lies
between. From pure noise a perfect sampler returns less than the true spread and mean where the schedule ends
at a finite sigma: that is the flaw itself, and the ``ideal`` here.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from sdxl_fixes import NoiseSchedule, prediction

SCALES = (1.0, 8.0, 64.0)
MEAN_OVER_SCALE = 2.0


def predict(
    schedule: NoiseSchedule,
    prediction_type: str,
    sample: torch.Tensor,
    timestep: Any,
    scales: tuple[float, ...] = SCALES,
    between: bool = False,
) -> torch.Tensor:
    """What a perfect network returns for ``sample`` [B, len(scales), 1, 1] at ``timestep``, which must be one
    that it was trained on; ``between``: any time of rectified flow."""
    alphas, sigmas, told = schedule.levels(prediction_type == "flow_prediction")
    row = int(abs(told - float(timestep)).argmin())
    alpha, sigma = float(alphas[row]), float(sigmas[row])
    if between:
        alpha, sigma = 1 - float(timestep) / len(schedule), float(timestep) / len(schedule)
    elif abs(told[row] - float(timestep)) > 1e-3:
        raise ValueError(f"the network was asked at timestep {float(timestep)}, which it was not trained on")
    scale = torch.tensor(scales, dtype=torch.float64).reshape(1, -1, 1, 1)
    sample, mean = sample.double(), MEAN_OVER_SCALE * scale
    x0 = mean + scale**2 * alpha / (alpha**2 * scale**2 + sigma**2) * (sample - alpha * mean)
    return prediction.target(prediction_type, x0, (sample - alpha * x0) / sigma, alpha, sigma)


def ideal(
    schedule: NoiseSchedule, flow: bool = False, scales: tuple[float, ...] = SCALES
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and spread of a perfect sampler that starts from pure noise, both over the true scale, one for
    each of ``scales``."""
    alphas, sigmas, _ = schedule.levels(flow)
    alpha, sigma, scale = float(alphas[-1]), float(sigmas[-1]), torch.tensor(scales, dtype=torch.float64)
    start = (alpha**2 + sigma**2) ** 0.5  # spread of the initial noise
    kept = (alpha**2 * scale**2 + sigma**2) ** -0.5
    return MEAN_OVER_SCALE * (1 - alpha * scale * kept), start * kept


def sampled(
    scheduler: Any,
    schedule: NoiseSchedule,
    prediction_type: str,
    steps: int,
    samples: int = 2,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    scales: tuple[float, ...] = SCALES,
    between: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and spread that ``scheduler`` returns in ``steps`` steps, over the true scale, one for each of
    ``scales``. 2 samples (-1 and 1) are exact for a scheduler that draws no noise of its own; the initial
    noise of more is whitened."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(samples, len(scales), 1, 1, generator=generator, dtype=torch.float64)
    noise = (
        torch.tensor([-1.0, 1.0], dtype=torch.float64).reshape(2, 1, 1, 1).repeat(1, len(scales), 1, 1)
        if samples == 2
        else noise
    )
    noise = (noise - noise.mean(0)) / noise.std(0, correction=0)
    scheduler.set_timesteps(steps, device=device)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    x = (noise.to(device, dtype) * getattr(scheduler, "init_noise_sigma", 1.0)).to(dtype)
    scaled = getattr(scheduler, "scale_model_input", lambda x, t: x)  # flow-matching classes have neither
    options = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for t in scheduler.timesteps:
        output = predict(schedule, prediction_type, scaled(x, t).cpu(), t, scales, between).to(device, dtype)
        x = scheduler.step(output, t, x, return_dict=False, **options)[0]
    x = x.double().cpu()[:, :, 0, 0] / torch.tensor(scales)
    return x.mean(0), x.std(0, correction=0)
