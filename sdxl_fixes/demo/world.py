"""The world of tiny-sdxl: thirty-two things in fourteen places, their captions, and their latents.

A picture is 64 x 64 pixels in RGB, an object before a background; its caption names both ("an apple at
night"). Latents are the pixels in opponent colours, folded by JPEG's cosine transform to 8 x 8 sites of 48
channels: an orthonormal rotation that leaves out high frequencies, so white noise stays white noise, and a
mean that a schedule leaks is the brightness of the picture. No VAE and no text encoder: each word is a
frozen random vector.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

DATA = Path(__file__).parent / "data"
OBJECTS = (
    *("apple", "banana", "strawberry", "pineapple", "cherries", "pizza", "cake", "dog"),
    *("cat", "fox", "panda", "lion", "frog", "penguin", "owl", "octopus"),
    *("butterfly", "sunflower", "tulip", "mushroom", "cactus", "car", "rocket", "house"),
    *("castle", "heart", "snowman", "pumpkin", "robot", "lamp", "crown", "guitar"),
)
# what a caption says of the background, and its colour (-1 to 1) or the photograph that it is cut from
PLACES: dict[str, tuple[float, float, float] | str] = {
    "at night": (-1, -1, -1),
    "on black": (-1, -1, -1),
    "on dark grey": (-0.5, -0.5, -0.5),
    "on grey": (0, 0, 0),
    "on light grey": (0.5, 0.5, 0.5),
    "on white": (1, 1, 1),
    "in snow": (1, 1, 1),
    "on red": (0.7, -0.7, -0.7),
    "on green": (-0.5, 0.4, -0.5),
    "on blue": (-0.6, -0.3, 0.7),
    "on yellow": (0.9, 0.7, -0.5),
    "on grass": "grass",
    "on gravel": "gravel",
    "on bricks": "brick",
}
TEXTURES = ("grass", "gravel", "brick")
CANVAS, FOLD, UNIT = 64, 8, 0.6  # pixels per side, pixels per site, and what one latent unit is in -1 to 1


@dataclass(frozen=True)
class Variation:
    """How pictures of one caption vary: the object's size, ``smallest`` to ``smallest + more`` of the canvas;
    how far it is ``moved`` at most, in half canvases (None: as far as it fits); whether half of them are
    ``mirrored``; and the standard deviation of the background's brightness, its ``shade``. Captions do not
    say everything: the less they say, the more a network gains by reading its input."""

    smallest: float = 0.82
    more: float = 0.1
    moved: float | None = 0.06
    mirrored: bool = False
    shade: float = 0.25

    def theta(self, vary: torch.Tensor) -> torch.Tensor:
        """[B, 4] uniform random numbers -> affine_grid's matrices, [B, 2, 3]."""
        scale = self.smallest + self.more * vary[:, 0]
        limit = 1 - scale if self.moved is None else torch.full_like(scale, self.moved)
        side = torch.where(vary[:, 3] < 0.5, -1.0, 1.0) if self.mirrored else torch.ones_like(scale)
        theta = torch.zeros(len(vary), 2, 3)
        theta[:, 0, 0], theta[:, 1, 1] = side / scale, 1 / scale
        theta[:, :, 2] = -limit[:, None] * (2 * vary[:, 1:3] - 1) / scale[:, None]
        theta[:, 0, 2] *= side
        return theta


LITTLE = Variation()


@dataclass(frozen=True)
class World:
    """The pictures and the words' vectors, as :func:`load_world` reads them."""

    objects: torch.Tensor  # [32, 4, CANVAS, CANVAS]: RGB in -1 to 1 times alpha, and alpha
    textures: torch.Tensor  # [3, 3, side, side], -1 to 1
    words: torch.Tensor  # [words, TEXT_WIDTH]; the first is the empty word, 0

    def pictures(
        self,
        objects: torch.Tensor,
        places: torch.Tensor,
        generator: torch.Generator,
        variation: Variation = LITTLE,
    ) -> torch.Tensor:
        """Objects and places by number, [B] each -> RGB in -1 to 1, [B, 3, CANVAS, CANVAS]. Size, position
        and the background's brightness vary."""
        count = len(objects)
        vary = torch.rand(count, 4, generator=generator)
        grid = F.affine_grid(variation.theta(vary), [count, 4, CANVAS, CANVAS], align_corners=False)
        front = F.grid_sample(self.objects[objects], grid, align_corners=False)
        back = torch.empty(count, 3, CANVAS, CANVAS)
        shade = variation.shade * torch.randn(count, generator=generator)
        for row, place in enumerate(places.tolist()):
            back[row] = self._background(list(PLACES.values())[place], generator) + shade[row]
        return (1 - front[:, 3:]) * back.clamp(-1, 1) + front[:, :3]

    def _background(
        self, colour: tuple[float, float, float] | str, generator: torch.Generator
    ) -> torch.Tensor:
        if not isinstance(colour, str):
            return torch.tensor(colour)[:, None, None].float()
        texture = self.textures[TEXTURES.index(colour)]
        y, x = torch.randint(0, texture.shape[-1] - CANVAS + 1, (2,), generator=generator).tolist()
        return texture[:, y : y + CANVAS, x : x + CANVAS]

    def draw(
        self, count: int, generator: torch.Generator, variation: Variation = LITTLE
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``count`` captioned pictures: latents [B, CHANNELS, 8, 8], objects [B], places [B]."""
        objects = torch.randint(len(OBJECTS), (count,), generator=generator)
        places = torch.randint(len(PLACES), (count,), generator=generator)
        return fold(self.pictures(objects, places, generator, variation)), objects, places

    def conditioning(
        self, objects: torch.Tensor, places: torch.Tensor, empty: torch.Tensor | None = None
    ) -> dict[str, Any]:
        """The U-Net's keyword arguments for captions; where ``empty`` ([B], bool) the empty prompt."""
        ids = _word_table()[objects, places]
        if empty is not None:
            ids = torch.where(empty[:, None], 0, ids)
        vectors = self.words[ids]
        pooled = vectors.sum(1) / (ids > 0).sum(1, keepdim=True).clamp(min=1).sqrt()
        time_ids = torch.tensor([CANVAS, CANVAS, 0, 0, CANVAS, CANVAS]).float().expand(len(ids), 6)
        return {
            "encoder_hidden_states": vectors,
            "added_cond_kwargs": {"text_embeds": pooled, "time_ids": time_ids},
        }


VOCABULARY = ("", *dict.fromkeys(word for text in (*OBJECTS, *PLACES) for word in text.split()))


@functools.cache
def _word_table() -> torch.Tensor:
    """[objects, places, 4] word numbers."""
    numbers = {word: number for number, word in enumerate(VOCABULARY)}
    rows = [[[numbers[word] for word in (thing, *place.split())] for place in PLACES] for thing in OBJECTS]
    return torch.tensor([[ids + [0] * (4 - len(ids)) for ids in row] for row in rows])


@functools.cache
def load_world() -> World:
    """Read the pictures and vectors that lie beside this file (their licences, too)."""
    from safetensors.torch import load_file

    data = load_file(DATA / "world.safetensors")
    image = data["objects"].float() / 255
    front = torch.cat([(2 * image[:, :3] - 1) * image[:, 3:], image[:, 3:]], 1)
    return World(front, data["textures"].float() / 127.5 - 1, data["words"].float())


def load_tiny_sdxl() -> Any:
    """tiny-sdxl's U-Net, in float32: SDXL's class, trained as SDXL was, on the stock schedule, to predict
    epsilon (benchmarks/tiny_sdxl.py)."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(DATA / "tiny-sdxl", subfolder="unet").float().eval()


# ---------------------------------------------------------------- pixels to latents and back


def _cosines() -> torch.Tensor:
    """JPEG's orthonormal 8 x 8 cosine transform as one matrix, [FOLD**2 frequencies, FOLD**2 pixels]."""
    n = np.arange(FOLD)
    one = np.cos(math.pi * (n + 0.5) * n[:, None] / FOLD) * np.where(n == 0, 1, math.sqrt(2))[:, None]
    one /= math.sqrt(FOLD)
    return torch.from_numpy(np.kron(one, one)).float()


def _kept() -> torch.Tensor:
    """The channels: frequencies u + v of at most 6 of the brightness, of at most 3 of the two colours."""
    frequency = np.add.outer(np.arange(FOLD), np.arange(FOLD)).ravel()
    return torch.from_numpy(
        np.concatenate(
            [plane * FOLD**2 + np.flatnonzero(frequency <= top) for plane, top in enumerate((6, 3, 3))]
        )
    )


# brightness, red against blue, green against both; orthonormal
OPPONENT = torch.tensor([[3**-0.5] * 3, [2**-0.5, 0, -(2**-0.5)], [-(6**-0.5), 2 * 6**-0.5, -(6**-0.5)]])
COSINES, KEPT = _cosines(), _kept()
CHANNELS = len(KEPT)


def fold(pictures: torch.Tensor) -> torch.Tensor:
    """RGB in -1 to 1, [B, 3, H, W] -> latents [B, CHANNELS, H/8, W/8]."""
    colours = torch.einsum("ij,bjhw->bihw", OPPONENT, pictures / UNIT)
    count, _, height, width = colours.shape
    sites = F.pixel_unshuffle(colours, FOLD).reshape(count, 3, FOLD**2, height // FOLD, width // FOLD)
    return torch.einsum("fp,bcphw->bcfhw", COSINES, sites).flatten(1, 2)[:, KEPT]


def unfold(latents: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`fold`, without the frequencies that it leaves out."""
    count, _, height, width = latents.shape
    full = latents.new_zeros(count, 3 * FOLD**2, height, width)
    full[:, KEPT] = latents
    sites = torch.einsum("fp,bcfhw->bcphw", COSINES, full.reshape(count, 3, FOLD**2, height, width))
    colours = F.pixel_shuffle(sites.flatten(1, 2), FOLD)
    return torch.einsum("ij,bihw->bjhw", OPPONENT, colours) * UNIT
