"""What the network predicts: training targets, and conversions between predictions at any noise level.

Every prediction y is a combination of the clean latents x0 and the noise, and so is the noisy sample x:

    x = alpha x0 + sigma noise        y = p x0 + q noise

    epsilon        p = 0,      q = 1
    sample         p = 1,      q = 0            (x0)
    v_prediction   p = -sigma, q = alpha        (arXiv:2202.00512 appendix D)
    flow_prediction  p = -1,   q = 1            (arXiv:2209.03003: noise - x0)

Two equations, two unknowns; the determinant alpha q - sigma p is alpha, -sigma, alpha^2 + sigma^2 and
alpha + sigma. Only epsilon's vanishes at SNR 0 (alpha = 0): there the sample is the noise and says nothing
about x0; only sample's at sigma 0. Nothing here asks alpha^2 + sigma^2 = 1, so rectified flow's x = (1 - s)
x0 + s noise is served by alpha = 1 - s, sigma = s.

``alpha`` and ``sigma`` are numbers, tensors of shape [B], or tensors that broadcast against the sample [B,
...]; arithmetic is float32 or better.
"""

from __future__ import annotations

import torch

from sdxl_fixes.names import PREDICTION_TYPES as PREDICTION_TYPES
from sdxl_fixes.names import check_prediction_type as check_prediction_type
from sdxl_fixes.tensors import append_dims

Level = torch.Tensor | float


def add_noise(x0: torch.Tensor, noise: torch.Tensor, alpha: Level, sigma: Level) -> torch.Tensor:
    """x = alpha x0 + sigma noise, in float32 or better."""
    x0, noise = _precise(x0), _precise(noise)
    return _level(alpha, x0) * x0 + _level(sigma, x0) * noise


def target(
    prediction_type: str, x0: torch.Tensor, noise: torch.Tensor, alpha: Level, sigma: Level
) -> torch.Tensor:
    """What a perfect network would return for a sample made of ``x0`` and ``noise`` (shape [B, ...],
    both)."""
    x0, noise = _precise(x0), _precise(noise)
    if check_prediction_type(prediction_type) == "epsilon":
        return noise
    if prediction_type == "sample":
        return x0
    p, q = _combination(prediction_type, _level(alpha, x0), _level(sigma, x0))
    return p * x0 + q * noise


def x0_and_noise(
    prediction: torch.Tensor, prediction_type: str, sample: torch.Tensor, alpha: Level, sigma: Level
) -> tuple[torch.Tensor, torch.Tensor]:
    """The clean latents and the noise that ``prediction`` implies for ``sample`` (both shape [B, ...]).

    Raises ValueError for epsilon where alpha is 0 and for sample where sigma is 0. That check reads the
    values (one host sync on an accelerator), so it is not for the inside of a training step.
    """
    sample, prediction = _precise(sample), _precise(prediction)
    alpha, sigma = _level(alpha, sample), _level(sigma, sample)
    if check_prediction_type(prediction_type) == "epsilon" and bool((torch.as_tensor(alpha) == 0).any()):
        raise ValueError(
            "x0 cannot be recovered from an epsilon prediction at SNR 0, where the sample is all noise: "
            "use v_prediction, or a finite terminal sigma"
        )
    if prediction_type == "sample" and bool((torch.as_tensor(sigma) == 0).any()):
        raise ValueError(
            "the noise cannot be recovered from an x0 prediction at sigma 0, where the sample "
            "holds none of it"
        )
    p, q = _combination(prediction_type, alpha, sigma)
    determinant = alpha * q - sigma * p
    return (q * sample - sigma * prediction) / determinant, (alpha * prediction - p * sample) / determinant


def convert(
    prediction: torch.Tensor, source: str, to: str, sample: torch.Tensor, alpha: Level, sigma: Level
) -> torch.Tensor:
    """``prediction`` of type ``source`` for ``sample``, as the prediction of type ``to``. Raises as
    :func:`x0_and_noise`."""
    if check_prediction_type(source) == check_prediction_type(to):
        return _precise(prediction)
    x0, noise = x0_and_noise(prediction, source, sample, alpha, sigma)
    return target(to, x0, noise, alpha, sigma)


def _combination(prediction_type: str, alpha: Level, sigma: Level) -> tuple[Level, Level]:
    return {
        "epsilon": (0.0, 1.0),
        "sample": (1.0, 0.0),
        "v_prediction": (-sigma, alpha),
        "flow_prediction": (-1.0, 1.0),
    }[prediction_type]


def _precise(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _level(level: Level, sample: torch.Tensor) -> Level:
    if not isinstance(level, torch.Tensor):
        return level
    return append_dims(_precise(level), sample.ndim) if level.ndim == 1 else _precise(level)
