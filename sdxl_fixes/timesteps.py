"""Which timesteps a training step sees."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from sdxl_fixes.names import check_seed
from sdxl_fixes.schedule import NoiseSchedule
from sdxl_fixes.tensors import Table


class TimestepSampler:
    """Draws timesteps from [min_timestep, max_timestep), max exclusive as in kohya (default: all of the
    schedule).

    terminal_share  this share of the draws goes to the timesteps from ``terminal_start`` on (default: where
                    sigma exceeds stock SDXL's 14.6, the steps that a longer schedule adds), the rest is
                    uniform over all. :meth:`weights` is the importance weight that keeps the expected loss
                    what uniform draws give.
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
        terminal_share: float = 0.0,
        terminal_start: int | None = None,
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
        t = np.arange(self.min_timestep, self.max_timestep)
        terminal = t >= terminal_start
        self.probabilities = (1 - terminal_share) / len(t) + terminal_share * terminal / max(
            1, terminal.sum()
        )
        # the last, 1, is not searched: float32 may round u up to it
        self._cumulative = Table(np.cumsum(self.probabilities)[:-1])
        self._weights = (
            None
            if terminal_share == 0
            else Table(
                np.concatenate(
                    [
                        np.ones(self.min_timestep),
                        1 / (len(t) * self.probabilities),
                        np.ones(steps - self.max_timestep),
                    ]
                )
            )
        )

    def draw(
        self,
        batch_size: int,
        device: torch.device | str = "cpu",
        generator: torch.Generator | None = None,
        training: bool = True,
    ) -> torch.Tensor:
        """``batch_size`` timesteps, int64, shape [B], on ``device``; ``training=False`` draws independently
        and counts nothing."""
        device = torch.device(device)
        if self.stratified and training:
            u = torch.from_numpy(self._strata(batch_size).astype(np.float32)).to(device, non_blocking=True)
        elif self._weights is None:
            return torch.randint(
                self.min_timestep, self.max_timestep, (batch_size,), device=device, generator=generator
            )
        else:
            u = torch.rand(batch_size, device=device, generator=generator)
        return torch.searchsorted(self._cumulative.on(u.device), u, right=True) + self.min_timestep

    def end_of_step(self) -> None:
        """The optimizer steps now: the next stratified draw begins a new step, also if fewer than
        ``accumulation`` were drawn for this one (accelerate steps at the end of an epoch, whatever is
        left)."""
        self._drawn += -self._drawn % self._accumulation

    def weights(self, timesteps: torch.Tensor) -> torch.Tensor | None:
        """Importance weights of ``timesteps`` (shape [B]), float32; None where all are 1."""
        return None if self._weights is None else self._weights(timesteps)

    def state_dict(self) -> dict[str, Any]:
        """Where stratified draws stand."""
        return {"drawn": self._drawn, "accumulation": self._accumulation, "seed": self._seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`. Another accumulation (or world size) continues with the next
        optimizer step; raises ValueError if the state was taken inside one."""
        steps, inside = divmod(int(state["drawn"]), int(state["accumulation"]))
        if inside and state["accumulation"] != self._accumulation:
            raise ValueError(
                f"the sampler was saved inside an optimizer step of {state['accumulation']} draws, and this "
                f"one has {self._accumulation}: "
                "save at the end of a step to change the accumulation"
            )
        self._drawn, self._seed = steps * self._accumulation + inside, check_seed(state["seed"])

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
