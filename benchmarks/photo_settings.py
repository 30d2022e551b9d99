"""The demo's sizes and its world: captions, brightness, canvas."""

from __future__ import annotations

from dataclasses import dataclass

# what a caption says, and the brightness that it asks for
CAPTIONS = {"a dark photo": -1.0, "a photo": 0.0, "a bright photo": 1.0}
SPREAD = 0.3  # standard deviation of the photos' brightness around that: captions do not say everything
GREY, UNIT = 0.5, 0.25  # latent = (pixel - GREY)/UNIT: 0 is middle grey, -2 black, +2 white
CANVAS = 64  # latent pixels per side: SDXL's own at 512 x 512; the flaw grows with the canvas
FOLD = 8  # 64 x 64 pixels are folded to 8 x 8 sites of 64 channels: nothing is lost and the network is cheap
TEXT_WIDTH = 64


@dataclass(frozen=True)
class DemoSettings:
    """Sizes of one demo. The defaults take about four minutes on two cores. Raises ValueError for steps or a
    seed that cannot be."""

    seed: int = 0
    steps: int = 1000  # from scratch, on the stock schedule
    finetuning_steps: int = 150
    batch: int = 8  # photos per step
    learning_rate: float = 1e-3  # after a warm-up; falls to 0 over the last 30 %
    finetuning_rate: float = 3e-4  # after a warm-up; falls to 0 over the last half
    crops: int = 512  # different crops to draw from
    widths: tuple[int, ...] = (128, 64)  # channels of the U-Net at 8 x 8 (at least twice 64) and at 4 x 4
    samples: int = 12  # generated pictures per caption
    sampling_steps: int = 25

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"--steps must be at least 1, got {self.steps}")
        if not 0 <= self.seed < 2**63 - 1:
            raise ValueError(f"--seed must be 0 or a positive 64-bit number, got {self.seed}")
