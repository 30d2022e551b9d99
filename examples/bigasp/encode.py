"""Pictures to a store of latents, that may be killed at any moment and started again.

    python examples/bigasp/encode.py --table scored.parquet --model stabilityai/stable-diffusion-xl-base-1.0
        --output latents
    torchrun --nproc_per_node 8 examples/bigasp/encode.py ...        one process per GPU
    torchrun --nnodes 4 ...                                          and machine, on one file system

The table is cut into parts of ``--part`` pictures. A part is a folder of MDS shards, written under another
name and renamed when it is whole, so a part is there as a whole or not at all: what is killed is the part
under way, and starting again makes the parts that are missing, each by the process whose turn it is. Whoever
finds the last part whole writes the index over all. Crops and the posterior are drawn by (seed, row): a part
that is made twice is the same twice.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import latents
import numpy as np
import pandas as pd
import torch
from diffusers import AutoencoderKL
from PIL import Image

from sdxl_fixes import aspects
from sdxl_fixes.atomic import flush, flush_names
from sdxl_fixes.log import rank, world_size


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--table", type=Path, required=True, help="parquet with path, and score where it is ranked"
    )
    parser.add_argument("--model", required=True, help="a pipeline's folder or name: its VAE is used")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--part", type=int, default=4096, help="pictures: what a kill costs at most")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--readers", type=int, default=8, help="threads that read and crop pictures")
    parser.add_argument("--dtype", choices=latents.DTYPES, default="fp16", help="of the stored latents")
    parser.add_argument("--area", type=int, default=aspects.SDXL_AREA, help="pixels of a bucket, at most")
    parser.add_argument("--bucket_step", type=int, default=aspects.SDXL_STEP)
    parser.add_argument("--min_side", type=int, default=512)
    parser.add_argument("--max_side", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name, least in {"part": 1, "batch_size": 1, "readers": 1, "seed": 0}.items():
        if getattr(args, name) < least:
            raise SystemExit(f"--{name} {getattr(args, name)}: expected {least} or more")
    if not args.table.exists():
        raise SystemExit(f"--table {args.table}: there is no such file")
    return args


def cropped(
    path: str, row: int, seed: int, buckets: np.ndarray
) -> tuple[Image.Image, tuple[int, int], int, int]:
    """The picture, scaled to cover its bucket and cropped at random; the original's size; what was cut off
    at the left and the top of the scaled picture."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    size, random = image.size, np.random.default_rng([seed, row])
    width, height = buckets[aspects.assign([size], buckets).index[0]].tolist()
    scale = max(width / size[0], height / size[1])
    image = image.resize(
        (max(width, round(size[0] * scale)), max(height, round(size[1] * scale))), Image.Resampling.LANCZOS
    )
    left, top = (int(random.integers(0, a - b + 1)) for a, b in zip(image.size, (width, height), strict=True))
    return image.crop((left, top, left + width, top + height)), size, left, top


class Part:
    """The pictures of one part, encoded; ``broken`` are those that could not be read, and why."""

    def __init__(
        self, rows: list[int], paths: list[str], args: argparse.Namespace, buckets: np.ndarray
    ) -> None:
        self.rows, self.paths, self.args, self.buckets = rows, paths, args, buckets
        self.broken: dict[str, str] = {}

    def _read(self, row: int) -> tuple[Image.Image, tuple[int, int], int, int] | None:
        try:
            return cropped(self.paths[row], row, self.args.seed, self.buckets)
        except (
            OSError,
            ValueError,
            SyntaxError,
            Image.DecompressionBombError,
        ) as error:  # PIL's of broken files
            self.broken[self.paths[row]] = str(error)
            return None

    def encoded(self, vae: AutoencoderKL) -> Iterator[latents.Encoded]:
        """Batches of one size through the VAE; the posterior is drawn by (seed, row)."""
        waiting: dict[tuple[int, int], list[tuple[int, Image.Image, tuple[int, int], int, int]]] = (
            defaultdict(list)
        )
        with ThreadPoolExecutor(self.args.readers) as pool:
            for first in range(0, len(self.rows), 64):  # no more than that is held in memory
                rows = self.rows[first : first + 64]
                for row, read in zip(rows, pool.map(self._read, rows), strict=True):
                    if read is None:
                        continue
                    batch = waiting[read[0].size]
                    batch.append((row, *read))
                    if len(batch) == self.args.batch_size:
                        yield from self._latents(vae, batch)
                        batch.clear()
        for batch in waiting.values():
            if batch:
                yield from self._latents(vae, batch)

    def _noise(self, row: int, shape: torch.Size) -> torch.Tensor:
        seed = int(np.random.SeedSequence([self.args.seed, row, 1]).generate_state(1, np.uint64)[0]) >> 1
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    @torch.inference_mode()
    def _latents(self, vae: AutoencoderKL, batch: list) -> Iterator[latents.Encoded]:
        pixels = np.stack([np.asarray(image) for _, image, *_ in batch])
        inputs = torch.from_numpy(pixels).to(vae.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        drawn = vae.encode(inputs).latent_dist
        noise = torch.stack([self._noise(row, drawn.mean.shape[1:]) for row, *_ in batch]).to(vae.device)
        found = (drawn.mean + drawn.std * noise - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
        for (row, _, (width, height), left, top), latent in zip(batch, found, strict=True):
            yield latents.Encoded(row, self.paths[row], width, height, top, left, latent)


def plan(args: argparse.Namespace, rows: list[int], paths: list[str]) -> None:
    """What the parts are made of, kept beside them: a store that was begun otherwise is not gone on with."""
    settings = {
        k: str(v) for k, v in vars(args).items() if k not in ("output", "table", "batch_size", "readers")
    }
    pictures = hashlib.sha256("\n".join(f"{row} {paths[row]}" for row in rows).encode()).hexdigest()
    wanted, file = {"pictures": pictures, **settings}, args.output / "plan.json"
    if not file.exists():
        partial = file.with_name(f"plan.{rank()}.part")
        partial.write_text(json.dumps(wanted))
        os.replace(partial, file)
    begun = json.loads(file.read_text())
    if begun != wanted:
        other = ", ".join(f"{k} {begun.get(k)!r}, now {v!r}" for k, v in wanted.items() if begun.get(k) != v)
        raise SystemExit(
            f"{args.output} was begun with {other}: give what it was begun with, or another --output"
        )


def main() -> None:
    args = parse_args()
    table = pd.read_parquet(args.table)
    if "path" not in table:
        raise SystemExit(f"--table {args.table} lacks the column path")
    rows = np.flatnonzero(table.score > 0).tolist() if "score" in table else list(range(len(table)))
    args.output.mkdir(parents=True, exist_ok=True)
    paths = table.path.tolist()
    plan(args, rows, paths)
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    vae = (
        AutoencoderKL.from_pretrained(args.model, subfolder="vae").eval().to(device)
    )  # float32: fp16 overflows
    buckets = np.array(
        aspects.resolutions("kohya", args.area, args.bucket_step, args.min_side, args.max_side)
    )
    parts = [args.output / f"part-{k:05d}" for k in range(-(-len(rows) // args.part))]
    count, start = 0, time.perf_counter()
    for k in range(rank(), len(parts), world_size()):
        if parts[k].exists():
            continue
        partial = parts[k].with_name(f"{parts[k].name}.part")
        shutil.rmtree(partial, ignore_errors=True)
        part = Part(rows[k * args.part : (k + 1) * args.part], paths, args, buckets)
        count += latents.write(partial, part.encoded(vae), args.dtype)
        (partial / "broken.json").write_text(json.dumps(part.broken, indent=1))
        flush(partial)  # a power cut leaves no whole name without what is in it
        partial.rename(parts[k])
        flush_names(args.output)
        speed = count / (time.perf_counter() - start)
        print(
            f"{parts[k].name} of {len(parts)}: {speed:.1f} pictures/s, {len(part.broken)} broken", flush=True
        )
    if all(part.exists() for part in parts):
        if not (args.output / "index.json").exists():
            latents.join(args.output, parts)
        broken = sum(len(json.loads((part / "broken.json").read_text())) for part in parts)
        print(
            f"done: {len(latents.Latents(args.output))} latents, {broken} broken (broken.json of their parts)"
        )


if __name__ == "__main__":
    main()
