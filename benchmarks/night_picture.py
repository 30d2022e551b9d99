"""What SDXL's schedule can give back of a night, in closed form on a photograph: no network, no training.

python benchmarks/night_picture.py     a second; writes docs/night.png

Assumed, and nothing else: pixels follow latents as a straight line, with middle grey at latent 0; a prompt
leaves open a mean level with a spread of 0.5 in latents, Gaussian and by itself, around the photograph's own;
network and sampler are perfect and start from pure noise. Then the mean level that is returned, in the mean
over seeds, is what gaussian.ideal says. All but the mean brightness is left as it is: colours and large
shapes would lose of theirs too.
"""

from __future__ import annotations

from typing import Any

import gaussian
import lab
import numpy as np
import style

from sdxl_fixes import NoiseSchedule
from sdxl_fixes.atomic import replacing

PICTURE = lab.DOCS.parent / "night.png"
PIXELS, SPREAD, GREY = 1024, 0.5, 0.5
PANELS = {"asked": None, "SDXL's schedule": lab.STOCK, "zero terminal SNR": lab.STOCK.zero_terminal_snr()}
SIZE, GAP, TOP = (584, 390), 24, 92  # dots
LUMA = np.array([0.299, 0.587, 0.114])  # of ITU-R BT.601


def photograph() -> Any:
    """The rocket at night inside the scikit-image wheel (by SpaceX, public domain), only resized:
    [390, 584, 3] from 0 to 1."""
    from PIL import Image
    from skimage import data

    image = Image.fromarray(data.rocket()).resize(SIZE, Image.Resampling.LANCZOS)
    return np.asarray(image, dtype=np.float64) / 255


def kept(schedule: NoiseSchedule | None, pixels: int = PIXELS) -> float:
    """The share of the mean level that is returned on a canvas of ``pixels`` x ``pixels``."""
    if schedule is None:
        return 1.0
    mean, _ = gaussian.ideal(schedule, scales=(SPREAD * pixels / 8,))
    return float(mean) / gaussian.MEAN_OVER_SCALE


def brightness(photo: Any) -> float:
    """Mean luma, 0 to 1."""
    return float((photo @ LUMA).mean())


def returned(photo: Any, share: float) -> Any:
    """The photograph with ``share`` of its distance to middle grey left; what leaves the range is clipped."""
    return (photo + (1 - share) * (GREY - brightness(photo))).clip(0, 1)


def draw() -> Any:
    """The panels side by side, a PIL image."""
    from matplotlib.font_manager import FontProperties, findfont
    from PIL import Image, ImageDraw, ImageFont

    photo = photograph()
    page = Image.new("RGB", (3 * SIZE[0] + 2 * GAP, TOP + SIZE[1]), style.PAPER)
    pen = ImageDraw.Draw(page)
    fonts = [
        ImageFont.truetype(findfont(FontProperties(family="DejaVu Sans", weight=weight)), size)
        for weight, size in (("bold", 28), ("normal", 24))
    ]
    for number, (name, schedule) in enumerate(PANELS.items()):
        share, left = kept(schedule), number * (SIZE[0] + GAP)
        shown = returned(photo, share)
        page.paste(Image.fromarray((255 * shown).round().astype(np.uint8)), (left, TOP))
        lost = "a night" if schedule is None else f"{100 * (1 - share):.3g} % of the dark lost"
        colour = style.ACCENT if number == 2 else style.INK
        pen.text((left, 4), name, font=fonts[0], fill=colour)
        pen.text((left, 44), f"{lost}, brightness {brightness(shown):.2f}", font=fonts[1], fill=style.SOFT)
    return page


def main() -> None:
    with replacing(PICTURE) as file:
        draw().save(file, "PNG", optimize=True)


if __name__ == "__main__":
    main()
