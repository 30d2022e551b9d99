"""Sizes and world of the experiments on photographs: captions, brightness, canvas.

The sizes were chosen by two trainings from scratch and four finetunes at seed 0, judged by the brightness.
The flaw appears as the network learns: with v-prediction on the stock schedule the three captions gave
-0.81 / 0.43 / 0.88 after 250 steps, -0.77 / -0.05 / 0.86 after 500, -0.48 / -0.07 / 0.33 after 750 and
-0.40 / -0.04 / 0.26 after 1000; on zero terminal SNR -1.03 / 0.01 / 1.01 after 1000.
"""

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
    """Sizes of one training from scratch and its finetunes."""

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
