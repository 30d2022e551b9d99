"""Make tiny-sdxl, the checkpoint of `sdxl-fixes demo`, and the world that it is trained on.

python benchmarks/tiny_sdxl.py data PACKAGE     npm's @lobehub/fluent-emoji-3d 1.1.0, unpacked
python benchmarks/tiny_sdxl.py train STATE      hours on one core; goes on from STATE; writes the checkpoint

The U-Net is of SDXL's class and structure and is trained as SDXL was: epsilon, on the stock schedule. First
with a loss weight of 1 / sqrt(SNR), since a short training learns composition late, and with objects that
vary much; then with SDXL's plain loss, the learning rate falling to 0.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sdxl_fixes import NoiseSchedule, Objective
from sdxl_fixes.atomic import replacing
from sdxl_fixes.demo.finetune import EMPTY, average
from sdxl_fixes.demo.world import (
    CANVAS,
    CHANNELS,
    DATA,
    FOLD,
    TEXTURES,
    VOCABULARY,
    Variation,
    World,
    load_world,
)
from sdxl_fixes.weighting import Debiased

# Unicode of each of OBJECTS, as the package names its files
CODES = (
    *("1f34e", "1f34c", "1f353", "1f34d", "1f352", "1f355", "1f370", "1f436"),
    *("1f431", "1f98a", "1f43c", "1f981", "1f438", "1f427", "1f989", "1f419"),
    *("1f98b", "1f33b", "1f337", "1f344", "1f335", "1f697", "1f680", "1f3e0"),
    *("1f3f0", "2764", "26c4", "1f383", "1f916", "1f4a1", "1f451", "1f3b8"),
)
TINTS = {"grass": (0.45, 0.75, 0.25), "gravel": (0.75, 0.7, 0.65), "brick": (0.85, 0.45, 0.35)}
TEXTURE_SIDE, TEXT_WIDTH = 160, 64
MUCH = Variation(smallest=0.68, more=0.24, moved=None, mirrored=True, shade=0.06)
LITTLE = Variation(shade=0.06)
WIDTHS = (112, 192)  # channels at 8 x 8 and 4 x 4; the first at least twice CHANNELS


# ---------------------------------------------------------------- data


def make_world(package: Path) -> dict[str, torch.Tensor]:
    """The content of world.safetensors, of the unpacked npm package and scikit-image's photographs."""
    words = torch.randn(len(VOCABULARY), TEXT_WIDTH, generator=torch.Generator().manual_seed(5))
    words[0] = 0
    return {
        "objects": torch.stack([drawing(package, code) for code in CODES]),
        "textures": torch.stack([texture(name) for name in TEXTURES]),
        "words": words,
    }


def drawing(package: Path, code: str) -> torch.Tensor:
    """[4, CANVAS, CANVAS], uint8: red, green, blue, alpha."""
    import numpy as np
    from PIL import Image

    files = [package / "assets" / f"{code}{selector}.webp" for selector in ("", "-fe0f")]
    found = next((file for file in files if file.exists()), None)
    if found is None:
        raise SystemExit(f"{files[0]} is missing: expected @lobehub/fluent-emoji-3d 1.1.0, unpacked")
    small = Image.open(found).convert("RGBA").resize((CANVAS, CANVAS), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1).contiguous()


def texture(name: str) -> torch.Tensor:
    """[3, TEXTURE_SIDE, TEXTURE_SIDE], uint8: a grey photograph, lighter and tinted."""
    import numpy as np
    import skimage
    from PIL import Image

    side = (TEXTURE_SIDE, TEXTURE_SIDE)
    grey = Image.open(Path(skimage.__file__).parent / "data" / f"{name}.png").convert("L")
    levels = torch.from_numpy(np.array(grey.resize(side, Image.Resampling.LANCZOS))).double() / 255
    tinted = 1.3 * levels * torch.tensor(TINTS[name])[:, None, None]
    return (tinted.clamp(0, 1) * 255).round().to(torch.uint8)


# ---------------------------------------------------------------- training


def build_unet(
    channels: int = CHANNELS, widths: Sequence[int] = WIDTHS, text_width: int = TEXT_WIDTH, seed: int = 0
) -> Any:
    """SDXL's U-Net class in SDXL's structure (no attention at the finest level, text_time embedding), a
    thousandth of its size, whose output begins as its input: ``widths[0]`` is at least twice ``channels``."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    deeper, time_width = len(widths) - 1, 8
    unet = UNet2DConditionModel(
        sample_size=CANVAS // FOLD,
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * deeper),
        up_block_types=(*("CrossAttnUpBlock2D",) * deeper, "UpBlock2D"),
        block_out_channels=tuple(widths),
        layers_per_block=1,
        norm_num_groups=16,
        cross_attention_dim=text_width,
        transformer_layers_per_block=1,
        attention_head_dim=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=time_width,
        projection_class_embeddings_input_dim=6 * time_width + text_width,
    )
    _start_as_identity(unet)
    return unet


@torch.no_grad()
def _start_as_identity(unet: Any) -> None:
    """Let all else add to the input: a short training should not go into learning to copy the noise. The
    outer layers hold each value x as the pair (x, -x), because SiLU(x) - SiLU(-x) = x."""
    for name, module in unet.named_modules():
        if name.endswith((".conv2", ".proj_out")) or name in ("conv_in", "conv_out"):
            module.weight.zero_()
            module.bias.zero_()
    channels = unet.config.in_channels
    identity = torch.eye(channels)
    pair = torch.cat([identity, -identity])
    unet.conv_in.weight[: 2 * channels, :, 1, 1] = pair
    if len(rest := unet.conv_in.weight[2 * channels :]):
        torch.nn.init.normal_(rest, std=0.05)
    unet.conv_out.weight[:, : 2 * channels, 1, 1] = pair.T / 2
    # its input: what comes from below, then what conv_in made
    shortcut = unet.up_blocks[-1].resnets[-1].conv_shortcut
    width = shortcut.out_channels
    shortcut.weight[:, -width:, 0, 0] = torch.eye(width)
    shortcut.weight[:, :-width] *= 0.1
    shortcut.bias.zero_()


class Training:
    """A training that can be saved and gone on with; ``args`` are the command's."""

    def __init__(self, args: argparse.Namespace, world: World) -> None:
        self.args, self.world, self.done = args, world, 0
        self.unet = build_unet()
        self.averaged = copy.deepcopy(self.unet).eval()
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), lr=args.learning_rate, fused=True)
        self.generator = torch.Generator().manual_seed(args.seed)
        stock = NoiseSchedule.sdxl()
        self.objectives = Objective(stock, weighting=Debiased()), Objective(stock)

    def step(self) -> float:
        """One step; returns its loss."""
        args, first = self.args, self.done < self.args.steps
        variation = MUCH if self.done < args.varied_steps else LITTLE
        latents, objects, places = self.world.draw(args.batch, self.generator, variation)
        objective = self.objectives[0 if first else 1]
        drawn = objective.draw(latents, generator=self.generator)
        empty = torch.rand(args.batch, generator=self.generator) < EMPTY
        conditioning = self.world.conditioning(objects, places, empty)
        with torch.autocast("cpu", torch.bfloat16):
            output = self.unet(drawn.noisy, drawn.timesteps, **conditioning).sample
        loss = objective.loss(output.float(), drawn)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += 1
        average(self.averaged, self.unet, min(0.999, 1 - 1 / (self.done + 1)))
        return float(loss.detach())

    def rate(self) -> float:
        """The learning rate of the next step: up in 200 steps, level, and down to 0 over the last
        ``falling_steps``."""
        args = self.args
        left = args.steps + args.plain_steps - self.done
        return float(args.learning_rate * min(1, (self.done + 1) / 200, left / args.falling_steps))

    def save(self) -> None:
        state = {
            "unet": self.unet.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "done": self.done,
        }
        with replacing(self.args.state) as file:
            torch.save(state, file)

    def load(self) -> None:
        state = torch.load(self.args.state, weights_only=True)
        self.unet.load_state_dict(state["unet"])
        self.averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.done = state["done"]


def train(args: argparse.Namespace) -> None:
    """Go on until all steps are done, then write the averaged weights in half precision."""
    torch.set_num_threads(1)
    training = Training(args, load_world())
    if args.state.exists():
        training.load()
    saved, losses = time.monotonic(), []
    while training.done < args.steps + args.plain_steps:
        losses.append(training.step())
        if training.done % 500 == 0:
            print(training.done, f"{math.fsum(losses[-500:]) / len(losses[-500:]):.5f}", flush=True)
        if time.monotonic() - saved > args.save_seconds:
            training.save()
            saved = time.monotonic()
    training.save()
    write(training.averaged, args.output)


def write(unet: Any, output: Path) -> None:
    """The folders unet and scheduler, as SDXL's own pipeline folder has them."""
    from diffusers import EulerDiscreteScheduler

    copy.deepcopy(unet).half().save_pretrained(output / "unet")
    EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
    ).save_pretrained(output / "scheduler")


def main(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    data = commands.add_parser("data")
    data.add_argument("package", type=Path)
    data.add_argument("--output", type=Path, default=DATA / "world.safetensors")
    training = commands.add_parser("train")
    training.add_argument("state", type=Path)
    training.add_argument("--output", type=Path, default=DATA / "tiny-sdxl")
    for name, value in (
        *(("steps", 13035), ("varied_steps", 4430), ("plain_steps", 11000), ("falling_steps", 11000)),
        *(("batch", 16), ("seed", 1), ("save_seconds", 180)),
    ):
        training.add_argument(f"--{name}", type=int, default=value)
    training.add_argument("--learning_rate", type=float, default=1e-3)
    args = parser.parse_args(words)
    if args.command == "train":
        train(args)
        return
    from safetensors.torch import save_file

    with replacing(args.output) as file:
        save_file(make_world(args.package), file)


if __name__ == "__main__":
    main(sys.argv[1:])
