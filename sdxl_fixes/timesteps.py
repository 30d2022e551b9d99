"""Which timesteps a training step sees."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from sdxl_fixes.densities import Density, shifted_rows
from sdxl_fixes.names import check_seed
from sdxl_fixes.schedule import Array, NoiseSchedule
from sdxl_fixes.tensors import Table

LATENT = 8  # pixels of the canvas to a latent, each way
MOST_WEIGHT = 1000.0  # a larger one would be a step of training made of one sample
_UNIT = 2**53  # a density's draws are whole numbers below it: exact on every device, to 1.1e-16


class TimestepSampler:
    """Draws timesteps from [min_timestep, max_timestep), max exclusive as in kohya (default: all of the
    schedule).

    density         of the noise levels (sdxl_fixes.densities), carried to the timesteps of the range; None:
                    every timestep alike. The expected loss becomes that of the density's draws, unless
    weighted        says to weight the loss by 1/(N p), so that it stays that of uniform draws
    uniform_share   this share of a density's draws is uniform over the range instead, which gives every
                    timestep some, and bounds the weights by 1/uniform_share
    terminal_share  this share of the draws goes to the timesteps from ``terminal_start`` on (default: where
                    sigma exceeds stock SDXL's 14.6, the steps that a longer schedule adds), the rest is
                    drawn as without it. :meth:`weights` is the importance weight that keeps the expected
                    loss what it is without it.
    base            side in pixels of the square canvas whose timesteps are as drawn. A sample of another area
                    sees sigma times sqrt(area/base^2) (arXiv:2403.03206 section 5.3.2): the nearest timestep
                    of the range that has it. None: every canvas is treated alike
    stratified      the draws of one optimizer step, over batch, gradient accumulation and ranks together,
                    fall one in each of as many equal slices of the distribution, so that an optimizer step
                    always sees the whole range (the low-discrepancy sampler of arXiv:2107.00630 appendix I.1,
                    jittered). Who gets which slice is shuffled by (seed, optimizer step), equally on all
                    ranks, without communication: give every rank its ``rank``, and all the same
                    ``world_size``, ``accumulation`` and ``seed``. A single draw stays exactly as distributed
                    as without it.

    Stratified draws are a function of (seed, number of draws so far): save :meth:`state_dict` to resume them
    exactly. Other draws use torch's generator.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        min_timestep: int = 0,
        max_timestep: int | None = None,
        density: Density | None = None,
        weighted: bool = False,
        uniform_share: float = 0.0,
        terminal_share: float = 0.0,
        terminal_start: int | None = None,
        base: int | None = None,
        stratified: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
    ) -> None:
        steps = len(schedule)
        max_timestep = steps if max_timestep is None else max_timestep
        if not 0 <= min_timestep < max_timestep <= steps:
            raise ValueError(
                f"timesteps need 0 <= min < max <= {steps}, got min_timestep={min_timestep}, "
                f"max_timestep={max_timestep}"
            )
        if density is None and (weighted or uniform_share):
            raise ValueError("weighted and uniform_share belong to a density: give one, or leave them out")
        if not 0 <= uniform_share < 1:
            raise ValueError(f"uniform_share must lie in [0, 1), got {uniform_share}")
        if base is not None and base < 1:
            raise ValueError(f"base must be a canvas's side in pixels, got {base}")
        if terminal_start is not None and not terminal_share:
            raise ValueError("terminal_start needs a terminal_share: the share of the draws that goes there")
        if not 0 <= terminal_share < 1:
            raise ValueError(f"terminal_share must lie in [0, 1), got {terminal_share}")
        if not (world_size >= 1 and 0 <= rank < world_size and accumulation >= 1):
            raise ValueError(
                f"need 0 <= rank < world_size and accumulation >= 1, got rank={rank}, "
                f"world_size={world_size}, accumulation={accumulation}"
            )
        if terminal_start is None:
            added = schedule.above(NoiseSchedule.sdxl().terminal_sigma)
            terminal_start = int(np.argmax(added)) if added.any() else steps
        if terminal_share and not 0 <= terminal_start < max_timestep:
            raise ValueError(
                f"terminal_share needs timesteps above sigma 14.6 in [{min_timestep}, {max_timestep}), and "
                f"{schedule!r} has none there: "
                "use zero terminal SNR or a larger terminal sigma, or give terminal_start"
            )
        self.schedule = schedule
        self.min_timestep, self.max_timestep, self.stratified = (
            int(min_timestep),
            int(max_timestep),
            stratified,
        )
        self._seed, self._rank, self._world_size, self._accumulation, self._drawn = (
            check_seed(seed),
            rank,
            world_size,
            accumulation,
            0,
        )
        self.density, self.weighted, self.base = density, weighted, base
        t = np.arange(self.min_timestep, self.max_timestep)
        terminal = t >= terminal_start
        plain = np.ones(len(t)) if density is None else self._relative(density, uniform_share)
        self.probabilities: Array = (1 - terminal_share) * plain / len(t) + terminal_share * terminal / max(
            1, terminal.sum()
        )
        self._wanted = (np.ones(len(t)) if weighted else plain) / len(t)  # what the expected loss is of
        self._uniform = density is None and not terminal_share
        if density is None:
            # the last, 1, is not searched: float32 may round u up to it
            self._cumulative = Table(np.cumsum(self.probabilities)[:-1])
        else:
            below = np.cumsum(self.probabilities)
            counts = np.rint(below / below[-1] * _UNIT).astype(np.int64)
            self.probabilities = np.diff(counts, prepend=0) / _UNIT
            self._cumulative = Table(counts[:-1], np.int64)
        self._weights = Table(self._importance(t)) if weighted or terminal_share else None
        self._check_weights()
        self._seen: dict[float, tuple[Table, Table | None]] = {}  # by ratio: timesteps, weights

    def draw(
        self,
        batch_size: int,
        device: torch.device | str = "cpu",
        generator: torch.Generator | None = None,
        training: bool = True,
        size: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """``batch_size`` timesteps, int64, shape [B], on ``device``; ``training=False`` draws independently
        and counts nothing. ``size`` is the latents' height and width, which a sampler with a ``base``
        needs."""
        rows = self._rows(batch_size, torch.device(device), generator, training)
        return rows if self.base is None else self._shifted(size)[0].on(rows.device)[rows]

    def _rows(
        self, batch_size: int, device: torch.device, generator: torch.Generator | None, training: bool
    ) -> torch.Tensor:
        """Timesteps as drawn on the base canvas."""
        if self.stratified and training:
            points = self._strata(batch_size)
            exact = (points * _UNIT).astype(np.int64) if self.density else points.astype(np.float32)
            u = torch.from_numpy(exact).to(device, non_blocking=True)
        elif self._uniform:
            return torch.randint(
                self.min_timestep, self.max_timestep, (batch_size,), device=device, generator=generator
            )
        elif self.density:
            u = torch.randint(0, _UNIT, (batch_size,), device=device, generator=generator)
        else:
            u = torch.rand(batch_size, device=device, generator=generator)
        return torch.searchsorted(self._cumulative.on(u.device), u, right=True) + self.min_timestep

    def end_of_step(self) -> None:
        """The optimizer steps now: the next stratified draw begins a new step, also if fewer than
        ``accumulation`` were drawn for this one (accelerate steps at the end of an epoch, whatever is
        left)."""
        self._drawn += -self._drawn % self._accumulation

    def weights(self, timesteps: torch.Tensor, size: tuple[int, int] | None = None) -> torch.Tensor | None:
        """Importance weights of ``timesteps`` (shape [B], as drawn for latents of ``size``), float32; None
        where all are 1."""
        if self._weights is None:
            return None
        weights = self._weights if self.base is None else self._shifted(size)[1]
        assert weights is not None
        return weights(timesteps)

    @property
    def effective(self) -> float:
        """The share of the draws that is left of them after weighting, 1/(N sum p w^2) of uniform weights."""
        return float(1 / (self._wanted**2 / self.probabilities).sum()) if self._weights else 1.0

    def state_dict(self) -> dict[str, Any]:
        """Where stratified draws stand."""
        made_for = {"accumulation": self._accumulation, "world_size": self._world_size}
        return {"drawn": self._drawn, **made_for, "seed": self._seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`. Another accumulation (or world size) continues with the next
        optimizer step; raises ValueError if the state was taken inside one."""
        steps, inside = divmod(int(state["drawn"]), int(state["accumulation"]))
        made_for = (int(state["accumulation"]), int(state["world_size"]))
        if inside and made_for != (self._accumulation, self._world_size):
            raise ValueError(
                f"the sampler was saved inside an optimizer step of {made_for[0]} draws on {made_for[1]} "
                f"processes, and this one has {self._accumulation} on {self._world_size}: "
                "save at the end of a step to change them"
            )
        self._drawn, self._seed = steps * self._accumulation + inside, check_seed(state["seed"])

    def _relative(self, density: Density, uniform_share: float) -> Array:
        """The density's probability of each timestep of the range, times their number."""
        masses = density.masses(self.schedule)[self.min_timestep : self.max_timestep]
        if not masses.sum() > 0:
            raise ValueError(
                f"{density} has no mass on timesteps {self.min_timestep} to {self.max_timestep - 1} of "
                f"{self.schedule!r}: take other parameters"
            )
        relative: Array = (1 - uniform_share) * len(masses) * masses / masses.sum() + uniform_share
        return relative

    def _importance(self, rows: np.ndarray[Any, np.dtype[np.int64]]) -> Array:
        """The weight of every timestep of the schedule, where ``rows`` are those that the draws become: what
        should be expected there over what is drawn; 1 where nothing is."""
        count = len(self.schedule)
        wanted, drawn = (np.bincount(rows, p, count) for p in (self._wanted, self.probabilities))
        weights: Array = np.divide(wanted, drawn, out=np.ones(count), where=drawn > 0)
        return weights

    def _check_weights(self) -> None:
        if self._weights is None or self.density is None:
            return
        with np.errstate(divide="ignore"):
            most = float((self._wanted / self.probabilities).max())
        if most > MOST_WEIGHT:
            raise ValueError(
                f"{self.density} hardly draws some timesteps, so importance weights would reach {most:.3g}: "
                "give uniform_share 0.1 (--timestep_uniform_share), which bounds them by 10, or do not weight"
            )

    def _shifted(self, size: tuple[int, int] | None) -> tuple[Table, Table | None]:
        """What each timestep becomes for latents of ``size``, and the weights there."""
        if size is None or self.base is None:
            raise ValueError("a resolution shift needs the latents' size: give their height and width")
        ratio = LATENT * math.sqrt(size[0] * size[1]) / self.base
        if ratio not in self._seen:
            rows = shifted_rows(self.schedule, ratio).clip(self.min_timestep, self.max_timestep - 1)
            inside = rows[self.min_timestep : self.max_timestep]
            weights = None if self._weights is None else Table(self._importance(inside))
            self._seen[ratio] = Table(rows, np.int64), weights
        return self._seen[ratio]

    def _strata(self, batch_size: int) -> np.ndarray[Any, np.dtype[np.float64]]:
        step, micro = divmod(self._drawn, self._accumulation)
        self._drawn += 1
        count = batch_size * self._world_size * self._accumulation
        # raw bits, which numpy keeps stable between versions, unlike Generator.permutation
        key = np.array([self._seed, step], dtype=np.uint64)  # of a list numpy makes float64 from 2^63 on
        slices, places = np.random.Philox(key=key).random_raw(2 * count).reshape(2, count)
        points: np.ndarray[Any, np.dtype[np.float64]] = (
            np.argsort(slices, kind="stable") + (places >> np.uint64(11)) * 2.0**-53
        ) / count
        first = (micro * self._world_size + self._rank) * batch_size
        return points[first : first + batch_size]
