"""The experiments' first instrument: a tiny U-Net of SDXL's class, trained from scratch on photographs, and
sampled, on the CPU.

No VAE and no text encoder: the latents are the photo's own pixels and each caption word is a frozen random
vector; the network class, the noise, the objective and the sampler are the real ones.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import tiny_sdxl
import torch
from photo_settings import CANVAS, CAPTIONS, FOLD, TEXT_WIDTH, DemoSettings
from photos import Captions, Photos, unfold

from sdxl_fixes.objective import Objective

Progress = Callable[[Iterable[Any], str], Iterator[Any]]


def build_unet(settings: DemoSettings) -> Any:
    """SDXL's U-Net class in SDXL's structure, a thousandth of its size."""
    return tiny_sdxl.build_unet(FOLD**2, settings.widths, TEXT_WIDTH, settings.seed)


def train(
    unet: Any,
    objective: Objective,
    photos: Photos,
    captions: Captions,
    seed: int,
    rates: Iterable[float],
    batch: int = DemoSettings.batch,
) -> Iterator[float]:
    """AdamW, a step for each learning rate; yields the losses. Photos, captions, noise and timesteps depend
    on the seed alone, as long as the objective draws the same numbers in the same order (input perturbation
    and stratified timesteps do not)."""
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1.0)
    generator = torch.Generator().manual_seed(seed)
    for rate in rates:
        latents, caption = photos.draw(batch, generator)
        step = objective.draw(latents, generator=generator)
        loss = objective.loss(unet(step.noisy, step.timesteps, **captions.conditioning(caption)).sample, step)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        yield float(loss.detach())


def rates(peak: float, steps: int, warm_up: int, falling: float) -> list[float]:
    """Learning rates: linear up to ``peak`` in ``warm_up`` steps, and linear down to 0 over the last share
    ``falling``."""
    return [peak * min(1, (step + 1) / warm_up, (steps - step) / (falling * steps)) for step in range(steps)]


@torch.no_grad()
def sample(
    unet: Any,
    scheduler: Any,
    captions: Captions,
    seed: int,
    samples: int,
    steps: int,
    progress: Progress,
    network: Any = None,
) -> torch.Tensor:
    """[captions, samples, CANVAS, CANVAS] pictures, without guidance, from noise that is the same for every
    network and every caption. ``network(x, t, output)`` may replace the U-Net's output."""
    scheduler.set_timesteps(steps)
    noise = torch.randn(
        samples, FOLD**2, CANVAS // FOLD, CANVAS // FOLD, generator=torch.Generator().manual_seed(seed + 1000)
    )
    x = noise.repeat(len(CAPTIONS), 1, 1, 1) * scheduler.init_noise_sigma
    conditioning = captions.conditioning(torch.arange(len(CAPTIONS)).repeat_interleave(samples))
    drawn = torch.Generator().manual_seed(seed + 2000)
    options = {"generator": drawn} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for t in progress(scheduler.timesteps, "sample"):
        output = unet(scheduler.scale_model_input(x, t), t, **conditioning).sample
        x = scheduler.step(output if network is None else network(x, t, output), t, x, **options).prev_sample
    return unfold(x).reshape(len(CAPTIONS), samples, CANVAS, CANVAS)
