"""`sdxl-fixes demo`: train a tiny SDXL U-Net as SDXL was, finetune it with the fixed noise schedule, offline
on a CPU, and measure both.

There are no VAE and no text encoder offline, so the latents are the photo's own pixels and each caption word
is a frozen random vector; the network class, the noise, the objective and the sampler are the real ones. The
report says all this, too.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import inspect
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from sdxl_fixes.atomic import replacing
from sdxl_fixes.objective import Objective
from sdxl_fixes.schedule import NoiseSchedule

# and the brightness that each asks for
CAPTIONS = {"a dark photo": -1.0, "a photo": 0.0, "a bright photo": 1.0}
SPREAD = 0.3  # standard deviation of the photos' brightness around that: captions do not say everything
GREY, UNIT = 0.5, 0.25  # latent = (pixel - GREY)/UNIT: 0 is middle grey, -2 black, +2 white
CANVAS = 64  # latent pixels per side: SDXL's own at 512 x 512; the flaw grows with the canvas
FOLD = 8  # 64 x 64 pixels are folded to 8 x 8 sites of 64 channels: nothing is lost and the network is cheap
TEXT_WIDTH = 64
PHOTOS = (
    *(
        "astronaut.png",
        "brick.png",
        "camera.png",
        "chelsea.png",
        "coffee.png",
        "coins.png",
        "grass.png",
        "gravel.png",
    ),
    *(
        "hubble_deep_field.jpg",
        "moon.png",
        "motorcycle_left.png",
        "motorcycle_right.png",
        "retina.jpg",
        "rocket.jpg",
    ),
)


class DemoError(Exception):
    """What the user can put right, in one sentence."""


@dataclass(frozen=True)
class Settings:
    """Sizes of one demo. The defaults take about four minutes on two cores."""

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


# ---------------------------------------------------------------- data


class Photos:
    """Crops that can be exposed to any brightness. Exposure is a shift of the logits: like film, it never
    clips.

    ``logits``: log(p / (1 - p)) of the grey pixel p, [N, CANVAS, CANVAS].
    """

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits, self.shifts = logits, torch.linspace(-8, 8, 65)
        # [N, 65]
        self.means = torch.stack([_expose(logits, shift).mean((1, 2)) for shift in self.shifts.tolist()], 1)

    def latents(self, index: torch.Tensor, brightness: torch.Tensor) -> torch.Tensor:
        """Crops ``index`` ([B]) of mean ``brightness`` ([B], -2 to 2) -> folded latents, as :func:`fold`
        makes them."""
        means = self.means[index]
        after = (means < brightness[:, None]).sum(1).clamp(1, len(self.shifts) - 1)
        low, high = (means.gather(1, column[:, None])[:, 0] for column in (after - 1, after))
        shift = self.shifts[after - 1] + (self.shifts[1] - self.shifts[0]) * (
            (brightness - low) / (high - low)
        ).clamp(0, 1)
        return fold(_expose(self.logits[index], shift[:, None, None])[:, None])

    def draw(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """``count`` captioned photos: folded latents, and the captions' numbers [B]."""
        index = torch.randint(len(self.logits), (count,), generator=generator)
        caption = torch.randint(len(CAPTIONS), (count,), generator=generator)
        brightness = torch.tensor(list(CAPTIONS.values()))[caption] + SPREAD * torch.randn(
            count, generator=generator
        )
        return self.latents(index, brightness.clamp(-1.8, 1.8)), caption


def _expose(logits: torch.Tensor, shift: torch.Tensor | float) -> torch.Tensor:
    return (torch.sigmoid(logits + shift) - GREY) / UNIT


def load_photos(settings: Settings) -> Photos:
    """Random square crops of the photographs inside the scikit-image wheel, shrunk to the canvas, in black
    and white."""
    from PIL import Image

    spec = importlib.util.find_spec("skimage")
    folder = Path(spec.origin).parent / "data" if spec is not None and spec.origin is not None else Path()
    files = [folder / name for name in PHOTOS if (folder / name).is_file()]  # nothing is downloaded
    if not files:
        raise DemoError(
            "this scikit-image has no photographs in its data folder: install it from its "
            "wheel, version 0.22 or newer"
        )
    photos = [Image.open(file).convert("L") for file in files]
    draw = np.random.default_rng(settings.seed)
    crops = []
    for number in range(settings.crops):
        photo = photos[number % len(photos)]
        side = int(draw.integers(min(CANVAS, *photo.size), min(photo.size) + 1))
        left, top = (int(draw.integers(0, length - side + 1)) for length in photo.size)
        crop = np.asarray(
            photo.resize((CANVAS, CANVAS), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
        )
        crops.append(crop[:, ::-1] if draw.random() < 0.5 else crop)
    return Photos(torch.logit(torch.from_numpy(np.stack(crops)).float() / 255, eps=0.02))


def _cosines() -> torch.Tensor:
    """The orthonormal 8 x 8 cosine transform of JPEG as one matrix, [FOLD**2 frequencies, FOLD**2 pixels]."""
    n = np.arange(FOLD)
    one = (
        np.cos(math.pi * (n + 0.5) * n[:, None] / FOLD)
        * np.where(n == 0, 1, math.sqrt(2))[:, None]
        / math.sqrt(FOLD)
    )
    return torch.from_numpy(np.kron(one, one)).float()


def fold(latents: torch.Tensor) -> torch.Tensor:
    """[B, 1, CANVAS, CANVAS] -> [B, FOLD**2, CANVAS/FOLD, CANVAS/FOLD]: each 8 x 8 block becomes one site
    with a channel per frequency.

    A rotation: white noise stays white noise, so noising the folded latents is noising the canvas. Plain
    pixels as channels would repeat the brightness in all 64 of them, and it would drown the rest in the
    network's group norms.
    """
    return torch.einsum("fp,bphw->bfhw", _cosines(), F.pixel_unshuffle(latents, FOLD))


def unfold(folded: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`fold`."""
    return F.pixel_shuffle(torch.einsum("fp,bfhw->bphw", _cosines(), folded), FOLD)


@dataclass(frozen=True)
class Captions:
    """Frozen random stand-ins for SDXL's two text encoders."""

    words: torch.Tensor  # [captions, words, TEXT_WIDTH], for cross attention
    pooled: torch.Tensor  # [captions, TEXT_WIDTH]

    def conditioning(self, caption: torch.Tensor) -> dict[str, Any]:
        """The U-Net's keyword arguments for captions ``caption``, [B]."""
        # original size, crop, target size
        time_ids = torch.tensor([CANVAS, CANVAS, 0, 0, CANVAS, CANVAS]).float().expand(len(caption), 6)
        return {
            "encoder_hidden_states": self.words[caption],
            "added_cond_kwargs": {"text_embeds": self.pooled[caption], "time_ids": time_ids},
        }


def embed_captions(seed: int) -> Captions:
    """One random vector per word; the pooled embedding is the mean over the caption's words."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = ["", *dict.fromkeys(word for caption in CAPTIONS for word in caption.split())]
    vectors = dict(
        zip(vocabulary, torch.randn(len(vocabulary), TEXT_WIDTH, generator=generator), strict=True)
    )
    split = [caption.split() for caption in CAPTIONS]
    longest = max(map(len, split))
    words = [
        torch.stack([vectors[word] for word in [*caption, *[""] * (longest - len(caption))]])
        for caption in split
    ]
    pooled = [torch.stack([vectors[word] for word in caption]).mean(0) for caption in split]
    return Captions(torch.stack(words), torch.stack(pooled))


# ---------------------------------------------------------------- model


def build_unet(settings: Settings) -> Any:
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
    batch: int = Settings.batch,
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


# ---------------------------------------------------------------- the demo

Progress = Callable[[Iterable[Any], str], Iterator[Any]]


def compare(settings: Settings, progress: Progress, which: list[Variant] | None = None) -> list[Result]:
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``sdxl-fixes demo``."""
    parser.add_argument(
        "--seed",
        type=int,
        default=Settings.seed,
        help="initial weights, photos, noise and timesteps (default 0)",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=Settings.steps,
        help=f"training steps on the stock schedule (default {Settings.steps})",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("sdxl-fixes-demo"), metavar="DIR", help="folder for the report"
    )
    parser.add_argument("--json", action="store_true", help="print results.json instead of the table")


def run(args: argparse.Namespace) -> int:
    """Run the demo. Returns the exit status; what the user can put right is one sentence on standard error
    and status 2."""
    try:
        results = make_report(Settings(seed=args.seed, steps=args.steps), args.output)
    except DemoError as error:
        print(f"sdxl-fixes demo: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(results, indent=2))
    else:
        print(f"{table(results)}\n\nReport: {args.output / 'report.html'}")
    return 0


def make_report(settings: Settings, output: Path) -> dict[str, Any]:
    """Train, sample, measure, and write report.html, demo.png and results.json into the folder ``output``.
    Returns results.json."""
    if settings.steps < 1:
        raise DemoError(f"--steps must be at least 1, got {settings.steps}")
    if not 0 <= settings.seed < 2**63 - 1:
        raise DemoError(f"--seed must be 0 or a positive 64-bit number, got {settings.seed}")
    _check_extras()
    _check_output(output)  # before four minutes of work
    from tqdm import tqdm

    start = time.perf_counter()
    results = compare(settings, lambda work, name: iter(tqdm(work, desc=f"{name:<34}")))
    return write_report(settings, results, time.perf_counter() - start, output)


def write_report(settings: Settings, results: list[Result], seconds: float, output: Path) -> dict[str, Any]:
    """Write the three files of finished runs. Returns the content of results.json."""
    from sdxl_fixes.demo import report as demo_report

    numbers = summarize(settings, results, seconds)
    files = {
        "demo.png": demo_report.picture(results),
        "report.html": demo_report.page(numbers, results, table(numbers)).encode(),
        "results.json": json.dumps(numbers, indent=2).encode(),  # the last: whoever sees it sees all three
    }
    try:
        for name, content in files.items():
            with replacing(output / name) as file:
                file.write_bytes(content)
    except OSError as error:
        raise DemoError(
            f"cannot write into {output} ({error.strerror}): choose another folder with --output"
        ) from error
    return numbers


def summarize(settings: Settings, results: list[Result], seconds: float) -> dict[str, Any]:
    """The content of results.json. Everything but "timing" and "versions" is a function of the settings."""
    import diffusers

    runs = []
    for result in results:
        schedule = result.variant.schedule
        measured = zip(CAPTIONS.items(), result.brightness, result.contrast, strict=True)
        captions = [
            {
                "caption": caption,
                "asked": asked,
                "got": float(np.mean(got)),
                "spread": _spread(got),
                "each": got,
                "contrast": contrast,
            }
            for (caption, asked), got, contrast in measured
        ]
        misses = [
            abs(float(np.mean(got)) - asked)
            for asked, got in zip(CAPTIONS.values(), result.brightness, strict=True)
        ]
        runs.append(
            {
                "key": result.variant.key,
                "label": result.variant.label,
                "prediction_type": result.variant.prediction_type,
                "schedule": repr(schedule),
                "terminal_sigma": schedule.terminal_sigma
                if math.isfinite(schedule.terminal_sigma)
                else "inf",
                "residual_signal": schedule.residual_signal,
                "captions": captions,
                "miss": float(np.mean(misses)),
                "final_loss": result.final_loss,
                "losses": result.losses,
            }
        )
    return {
        "settings": {**asdict(settings), "widths": list(settings.widths)},  # as JSON gives it back
        "canvas": CANVAS,
        "parameters": results[0].parameters,
        "runs": runs,
        "timing": {"total_seconds": seconds, **{result.variant.key: result.seconds for result in results}},
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        },
    }


def table(numbers: dict[str, Any]) -> str:
    """The plain-text table of a results.json: brightness got, mean and spread, under each brightness
    asked."""
    settings, empty = numbers["settings"], ""
    lines = [
        f"{empty:<30}" + "".join(f"{caption:>18}" for caption in CAPTIONS),
        f"{'brightness asked':<30}"
        + "".join(f"{asked:>11.2f}{empty:>7}" for asked in CAPTIONS.values())
        + f"{'mean miss':>12}{'final loss':>12}",
    ]
    for row in numbers["runs"]:
        got = "".join(f"{cell['got']:>11.2f} ±{cell['spread']:>5.2f}" for cell in row["captions"])
        lines.append(f"{row['label']:<30}{got}{row['miss']:>12.2f}{row['final_loss']:>12.3f}")
    lines.append(
        "Brightness: 0 is middle grey, 1 a quarter of the way from black to white; ± is the spread "
        "over the generated pictures."
    )
    lines.append(
        f"{settings['samples']} pictures per caption, {settings['steps']} training steps on the stock "
        "schedule, "
        f"{settings['finetuning_steps']} of finetuning, seed {settings['seed']}."
    )
    return "\n".join(lines)


# ---------------------------------------------------------------- helpers


def _spread(values: list[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _check_extras() -> None:
    names = {"matplotlib": "matplotlib", "skimage": "scikit-image"}
    missing = [name for module, name in names.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise DemoError(
            f'the demo needs {" and ".join(missing)}, not installed here: pip install "sdxl-fixes[demo]"'
        )


def _check_output(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        with replacing(output / "results.json.test") as file:
            file.touch()
        (output / "results.json.test").unlink()
    except OSError as error:
        raise DemoError(
            f"cannot write into {output} ({error.strerror}): choose another folder with --output"
        ) from error
