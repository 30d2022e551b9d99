"""Photographs at any brightness, folded to few sites; frozen random vectors for captions."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from photo_settings import CANVAS, CAPTIONS, FOLD, GREY, SPREAD, TEXT_WIDTH, UNIT, DemoSettings
from torch.nn import functional as F

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


def load_photos(settings: DemoSettings) -> Photos:
    """Random square crops of the photographs inside the scikit-image wheel, shrunk to the canvas, in black
    and white."""
    from PIL import Image

    spec = importlib.util.find_spec("skimage")
    folder = Path(spec.origin).parent / "data" if spec is not None and spec.origin is not None else Path()
    files = [folder / name for name in PHOTOS if (folder / name).is_file()]  # nothing is downloaded
    if not files:
        raise ValueError(
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
