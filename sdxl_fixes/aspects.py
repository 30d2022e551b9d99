"""Aspect-ratio buckets: which resolutions there are, and which of them an image belongs to. The rules are
kohya's and NovelAI's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

RULES = ("kohya", "novelai")
SDXL_AREA = 1024 * 1024  # pixels
# SDXL's U-Net halves the latents (8 pixels each) twice, so a side must divide by 32; 64 is the list it was
# trained on
SDXL_STEP = 64


@dataclass(frozen=True)
class Assigned:
    """Images in buckets.

    resolutions  (width, height) of every bucket, pixels, int64, shape [K, 2]
    index        bucket of every image, int64, shape [N]; -1 for an image that fits none
    error        bucket's aspect ratio minus the image's (width / height), shape [N]; nan where it fits none
    """

    resolutions: NDArray[np.int64]
    index: NDArray[np.int64]
    error: NDArray[np.float64]


def resolutions(
    rule: str = "kohya",
    area: int = SDXL_AREA,
    step: int = SDXL_STEP,
    min_side: int = 512,
    max_side: int = 2048,
    base: tuple[int, int] | None = None,
) -> list[tuple[int, int]]:
    """Sorted (width, height) of all buckets: for every width the largest height that keeps to ``area``, the
    same transposed, and ``base`` (None: the largest square). The rules differ in where heights count from:
    kohya's are multiples of the step, cut at ``max_side``, NovelAI's count up from ``min_side``. Raises
    ValueError for limits that leave no bucket and for a step below a latent pixel.
    """
    if rule not in RULES:
        raise ValueError(f"bucket rule must be one of {', '.join(RULES)}, got {rule!r}")
    if step < 8 or step % 8:
        raise ValueError(f"bucket step must be a multiple of 8, a latent pixel, got {step}")
    if not 0 < min_side <= max_side or area < min_side * min_side:
        raise ValueError(
            "need 0 < min_side <= max_side and an area of at least min_side^2, got "
            f"{min_side}, {max_side}, {area}"
        )
    square = int(math.sqrt(area) // step) * step
    found = {base or (square, square)}
    for width in range(min_side, max_side + 1, step):
        most = area // width
        height = (
            min(max_side, most // step * step)
            if rule == "kohya"
            else min_side + (min(max_side, most) - min_side) // step * step
        )
        if height >= min_side:
            found |= {(width, height), (height, width)}
    return sorted(found)


def assign(sizes: ArrayLike, buckets: ArrayLike, max_error: float | None = None) -> Assigned:
    """Put images of ``sizes`` (width, height; shape [N, 2]) into ``buckets`` (shape [K, 2]): the one of the
    same resolution, else the one whose width / height is nearest. ``max_error``: images that miss every
    bucket by this much or more get none (NovelAI: 4)."""
    shapes, table = _sizes("sizes", sizes), _sizes("buckets", buckets)
    if not len(table):
        raise ValueError("there are no buckets to put images into")
    aspects, ratios = shapes[:, 0] / shapes[:, 1], table[:, 0] / table[:, 1]
    index = np.empty(len(shapes), np.int64)
    for first in range(0, len(shapes), 1 << 16):
        part = slice(first, first + (1 << 16))
        index[part] = np.abs(ratios - aspects[part, None]).argmin(axis=1)
    for k, (width, height) in enumerate(table.tolist()):
        index[(shapes[:, 0] == width) & (shapes[:, 1] == height)] = k
    error = ratios[index] - aspects
    if max_error is not None:
        missed = np.abs(error) >= max_error
        index[missed], error[missed] = -1, np.nan
    return Assigned(table, index, error)


def assign_without_upscaling(sizes: ArrayLike, area: int = SDXL_AREA, step: int = SDXL_STEP) -> Assigned:
    """Kohya's ``bucket_no_upscale``: images above ``area`` are shrunk to it, no image is enlarged, and the
    bucket is what remains when the sides are cut down to multiples of ``step``. An image below the step in
    either side fits none."""
    shapes = _sizes("sizes", sizes).astype(np.float64)
    width, height = shapes[:, 0], shapes[:, 1]
    aspect = width / height
    shrunk = np.sqrt(area * aspect)
    by_width, by_height = _round(shrunk, step), _round(area / shrunk, step)
    with np.errstate(divide="ignore", invalid="ignore"):
        width_error = np.abs(by_width / _round(by_width / aspect, step) - aspect)
        height_error = np.abs(_round(by_height * aspect, step) / by_height - aspect)
    take_width = width_error < height_error
    new_width = np.where(take_width, by_width, np.floor(by_height * aspect + 0.5))
    new_height = np.where(take_width, np.floor(by_width / aspect + 0.5), by_height)
    large = width * height > area
    resized = np.stack([np.where(large, new_width, width), np.where(large, new_height, height)], axis=1)
    cut = (resized - resized % step).astype(np.int64)
    fits = (cut > 0).all(axis=1)
    table, inverse = np.unique(cut[fits], axis=0, return_inverse=True)
    index, error = np.full(len(cut), -1, np.int64), np.full(len(cut), np.nan)
    index[fits] = inverse.reshape(-1)
    error[fits] = cut[fits, 0] / cut[fits, 1] - aspect[fits]
    return Assigned(table, index, error)


def _round(x: NDArray[np.float64], step: int) -> NDArray[np.float64]:
    """To the nearest whole pixel, then down to a multiple of ``step``."""
    whole = np.floor(x + 0.5)
    return np.asarray(whole - whole % step)


def _sizes(name: str, values: ArrayLike) -> NDArray[Any]:
    array = np.asarray(values, dtype=np.int64).reshape(-1, 2) if np.size(values) == 0 else np.asarray(values)
    if array.ndim != 2 or array.shape[1] != 2 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"{name} must be whole numbers (width, height), shape [N, 2]; got {array.dtype} of "
            f"shape {list(array.shape)}"
        )
    if (array < 1).any():
        worst = int((array < 1).any(axis=1).argmax())
        raise ValueError(
            f"{name} must be at least 1 x 1, got {array[worst, 0]} x {array[worst, 1]} for number {worst}"
        )
    return array.astype(np.int64)
