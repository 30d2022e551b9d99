"""The latents' store: MosaicML streaming's MDS shards, of samples that are compressed one by one, so that
any of them is read without its neighbours.

A sample's latent is float16 or bfloat16, its bytes split into two planes (all first ones; all second ones,
which hold signs and exponents) and each packed by zstd. Nothing in a latent repeats, so what there is to gain
is the entropy of the second plane: zstd reaches it if it is kept from finding short matches, which cost more
than the literals that they stand for. ``formats.py`` measures this against others.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import zstandard

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # streaming's use of names that torch and Python have deprecated
    from streaming import LocalDataset, MDSWriter
    from streaming.base.util import merge_index

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
COLUMNS = {
    **dict.fromkeys(("row", "width", "height", "top", "left"), "int"),
    **dict.fromkeys(("channels", "latent_height", "latent_width"), "int"),
    **dict.fromkeys(("dtype", "path"), "str"),
    "latent": "bytes",
}
SHARD = 64 << 20  # bytes


@dataclass(frozen=True)
class Encoded:
    """A picture's latent, [C, h, w], scaled as the U-Net expects. ``row`` is its row in the table, ``width``
    and ``height`` the original's pixels; ``top`` and ``left`` what was cropped from the resized picture,
    pixels: SDXL's size and crop conditioning."""

    row: int
    path: str
    width: int
    height: int
    top: int
    left: int
    latent: torch.Tensor

    def time_ids(self) -> list[int]:
        """SDXL's six: original height and width, crop top and left, target height and width."""
        h, w = self.latent.shape[-2:]
        return [self.height, self.width, self.top, self.left, 8 * h, 8 * w]


def compressor() -> zstandard.ZstdCompressor:
    parameters = zstandard.ZstdCompressionParameters.from_level(
        1, strategy=zstandard.STRATEGY_FAST, min_match=7, hash_log=6, chain_log=6
    )
    return zstandard.ZstdCompressor(compression_params=parameters)


def pack(latent: torch.Tensor) -> bytes:
    """A 16-bit tensor: the length of its first plane's zstd frame (uint32, little-endian) and both frames."""
    planes = latent.contiguous().view(torch.uint8).numpy().reshape(-1, 2).T
    first, second = (compressor().compress(plane.tobytes()) for plane in planes)
    return len(first).to_bytes(4, "little") + first + second


def unpack(packed: bytes, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """What :func:`pack` was given, to the last bit."""
    split, zstd = 4 + int.from_bytes(packed[:4], "little"), zstandard.ZstdDecompressor()
    pairs = np.empty((math.prod(shape), 2), np.uint8)
    for k, frame in enumerate((packed[4:split], packed[split:])):
        pairs[:, k] = np.frombuffer(zstd.decompress(frame), np.uint8)
    return torch.from_numpy(pairs.reshape(-1)).view(dtype).reshape(shape)


def write(folder: Path, samples: Iterable[Encoded], dtype: str = "fp16") -> int:
    """Write ``samples`` (of :class:`Encoded`) as shards with an index to an empty ``folder``; how many.
    Raises ValueError for a latent that ``dtype`` cannot hold: what is not finite would be found late."""
    count = 0
    with MDSWriter(out=str(folder), columns=COLUMNS, size_limit=SHARD) as out:
        for sample in samples:
            latent = sample.latent.to("cpu", DTYPES[dtype])
            if not torch.isfinite(latent).all():
                raise ValueError(
                    f"{sample.path}: its latent is not finite in {dtype}: see the VAE's precision"
                )
            row = {name: getattr(sample, name) for name in ("row", "path", "width", "height", "top", "left")}
            shape = dict(zip(("channels", "latent_height", "latent_width"), latent.shape, strict=True))
            out.write({**row, **shape, "dtype": dtype, "latent": pack(latent)})
            count += 1
    return count


def join(folder: Path, parts: list[Path]) -> None:
    """One index over the part folders in ``folder``, by streaming's own means; in place when it is whole."""
    partial = folder / f"index.{os.getpid()}.part"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    logging.disable(logging.WARNING)  # that there is a temporary folder
    try:
        merge_index([str(part / "index.json") for part in parts], str(partial))
    finally:
        logging.disable(logging.NOTSET)
    os.replace(partial / "index.json", folder / "index.json")
    partial.rmdir()


def index(folder: Path) -> Path:
    """The file that says what a store is made of. Raises SystemExit where there is none."""
    if not (found := folder / "index.json").is_file():
        raise SystemExit(f"{folder} is no finished store (no index.json): run encode.py until it says done")
    return found


class Latents:
    """A store, for reading at random: a data set of :class:`Encoded`, in the order of the shards."""

    def __init__(self, folder: Path) -> None:
        index(folder)
        self._shards = LocalDataset(str(folder))

    def __len__(self) -> int:
        return int(self._shards.size)

    def __getitem__(self, place: int) -> Encoded:
        found = self._shards[place]
        shape = tuple(found.pop(name) for name in ("channels", "latent_height", "latent_width"))
        dtype = DTYPES[found.pop("dtype")]
        return Encoded(**{**found, "latent": unpack(found["latent"], shape, dtype)})

    def facts(self, place: int) -> tuple[int, str, tuple[int, int]]:
        """Row, path and (height, width) of a latent, without unpacking it."""
        found = self._shards[place]
        return found["row"], found["path"], (found["latent_height"], found["latent_width"])
