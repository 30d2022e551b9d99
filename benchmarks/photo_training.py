"""Train a tiny SDXL U-Net as SDXL was, finetune it with the fixed noise schedule, offline on a CPU, and
sample both.

There are no VAE and no text encoder offline, so the latents are the photo's own pixels and each caption word
is a frozen random vector; the network class, the noise, the objective and the sampler are the real ones. The
report says all this, too.
"""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from photo_settings import CANVAS, CAPTIONS, FOLD, TEXT_WIDTH, DemoSettings
from photos import Captions, Photos, embed_captions, load_photos, unfold

from sdxl_fixes.objective import Objective
from sdxl_fixes.schedule import NoiseSchedule

Progress = Callable[[Iterable[Any], str], Iterator[Any]]


@dataclass(frozen=True)
class Variant:
    """What one training run is to show: a prediction type and a schedule; a run with a ``start`` finetunes
    that run's network."""

    key: str
    label: str
    prediction_type: str
    schedule: NoiseSchedule
    start: str | None = None


@dataclass(frozen=True)
class Result:
    """One finished run."""

    variant: Variant
    losses: list[float]  # one per training step
    pictures: torch.Tensor  # [captions, samples, CANVAS, CANVAS], latents
    parameters: int  # of the network
    seconds: float

    @property
    def brightness(self) -> list[list[float]]:
        """Mean of each generated picture, [captions][samples], in latent units."""
        rows: list[list[float]] = self.pictures.double().mean((2, 3)).tolist()
        return rows

    @property
    def contrast(self) -> list[float]:
        """Standard deviation inside a generated picture, per caption, in latent units."""
        rows: list[float] = self.pictures.double().flatten(2).std(2).mean(1).tolist()
        return rows

    @property
    def final_loss(self) -> float:
        """Mean loss of the last tenth of the steps."""
        return float(np.mean(self.losses[-max(1, len(self.losses) // 10) :]))


def variants() -> list[Variant]:
    """What SDXL is and its v-prediction twin, from scratch; finetunes of them in which the schedule alone
    changes, and one as it was."""
    stock = NoiseSchedule.sdxl()
    sigma_300, zero = stock.with_terminal_sigma(300), stock.zero_terminal_snr()
    return [
        Variant("stock_epsilon", "epsilon, stock schedule", "epsilon", stock),
        Variant("fixed_epsilon", "epsilon, then sigma 300", "epsilon", sigma_300, "stock_epsilon"),
        Variant("stock_v", "v, stock schedule", "v_prediction", stock),
        Variant("longer_v", "v, stock schedule for longer", "v_prediction", stock, "stock_v"),
        Variant("fixed_v", "v, then sigma 300", "v_prediction", sigma_300, "stock_v"),
        Variant("ztsnr_v", "v, then zero terminal SNR", "v_prediction", zero, "stock_v"),
    ]


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


def compare(settings: DemoSettings, progress: Progress, which: list[Variant] | None = None) -> list[Result]:
    """Train and sample every variant; a variant's start must come before it."""
    photos, captions = load_photos(settings), embed_captions(settings.seed)
    networks: dict[str | None, Any] = {}
    results = []
    for variant in variants() if which is None else which:
        start = time.perf_counter()
        if variant.start is None:
            unet, seed = build_unet(settings), settings.seed
            plan = rates(settings.learning_rate, settings.steps, 50, 0.3)
        else:
            unet, seed = copy.deepcopy(networks[variant.start]), settings.seed + 100
            plan = rates(settings.finetuning_rate, settings.finetuning_steps, 20, 0.5)
        objective = Objective(variant.schedule, variant.prediction_type)
        work = progress(plan, f"train {variant.label}")
        losses = list(train(unet.train(), objective, photos, captions, seed, work, settings.batch))
        networks[variant.key] = unet.eval()
        scheduler = variant.schedule.scheduler("dpmpp_2m", variant.prediction_type)
        pictures = sample(
            unet, scheduler, captions, settings.seed, settings.samples, settings.sampling_steps, progress
        )
        parameters = sum(parameter.numel() for parameter in unet.parameters())
        results.append(Result(variant, losses, pictures, parameters, time.perf_counter() - start))
    return results
