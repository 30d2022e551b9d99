"""docs/night.png shows what the closed form says, and the page what the picture shows."""

import itertools
import math
import re

import lab
import night_picture
import numpy as np
import pytest
from PIL import Image

# SDXL's last sigma from its law of beta alone
BETAS = np.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000) ** 2
END = math.sqrt(1 / np.prod(1 - BETAS) - 1)


def share(pixels):
    """Mean that is left, of N(mu, s^2) with s of half a latent on each of (pixels / 8)^2 of them."""
    s = 0.5 * pixels / 8
    return 1 - s / math.hypot(s, END)


@pytest.mark.parametrize("pixels", [256, 1024, 2048])
def test_what_is_kept_is_the_closed_form(pixels):
    assert night_picture.kept(lab.STOCK, pixels) == pytest.approx(share(pixels), rel=1e-9)
    assert night_picture.kept(lab.STOCK.zero_terminal_snr(), pixels) == 1


def test_a_perfect_sampler_returns_it():
    """Ten thousand seeds, sigma falling to 0 in 4,000 steps of the probability flow, the exact denoiser."""
    mean, s = -17.0, 64.0
    sigmas = np.append(np.geomspace(END, 0.01, 4000), 0)
    x = np.random.default_rng(0).normal(0, END * math.sqrt(1 + 1 / END**2), 10000)  # of pure noise
    for now, then in itertools.pairwise(sigmas):
        denoised = mean + s**2 / (s**2 + now**2) * (x - mean)
        x += (then - now) * (x - denoised) / now
    assert x.mean() / mean == pytest.approx(share(1024), abs=0.03)


def test_the_picture_is_the_photograph_with_its_mean_moved():
    pytest.importorskip("skimage")
    page = Image.open(night_picture.PICTURE)
    photo, (width, height) = night_picture.photograph(), night_picture.SIZE
    assert page.size == (1800, night_picture.TOP + height)
    panels = [
        np.asarray(page.crop((left, night_picture.TOP, left + width, night_picture.TOP + height))) / 255.0
        for left in range(0, 1800, width + night_picture.GAP)
    ]
    assert len(panels) == 3 and np.abs(panels[0] - photo).max() < 0.02  # as other versions resample
    assert np.array_equal(panels[2], panels[0])
    dark = 0.5 - (photo @ [0.299, 0.587, 0.114]).mean()
    expected = photo + (1 - share(1024)) * dark
    inside = expected < 0.99
    assert dark > 0.2 and np.abs(panels[1] - expected)[inside].max() < 0.02 and inside.mean() > 0.95


def test_the_page_says_what_is_assumed():
    said = " ".join((lab.DOCS.parent / "zero-terminal-snr.md").read_text(encoding="utf-8").split())
    s = int(re.search(r"middle grey at latent 0, \$s=(\d+)\$", said)[1])
    assert s == night_picture.SPREAD * night_picture.PIXELS / 8
    assert f"1024 x 1024 | 64 | {100 * (1 - share(1024)):.1f} /" in said
