"""The demo's sizes: all that its numbers depend on, the checkpoint and the world apart."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """Sizes of one demo. Raises ValueError for steps or a seed that cannot be."""

    seed: int = 0  # pictures, noise and timesteps of the finetunes, and the noise that is sampled from
    steps: int = 400  # of each finetune
    batch: int = 16  # pictures per step
    learning_rate: float = 1e-3  # after a warm-up; falls to 0 over the last half
    average: float = 0.99  # of the weights that are sampled, over some 100 steps
    pictures: int = 8  # generated per place and network
    sampling_steps: int = 25

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"--steps must be at least 1, got {self.steps}")
        if not 0 <= self.seed < 2**62:
            raise ValueError(f"--seed must be 0 or a positive 62-bit number, got {self.seed}")
