"""Where the steps of generation lie: trained timesteps, chosen so that no step has to cross more than its
share of the noise.

A feature of scale a (its spread over the data; 1 for a latent value, 64 for the brightness of 128 x 128 of
them) is drawn while sigma is near a, so a solver's error depends on how far log sigma moves in a step there.
Steps even in t (diffusers' trailing, linspace, leading) cross a schedule's last sigmas in one leap: of a zero
terminal SNR model they return 59 to 75 % of the brightness's spread at 25 steps, and of a feature of scale
1/4 as little. Steps even in log sigma return the same share at every scale.

A first-order step loses some spread at every scale. On a Gaussian of scale a, with the angle
phi = arctan(sigma/a), DDIM's and Euler's step multiplies it by cos(phi - phi'): N steps return at most
cos(pi/2N)^N at one scale, .952 for 25, where they are even in phi; at all scales from 1 to 128 at most .91.
With u = log sigma and rho(u) steps per unit of u, the loss is the integral of sech(u - log a)^2 / (8 rho);
its mean over log a in an interval is least for rho = sqrt(tanh(u - low) - tanh(u - high)): ``first_order``,
for a from 1/4 to 128. It returns .92 and .90 at scales 1 and 64, log_sigma .89 and .89.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from sdxl_fixes.schedule import Array, NoiseSchedule

Timesteps = npt.NDArray[np.int64]

OURS = ("first_order", "log_sigma")  # that diffusers does not know
SPACINGS = (*OURS, "karras", "trailing", "linspace", "leading")
_LOW, _HIGH = math.log(1 / 4), math.log(128)  # scales whose loss first_order makes least


def timesteps(schedule: NoiseSchedule, steps: int, spacing: str = "log_sigma", offset: int = 0) -> Timesteps:
    """``steps`` distinct trained timesteps, falling, int64. All but ``leading`` start at the last one.

    first_order  with the density above
    log_sigma  even in log sigma
               (both as far as trained timesteps exist: a gap that is wider than one share is one step)
    karras     the nearest to Karras' sigmas with rho 7 (arXiv:2206.00364 eq. 5)
    trailing, linspace, leading  even in t (arXiv:2305.08891 table 2); ``offset`` is added to leading's

    Raises ValueError for fewer than 1 or more than T steps, and for an unknown spacing.
    """
    last = len(schedule) - 1
    if not 1 <= steps <= len(schedule):
        raise ValueError(
            f"the number of steps must lie in 1..{len(schedule)}, the trained timesteps, got {steps}"
        )
    if spacing in OURS:
        widths = _widths(schedule) if spacing == "log_sigma" else _angles(schedule)
        return _distinct(last - _even(widths, steps))
    if spacing == "karras":
        log_sigmas = np.minimum(schedule.log_sigmas, 1e3)  # 1e3 for infinity
        return _distinct(_nearest(log_sigmas, np.minimum(np.log(_karras(schedule, steps)), 1e3)))
    if spacing == "trailing":
        return np.round(len(schedule) * (1 - np.arange(steps) / steps)).astype(np.int64) - 1
    if spacing == "linspace":
        return _distinct(np.round(np.linspace(last, 0 if steps > 1 else last, steps)).astype(np.int64))
    if spacing == "leading":
        return np.minimum(
            np.arange(steps)[::-1] * (len(schedule) // steps) + offset, last - np.arange(steps)
        ).astype(np.int64)
    raise ValueError(f"unknown timestep_spacing {spacing!r}: expected one of {', '.join(SPACINGS)}")


def _widths(schedule: NoiseSchedule) -> Array:
    """How far log sigma falls after each timestep, from the last to the first. At both ends it falls for ever
    (from SNR 0, and to the clean image); such a gap counts as much as its neighbour."""
    log_sigmas = schedule.log_sigmas[::-1]
    widths = np.empty(len(schedule))
    widths[:-1] = log_sigmas[:-1] - log_sigmas[1:]
    if np.isinf(widths[0]):
        widths[0] = widths[1] if len(widths) > 2 else 1.0
    widths[-1] = widths[-2]
    return widths


def _angles(schedule: NoiseSchedule) -> Array:
    """How far the integral of first_order's density falls after each timestep, from the last to the first,
    and from there to the clean image; finite at both ends."""
    u = np.linspace(_LOW - 40, _HIGH + 40, 20001)  # the density falls as exp(-|u|)
    density = np.sqrt(math.sinh(_HIGH - _LOW) / (np.cosh(u - _LOW) * np.cosh(u - _HIGH)))
    passed = np.append(np.interp(schedule.log_sigmas[::-1], u, np.cumsum(density) - density / 2), 0.0)
    widths: Array = np.maximum(passed[:-1] - passed[1:], 1e-12 * passed[0])  # noisier ones count, too
    return widths


def _even(widths: Array, steps: int) -> Timesteps:
    """Indices into ``widths`` that share out their sum evenly, where no single one counts for more than one
    share: the share g solves sum(min(width, g)) = steps g, found by leaving the widest out until the rest are
    narrower than g."""
    wide = np.sort(widths)[::-1]
    rest = np.cumsum(wide[::-1])[::-1]  # with the widest 0, 1, ... left out
    shares = rest[:steps] / (steps - np.arange(steps))
    share = shares[np.argmax(wide[:steps] <= shares)]
    return _nearest(
        np.concatenate(([0.0], np.cumsum(np.minimum(widths, share))[:-1])) / share, np.arange(steps)
    )


def _karras(schedule: NoiseSchedule, steps: int) -> Array:
    high = schedule.terminal_sigma if np.isfinite(schedule.terminal_sigma) else float(schedule.sigmas[-2])
    ramp = np.linspace(0, 1, steps if np.isfinite(schedule.terminal_sigma) else max(steps - 1, 1))
    sigmas: Array = (high ** (1 / 7) + ramp * (schedule.sigmas[0] ** (1 / 7) - high ** (1 / 7))) ** 7
    return (
        np.concatenate(([schedule.terminal_sigma], sigmas))[:steps]
        if np.isinf(schedule.terminal_sigma)
        else sigmas
    )


def _nearest(rising: Array, wanted: npt.NDArray[Any]) -> Timesteps:
    """Index into ``rising`` of the value nearest to each that is wanted."""
    above = np.clip(np.searchsorted(rising, wanted), 1, len(rising) - 1)
    nearest: Timesteps = (above - (wanted - rising[above - 1] < rising[above] - wanted)).astype(np.int64)
    return nearest


def _distinct(falling: Timesteps) -> Timesteps:
    """The nearest strictly falling timesteps of at least 0."""
    order = np.arange(len(falling))
    return np.maximum(np.minimum.accumulate(falling + order) - order, order[::-1]).astype(np.int64)
