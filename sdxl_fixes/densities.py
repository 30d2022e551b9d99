"""How often a training sees each noise level: the papers' densities, carried to the rows of a schedule.

Each is defined in the quantity that its paper defines it in: logit-normal, mode and beta on rectified flow's
level s = sigma/(1 + sigma), 0 clean and 1 noise, Laplace on log SNR = 2 log((1 - s)/s). So one density means
the same noise on every schedule and for every prediction type.

The discretisation: a row stands for its cell, the levels that are nearer in s to it than to another row; the
first and the last cell reach as far outwards as inwards, within [0, 1] (at zero terminal SNR the last ends at
s = 1, where log SNR is minus infinity). A row's share is the density's mass in its cell; what lies outside of
all cells is left out, not heaped on the ends.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from sdxl_fixes.schedule import Array, NoiseSchedule

MOST_MODE_SCALE = 2 / (math.pi - 2)  # above it two u have the same s (arXiv:2403.03206 section 3.1)


class Density:
    """A distribution of noise levels: subclasses say which."""

    def below(self, s: Array, rest: Array) -> Array:
        """The probability of levels below ``s`` (any shape), in [0, 1]; ``rest`` is 1 - s, exact near 1.
        Small values are relatively exact."""
        raise NotImplementedError

    def mirrored(self) -> Density:
        """The distribution of 1 - s."""
        raise NotImplementedError

    def masses(self, schedule: NoiseSchedule) -> Array:
        """The probability of each row's cell, float64, shape [T], each to its own last digits in both tails;
        their sum is what the table covers, at most 1."""
        rest, s, _ = schedule.levels(flow=True)
        ends = _ends(s), _ends(rest)
        below, above = self.below(*ends), self.mirrored().below(*ends[::-1])
        masses: Array = np.where(below[1:] < 0.5, np.diff(below), -np.diff(above))
        return np.maximum(masses, 0)


@dataclass(frozen=True)
class LogitNormal(Density):
    """log(s/(1 - s)), which is log sigma, is normal (arXiv:2403.03206 section 3.1): a positive mean draws
    more noise."""

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        _check_finite("logit_mean", self.mean)
        _check_positive("logit_std", self.std)

    def below(self, s: Array, rest: Array) -> Array:
        z = (_log(s) - _log(rest) - self.mean) / self.std
        found: Array = np.vectorize(math.erfc, otypes=[np.float64])(-z / math.sqrt(2)) / 2
        return found

    def mirrored(self) -> Density:
        return LogitNormal(-self.mean, self.std)

    def __str__(self) -> str:
        return f"logit-normal, mean {self.mean:g}, std {self.std:g}"


@dataclass(frozen=True)
class Laplace(Density):
    """log SNR has density exp(-|log SNR - mean|/scale)/(2 scale) (arXiv:2407.03297): a positive mean draws
    less noise. The defaults are those of diffusers' beta_schedule "laplace"."""

    mean: float = 0.0
    scale: float = 0.5

    def __post_init__(self) -> None:
        _check_finite("laplace_mean", self.mean)
        _check_positive("laplace_scale", self.scale)

    def below(self, s: Array, rest: Array) -> Array:
        x = (2 * (_log(rest) - _log(s)) - self.mean) / self.scale
        tail = np.exp(-np.abs(x)) / 2
        return np.where(x > 0, tail, 1 - tail)

    def mirrored(self) -> Density:
        return Laplace(-self.mean, self.scale)

    def __str__(self) -> str:
        return f"Laplace in log SNR, mean {self.mean:g}, scale {self.scale:g}"


@dataclass(frozen=True)
class Mode(Density):
    """s = 1 - u - scale (cos(pi u/2)^2 - 1 + u) of a uniform u (arXiv:2403.03206 section 3.1): a positive
    scale draws more of the middle, a negative one more of both ends, 0 uniformly in s."""

    scale: float = 1.29

    def __post_init__(self) -> None:
        if not -1 <= self.scale <= MOST_MODE_SCALE:
            raise ValueError(f"mode_scale must lie in [-1, {MOST_MODE_SCALE:.5f}], got {self.scale}")

    def below(self, s: Array, rest: Array) -> Array:
        low, high = np.zeros_like(s), np.ones_like(s)
        for _ in range(80):  # of doubles in [0, 1] a bisection finds the small ones relatively exactly, too
            u = (low + high) / 2
            under = u + self.scale * (u - np.sin(math.pi / 2 * u) ** 2) < s  # the s of 1 - u, which rises
            low, high = np.where(under, u, low), np.where(under, high, u)
        found: Array = np.where(rest <= 0, 1.0, high)
        return np.where(s <= 0, 0.0, found)

    def mirrored(self) -> Density:
        return self

    def __str__(self) -> str:
        return f"mode, scale {self.scale:g}"


@dataclass(frozen=True)
class Beta(Density):
    """s has density s^(alpha - 1) (1 - s)^(beta - 1)/B(alpha, beta); 1 and 1 are uniform in s, the draws of
    rectified flow (arXiv:2209.03003)."""

    alpha: float = 1.0
    beta: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("beta_alpha", self.alpha), ("beta_beta", self.beta)):
            if not 0.01 <= value <= 1000:
                raise ValueError(f"{name} must lie in [0.01, 1000], got {value}")

    def below(self, s: Array, rest: Array) -> Array:
        a, b = self.alpha, self.beta
        near = s * (a + b + 2) < a + 1  # where the fraction of one converges, else the other's
        low, high = (
            (np.where(near, s, 0), np.where(near, rest, 1)),
            (np.where(near, 0, rest), np.where(near, 1, s)),
        )
        return np.where(near, _incomplete_beta(*low, a, b), 1 - _incomplete_beta(*high, b, a))

    def mirrored(self) -> Density:
        return Beta(self.beta, self.alpha)

    def __str__(self) -> str:
        return f"beta, alpha {self.alpha:g}, beta {self.beta:g}" + (
            " (uniform in s)" if self.alpha == self.beta == 1 else ""
        )


def shifted_rows(schedule: NoiseSchedule, ratio: float) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The row, for each row, whose level is nearest (in s) to its sigma times ``ratio``: s' = ratio s/(1 +
    (ratio - 1) s) (arXiv:2403.03206 eq. 23), shape [T]; the first or the last where the table ends before."""
    s = schedule.levels(flow=True)[1]
    wanted = ratio * s / (1 + (ratio - 1) * s)
    return np.searchsorted((s[1:] + s[:-1]) / 2, wanted, side="right").astype(np.int64)


def _ends(levels: Array) -> Array:
    """Where the cells of rows begin and end, shape [T + 1], of s or of 1 - s at the rows."""
    inner = (levels[1:] + levels[:-1]) / 2
    outer = np.clip(2 * levels[[0, -1]] - inner[[0, -1]], 0, 1)
    return np.concatenate((outer[:1], inner, outer[1:]))


def _incomplete_beta(x: Array, rest: Array, a: float, b: float) -> Array:
    """The regularised incomplete beta function I_x(a, b) by its continued fraction (DLMF 8.17.22), which
    converges where x < (a + 1)/(a + b + 2); ``rest`` is 1 - x."""
    value = np.ones_like(x)
    for m in range(100 + math.ceil(5 * math.sqrt(max(a, b))), 0, -1):
        even = m * (b - m) / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m - 1) * (a + b + m - 1) / ((a + 2 * m - 2) * (a + 2 * m - 1))
        value = 1 + odd * x / (1 + even * x / value)
    whole = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    with np.errstate(over="ignore"):
        found: Array = np.exp(a * _log(x) + b * _log(rest) - whole) / a / value
    return found


def _log(x: Array) -> Array:
    with np.errstate(divide="ignore"):
        logarithm: Array = np.log(x)
    return logarithm


def _check_finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"{name} must be a number, got {value}")


def _check_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a positive number, got {value}")
