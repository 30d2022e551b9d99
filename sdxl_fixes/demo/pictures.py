"""The demo's pictures as files: enlarged, in strips, and the one for the README."""

from __future__ import annotations

import base64
import io
from typing import Any

import torch

from sdxl_fixes.demo.finetune import PAINTED, Result
from sdxl_fixes.demo.world import PLACES

# what the report and the README's picture show first: object and place
SHOWN = (
    ("apple", "at night"),
    ("cake", "on black"),
    ("pumpkin", "at night"),
    ("butterfly", "on white"),
    ("fox", "in snow"),
)
ENLARGED = 4
INK, MUTED, ACCENT, PAPER = "#1c1f24", "#6b7280", "#0b7a75", "#ffffff"


def caption(thing: str, place: str) -> str:
    """The caption as a person writes it: "an apple at night"."""
    return f"{'an' if thing[0] in 'aeiou' else 'a'} {thing} {place}"


def shown(count: int) -> list[tuple[int, int]]:
    """Place and picture by number, of each of SHOWN that is among ``count`` pictures per place."""
    places = list(PLACES)
    pairs = [(places.index(place), PAINTED.index(thing)) for thing, place in SHOWN]
    return [(place, thing) for place, thing in pairs if thing < count]


def enlarged(picture: torch.Tensor, times: int = ENLARGED) -> Any:
    """[3, H, W] in -1 to 1 -> a PIL image, ``times`` as large, smooth."""
    from PIL import Image

    pixels = ((picture.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    image = Image.fromarray(pixels)
    return image.resize((image.width * times, image.height * times), Image.Resampling.BICUBIC)


def data_uri(image: Any) -> str:
    """The image inside a page."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90, subsampling=0, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def strip(pictures: torch.Tensor, times: int = 2) -> Any:
    """[N, 3, H, W] -> one image of them side by side."""
    return enlarged(torch.cat(list(pictures), 2), times)


def readme_picture(before: Result, fixed: Result) -> bytes:
    """PNG, 1,640 pixels wide, to be shown at half of that: what was asked, what SDXL's schedule gave, what
    the same weights gave after finetuning with the fixes."""
    from PIL import Image, ImageDraw, ImageFont

    pairs = shown(before.pictures.shape[1])
    tile, gap, edge, top, head = 304, 14, 32, 60, 66
    width = 2 * edge + len(pairs) * tile + (len(pairs) - 1) * gap
    rows = (
        (before, MUTED, "SDXL's noise schedule"),
        (fixed, ACCENT, f"the same weights after {len(fixed.losses)} steps with sdxl-fixes"),
    )
    image = Image.new("RGB", (width, top + len(rows) * (head + tile) + edge), PAPER)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(30)
    for column, (place, thing) in enumerate(pairs):
        left = edge + column * (tile + gap)
        text = caption(PAINTED[thing], list(PLACES)[place])
        draw.text((left + tile / 2, 44), text, INK, font, anchor="mm")
        for row, (result, _, _) in enumerate(rows):
            picture = enlarged(result.pictures[place, thing], 5).resize((tile, tile))
            image.paste(picture, (left, top + row * (head + tile) + head))
    for row, (_, colour, text) in enumerate(rows):
        middle = top + row * (head + tile) + head / 2
        draw.text((edge, middle + 4), text, colour, font, anchor="lm")
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
