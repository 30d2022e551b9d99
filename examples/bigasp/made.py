"""Made pictures of known quality, with everything that the other scripts read: pictures.parquet,
pairs.parquet, and a vision model and an SDXL pipeline of the real classes, tiny and random. Stands for your
data and models.

    python examples/bigasp/made.py --folder out
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image, ImageDraw, ImageFilter
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    ResNetConfig,
    ResNetModel,
)

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (40, 70, 220),
    "black": (12, 12, 12),
    "white": (244,) * 3,
}
SHAPES = ("circle", "square", "triangle")
SIZES = ((192, 192), (240, 144), (144, 240), (256, 128))


def picture(number: int, seed: int) -> tuple[Image.Image, dict[str, object]]:
    """One picture and its row: shapes on a ground, worse by noise and blur the lower its quality, 0..1."""
    random = np.random.default_rng([seed, number])
    width, height = SIZES[random.integers(len(SIZES))]
    ground, colour = random.choice(list(COLOURS), 2, replace=False)
    shape, quality = str(random.choice(SHAPES)), float(random.random())
    image = Image.new("RGB", (width, height), COLOURS[ground])
    draw, side = ImageDraw.Draw(image), min(width, height) // 3
    for x in range(side // 4, width - side, side + side // 3):
        y = int(random.integers(0, height - side))
        box, fill = (x, y, x + side, y + side), COLOURS[colour]
        if shape == "circle":
            draw.ellipse(box, fill)
        elif shape == "square":
            draw.rectangle(box, fill)
        else:
            draw.polygon([(x, y + side), (x + side, y + side), (x + side // 2, y)], fill)
    marks = []
    if random.random() < 0.2:
        marks.append([0.75, 0.88, 0.99, 0.99])
        draw.text((0.75 * width, 0.88 * height), "(c)", (128, 128, 128))
    image = image.filter(ImageFilter.GaussianBlur(4 * (1 - quality)))
    words = f"{colour} {shape}s on a {ground} ground"
    longer = random.integers(0, 4)  # the last are of more than a chunk
    return image, {
        "caption": f"A picture of {words}" + longer * ", seen from the front side",
        "tags": [f"{colour}_{shape}s", f"{ground}_background", shape, colour, "simple", "no_humans"],
        "source": str(random.choice(["flickr", "unsplash", ""])),
        "watermarks": marks,
        "quality": quality,
    }  # fmt: skip


def pictures(folder: Path, count: int, seed: int = 0) -> pd.DataFrame:
    (folder / "pictures").mkdir(parents=True)
    rows = []
    for number in range(count):
        image, row = picture(number, seed)
        path = folder / "pictures" / f"{number:06d}.png"
        image.save(path)
        rows.append({"path": str(path), **row})
    table = pd.DataFrame(rows)
    table.to_parquet(folder / "pictures.parquet")
    return table


def pairs(table: pd.DataFrame, count: int, seed: int = 0) -> pd.DataFrame:
    """What people would say of pairs: the better wins with odds of e^(12 x the difference in quality)."""
    random = np.random.default_rng([seed, 1])
    both = np.array([random.choice(len(table), 2, replace=False) for _ in range(count)])
    quality = table.quality.to_numpy()
    chance = 1 / (1 + np.exp(-12 * (quality[both[:, 0]] - quality[both[:, 1]])))
    both = np.where((random.random(count) < chance)[:, None], both, both[:, ::-1])
    paths = table.path.to_numpy()
    return pd.DataFrame({"winner": paths[both[:, 0]], "loser": paths[both[:, 1]]})


def vision(folder: Path) -> None:
    """Random filters, rectified and averaged: enough to see sharpness by."""
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=32, hidden_sizes=[32, 64], depths=[1, 1], layer_type="basic")
    ResNetModel(config).save_pretrained(folder)
    side = {"height": 128, "width": 128}
    settings = {"do_resize": True, "size": side, "do_center_crop": False, "do_normalize": True}
    mean = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "image_processor_type": "CLIPImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps({**settings, **mean}))


def tokenizer(folder: Path, pad: str) -> CLIPTokenizer:
    """CLIP's byte alphabet without merges: a token a character."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters = [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    vocabulary = {c: i for i, c in enumerate(characters + [c + "</w>" for c in characters])}
    vocabulary |= {"<|startoftext|>": 512, "<|endoftext|>": 513}
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    return CLIPTokenizer(*files, pad_token=pad, model_max_length=77)


def text_config(width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=514,
        bos_token_id=512,
        eos_token_id=513,
        hidden_size=width,
        projection_dim=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
    )


def unet() -> UNet2DConditionModel:
    """SDXL's structure for text encoders of widths 32 and 48, whose deepest transformers have two blocks."""
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=6 * 8 + 48,
        cross_attention_dim=32 + 48,
        norm_num_groups=8,
    )


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.13025,
    )


def model(folder: Path) -> None:
    """A folder laid out as SDXL's."""
    torch.manual_seed(0)
    StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(text_config(32)),
        text_encoder_2=CLIPTextModelWithProjection(text_config(48)),
        tokenizer=tokenizer(folder / "tokenizer", "<|endoftext|>"),
        tokenizer_2=tokenizer(folder / "tokenizer_2", "!"),
        unet=unet(),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
    ).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--count", type=int, default=600)
    args = parser.parse_args()
    if (args.folder / "pictures").exists():
        raise SystemExit(f"--folder {args.folder} holds pictures of another run: give another, or remove it")
    table = pictures(args.folder, args.count)
    pairs(table, 4 * args.count).to_parquet(args.folder / "pairs.parquet")
    vision(args.folder / "vision")
    model(args.folder / "model")
    print(f"{args.count} pictures, {4 * args.count} judged pairs and tiny models in {args.folder}")


if __name__ == "__main__":
    main()
