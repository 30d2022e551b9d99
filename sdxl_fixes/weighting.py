"""Loss weights by SNR, for every prediction, finite at SNR 0.

A weight is thought of on the x0 loss. The same error in x0 makes another error in another prediction, so its
weight divides by

    sample 1        epsilon SNR        v_prediction SNR + 1        flow_prediction (sqrt(SNR) + 1)^2

(the squared ratio of the errors at a fixed noisy sample). Each weighting is a function of an array of SNRs;
``table`` evaluates it in float64 at a schedule's timesteps.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field

import numpy as np

from sdxl_fixes.names import check_prediction_type
from sdxl_fixes.schedule import Array, NoiseSchedule


class Weighting:
    """A weight for every SNR: subclasses say which."""

    def __call__(self, snr: Array, prediction_type: str) -> Array:
        """Weights of the loss of ``prediction_type`` at ``snr`` >= 0 (any shape), finite and not negative."""
        raise NotImplementedError

    def table(self, schedule: NoiseSchedule, prediction_type: str) -> Array:
        """The weight of every timestep, float64, shape [T]."""
        return self(schedule.snr, check_prediction_type(prediction_type))


@dataclass(frozen=True)
class MinSNR(Weighting):
    """min(SNR, gamma) on the x0 loss (arXiv:2303.09556 section 3.4).

    eps: min(SNR, gamma)/SNR, whose limit at SNR 0 is 1. v: min(SNR, gamma)/(SNR + 1), which is 0 at SNR 0:
    the textbook form gives no weight to the terminal step that zero terminal SNR adds. ``floor=True`` uses
    min(SNR + 1, gamma) on the x0 loss of v, sample and flow instead, which is min(1, gamma/(SNR + 1)) for v,
    hence 1 there (for gamma of at least 1); for eps, already 1, nothing changes.
    """

    gamma: float = 5.0
    floor: bool = False

    def __post_init__(self) -> None:
        _check_positive("min_snr_gamma", self.gamma)

    def __call__(self, snr: Array, prediction_type: str) -> Array:
        if prediction_type == "epsilon":
            return self.gamma / np.maximum(snr, self.gamma)
        return np.minimum(snr + self.floor, self.gamma) / _error_ratio(snr, prediction_type)


@dataclass(frozen=True)
class SoftMinSNR(Weighting):
    """SNR gamma/(SNR + gamma) on the x0 loss: min-SNR without the corner (k-diffusion's soft-min-snr with
    sigma_data = gamma^-1/2).

    eps: gamma/(SNR + gamma), 1 at SNR 0. v: SNR gamma/((SNR + gamma)(SNR + 1)), 0 at SNR 0.
    """

    gamma: float = 5.0

    def __post_init__(self) -> None:
        _check_positive("soft_min_snr_gamma", self.gamma)

    def __call__(self, snr: Array, prediction_type: str) -> Array:
        if prediction_type == "epsilon":
            return self.gamma / (snr + self.gamma)
        return snr * self.gamma / (snr + self.gamma) / _error_ratio(snr, prediction_type)


@dataclass(frozen=True)
class Debiased(Weighting):
    """1/sqrt(SNR) on the eps loss (arXiv:2310.08442), i.e. sqrt(SNR) on the x0 loss.

    eps has no limit at SNR 0, so the weight is capped at ``cap``: by default SDXL's own terminal sigma, 14.6,
    the largest that stock training ever gives. For v it is 1/(SNR + 1), as kohya has it, 1 at SNR 0.
    ``snr_limit`` clips the SNR from above before anything else, as kohya does.
    """

    cap: float = field(default_factory=lambda: float(NoiseSchedule.sdxl().terminal_sigma))
    snr_limit: float = 1000.0

    def __post_init__(self) -> None:
        _check_positive("cap", self.cap)
        _check_positive("snr_limit", self.snr_limit)

    def __call__(self, snr: Array, prediction_type: str) -> Array:
        snr = np.minimum(snr, self.snr_limit)
        if prediction_type == "v_prediction":
            return 1 / (snr + 1)
        if prediction_type == "epsilon":
            return 1 / np.maximum(np.sqrt(snr), 1 / self.cap)
        return np.sqrt(snr) / _error_ratio(snr, prediction_type)


@dataclass(frozen=True)
class FlowMatching(Weighting):
    """Weighs a loss as rectified flow's, (sqrt(SNR) + 1)^2 on the x0 loss: for v (1 + sigma)^2/(1 + sigma^2),
    from 1 at both ends to 2 at sigma 1; for eps (1 + sigma)^2; for flow itself it would be 1, and is refused.

    The network is given x = alpha x0 + sigma eps (alpha^2 + sigma^2 = 1), flow's (1 - s) x0 + s eps times
    1/hypot(1 - s, s), and its v says flow's u = eps - x0 = (alpha + sigma) v + (sigma - alpha) x. Hence the
    squared error of u is (alpha + sigma)^2 times that of v, for every network and every sample, and so is its
    gradient. Raises ValueError for eps at SNR 0, where u takes an infinite multiple of its error.
    """

    def __call__(self, snr: Array, prediction_type: str) -> Array:
        if prediction_type == "flow_prediction":
            raise ValueError("flow_prediction's loss is flow's already: leave the weighting out")
        if prediction_type != "epsilon":
            return (np.sqrt(snr) + 1) ** 2 / _error_ratio(snr, prediction_type)
        if not np.all(snr > 0):
            raise ValueError(
                "epsilon has no flow loss at zero terminal SNR: train v_prediction, or end the schedule at a "
                "finite sigma"
            )
        weights: Array = (1 + 1 / np.sqrt(snr)) ** 2
        return weights


@dataclass(frozen=True)
class EpsilonLike(Weighting):
    """Weighs a loss as the eps loss does, SNR on the x0 loss: for v SNR/(SNR + 1) (kohya's
    --scale_v_pred_loss_like_noise_pred), 0 at SNR 0; for eps 1. ``snr_limit`` clips the SNR from above, as
    kohya does."""

    snr_limit: float = 1000.0

    def __post_init__(self) -> None:
        _check_positive("snr_limit", self.snr_limit)

    def __call__(self, snr: Array, prediction_type: str) -> Array:
        if prediction_type == "epsilon":
            return np.ones_like(snr)
        snr = np.minimum(snr, self.snr_limit)
        return snr / _error_ratio(snr, prediction_type)


@dataclass(frozen=True)
class PlusVLike(Weighting):
    """The loss plus ``amount`` times the eps loss weighted as a v loss, 1 + amount (SNR + 1)/SNR (kohya's
    --v_pred_like_loss).

    The second term has no limit at SNR 0, so (SNR + 1)/SNR is capped at ``cap``: by default SDXL's own at its
    last timestep, 214.6, the largest that stock training ever gives. ``snr_limit`` clips the SNR from above,
    as kohya does.
    """

    amount: float
    cap: float = field(default_factory=lambda: 1 / float(NoiseSchedule.sdxl().snr[-1]) + 1)
    snr_limit: float = 1000.0

    def __post_init__(self) -> None:
        _check_positive("v_pred_like_loss", self.amount)
        _check_positive("cap", self.cap)
        _check_positive("snr_limit", self.snr_limit)

    def __call__(self, snr: Array, prediction_type: str) -> Array:
        snr = np.minimum(snr, self.snr_limit)
        return 1 + self.amount / np.maximum(snr / (snr + 1), 1 / self.cap)


@dataclass(frozen=True)
class Product(Weighting):
    """Several weightings of one loss: kohya multiplies all that its flags ask for."""

    parts: tuple[Weighting, ...]

    def __call__(self, snr: Array, prediction_type: str) -> Array:
        return functools.reduce(
            np.multiply, (part(snr, prediction_type) for part in self.parts), np.ones_like(snr)
        )


def _error_ratio(snr: Array, prediction_type: str) -> Array:
    """Squared error of the prediction over squared error of x0, for the predictions where it is finite and
    positive at SNR 0."""
    check_prediction_type(prediction_type)
    return {"sample": np.ones_like(snr), "v_prediction": snr + 1, "flow_prediction": (np.sqrt(snr) + 1) ** 2}[
        prediction_type
    ]


def _check_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a positive number, got {value}")
