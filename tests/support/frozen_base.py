"""What a frozen base says of a step in a conversion from SDXL's epsilon to v at zero terminal SNR: asked
beside the trainer, in float64, by a copy that is made at the first call of its U-Net."""

import copy

import numpy as np
import torch
from closed_form import LAST_SIGMA, alphas_cumprod

_COPIES = {}


def epsilon(network, x0, noise, timesteps, *args, **kwargs):
    """The copy's output for the sample of the same noise-to-signal ratio, told the stock schedule's timestep
    (linear in log sigma), [B, C, H, W]. peft's LoRA is copied as it starts, adding
    nothing."""
    remember(network)
    x, told, _ = asked(x0, noise, timesteps)

    def double(value):
        if isinstance(value, dict):
            return {key: double(part) for key, part in value.items()}
        return (
            value.detach().double()
            if isinstance(value, torch.Tensor) and value.is_floating_point()
            else value
        )

    with torch.no_grad():
        output = type(network).forward(
            _COPIES["frozen"],
            x,
            told,
            *map(double, args),
            **{key: double(part) for key, part in kwargs.items()},
        )
    return output if isinstance(output, torch.Tensor) else output[0]


def remember(network):
    """Copy it as it is now, unless that was done before."""
    if "frozen" not in _COPIES:
        _COPIES["frozen"] = copy.deepcopy(network).double().eval()
        for module in _COPIES["frozen"].modules():
            module.__dict__.pop("forward", None)  # of kohya's networks, which are no part of it


def asked(x0, noise, timesteps):
    """The base's sample, its timesteps, and sigma/alpha [B, 1, 1, 1]."""
    x0, noise = (torch.as_tensor(x, dtype=torch.float64) for x in (x0, noise))
    stock, new = ((1 / alphas_cumprod(zero) - 1).sqrt() for zero in (False, True))
    sigma = new[torch.as_tensor(timesteps, dtype=torch.int64)].clamp(max=LAST_SIGMA)
    told = torch.from_numpy(np.interp(sigma.log(), stock.log(), np.arange(1000.0)))
    sigma = sigma.reshape(-1, 1, 1, 1)
    return (x0 + sigma * noise) / torch.sqrt(1 + sigma**2), told, sigma


def target(said, x0, noise, timesteps, share):
    """The mixed v of a step in which the base ``said`` epsilon; the data's where sigma is above 14.6."""
    said, x0, noise = (torch.as_tensor(x, dtype=torch.float64) for x in (said, x0, noise))
    timesteps = torch.as_tensor(timesteps, dtype=torch.int64)
    x, _, sigma = asked(x0, noise, timesteps)
    alpha = 1 / torch.sqrt(1 + sigma**2)
    abar = alphas_cumprod(zero_snr=True)[timesteps].reshape(-1, 1, 1, 1)
    data = abar.sqrt() * noise - (1 - abar).sqrt() * x0
    base = (said - alpha * sigma * x) / alpha
    known = (1 / abar - 1).sqrt() <= LAST_SIGMA * (1 + 1e-9)
    return torch.where(known, share * base + (1 - share) * data, data)
