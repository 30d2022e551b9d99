"""The experiments' first instrument: a tiny U-Net of SDXL's class, trained from scratch on photographs, and
sampled, on the CPU.

No VAE and no text encoder: the latents are the photo's own pixels and each caption word is a frozen random
vector; the network class, the noise, the objective and the sampler are the real ones.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from photo_settings import CANVAS, CAPTIONS, FOLD, TEXT_WIDTH, DemoSettings
from photos import Captions, Photos, unfold

from sdxl_fixes.objective import Objective

Progress = Callable[[Iterable[Any], str], Iterator[Any]]


def build_unet(settings: DemoSettings) -> Any:
    """SDXL's U-Net class in SDXL's structure (no attention at the finest level, text_time embedding), a
    thousandth of its size."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(settings.seed)
    deeper = len(settings.widths) - 1
    time_width = 8
    unet = UNet2DConditionModel(
        sample_size=CANVAS // FOLD,
        in_channels=FOLD**2,
        out_channels=FOLD**2,
        down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * deeper),
        up_block_types=(*("CrossAttnUpBlock2D",) * deeper, "UpBlock2D"),
        block_out_channels=settings.widths,
        layers_per_block=1,
        norm_num_groups=16,
        cross_attention_dim=TEXT_WIDTH,
        transformer_layers_per_block=1,
        attention_head_dim=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=time_width,
        projection_class_embeddings_input_dim=6 * time_width + TEXT_WIDTH,
    )
    _start_as_identity(unet)
    return unet


@torch.no_grad()
def _start_as_identity(unet: Any) -> None:
    """Let the output begin as the input, and all else add to it: a short training should not go into learning
    to copy the noise.

    The outer layers hold each value x as the pair (x, -x), because SiLU(x) - SiLU(-x) = x.
    """
    for name, module in unet.named_modules():
        if name.endswith((".conv2", ".proj_out")) or name in ("conv_in", "conv_out"):
            module.weight.zero_()
            module.bias.zero_()
    channels = FOLD**2
    identity = torch.eye(channels)
    pair = torch.cat([identity, -identity])
    unet.conv_in.weight[: 2 * channels, :, 1, 1] = pair
    unet.conv_out.weight[:, : 2 * channels, 1, 1] = pair.T / 2
    # its input: what comes from below, then what conv_in made
    shortcut = unet.up_blocks[-1].resnets[-1].conv_shortcut
    width = shortcut.out_channels
    shortcut.weight[:, -width:, 0, 0] = torch.eye(width)
    shortcut.weight[:, :-width] *= 0.1
    shortcut.bias.zero_()


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
