"""Plan an epoch of aspect buckets, side by side with the code of other trainers: time, memory, chunks per
batch.

    SD_SCRIPTS=path/to/sd-scripts NOVELAI_BUCKETING=path/to/aspect-ratio-bucketing python
    benchmarks/buckets.py

prints Markdown. Every cell is a process of its own; without a checkout its rows are left out. Images:
log-normal aspect ratios around common formats; prompts: N(45, 30) words of 1.35 tokens. Build is what is done
once, plan is one epoch. Memory is the process's peak above what it holds when the inputs are made (Linux:
VmHWM, reset); what our plan alone allocates is also counted (tracemalloc).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np

from sdxl_fixes.aspects import assign, resolutions
from sdxl_fixes.buckets import ChunkBucketBatchSampler

FORMATS = np.array([1, 2 / 3, 3 / 2, 3 / 4, 4 / 3, 9 / 16, 16 / 9, 1 / 2, 2])
SHARES = np.array([0.22, 0.18, 0.14, 0.13, 0.12, 0.08, 0.07, 0.04, 0.02])
NEEDS = {"kohya": "SD_SCRIPTS", "NovelAI": "NOVELAI_BUCKETING"}


def inputs(count: int) -> tuple[Any, Any]:
    """Sizes (width, height) and chunk counts."""
    rng = np.random.default_rng(0)
    aspect = FORMATS[rng.choice(len(FORMATS), count, p=SHARES)] * rng.lognormal(0, 0.04, count)
    side = rng.uniform(900, 2000, count)
    sizes = np.stack([side * np.sqrt(aspect), side / np.sqrt(aspect)], axis=1).astype(np.int64)
    return sizes, -(-tokens(count, rng) // 75)


def tokens(count: int, rng: Any) -> Any:
    """Tokens per prompt: words from N(45, 30), at least 1, of 1.35 tokens each."""
    words = rng.normal(45, 30, count)
    while (low := words < 1).any():
        words[low] = rng.normal(45, 30, low.sum())
    return np.ceil(1.35 * words + 1.5).astype(np.int64)


def ours(count: int, batch_size: int) -> dict[str, Any]:
    sizes, chunks = inputs(count)
    start = _begin()
    index = assign(sizes, resolutions()).index
    sampler = ChunkBucketBatchSampler(index, chunks, batch_size=batch_size)
    built = time.perf_counter()
    sampler.set_epoch(1)
    next(iter(sampler))
    out = _end(start, built)
    sampler.set_epoch(2)
    tracemalloc.start()
    next(iter(sampler))
    out["plan_numpy_mb"] = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    account = sampler.account()
    return {
        **out,
        "chunks": account.chunks,
        "floor": account.floor,
        "lost": account.lost,
        "batches": account.batches,
    }


def kohya(count: int, batch_size: int) -> dict[str, Any]:
    """BaseDataset.make_buckets and, per epoch, shuffle_buckets."""
    sys.path.insert(0, os.environ["SD_SCRIPTS"])
    import library.train_util as train_util

    sizes, chunks = inputs(count)
    dataset = train_util.BaseDataset((1024, 1024), 1.0, False)
    dataset.batch_size, dataset.enable_bucket, dataset.bucket_no_upscale = batch_size, True, False
    dataset.min_bucket_reso, dataset.max_bucket_reso, dataset.bucket_reso_steps = 512, 2048, 64
    for key, size in enumerate(sizes.tolist()):
        info = train_util.ImageInfo(str(key), 1, "", False, "")
        info.image_size = tuple(size)
        dataset.image_data[info.image_key] = info
    start = _begin()
    dataset.make_buckets()
    built = time.perf_counter()
    dataset.current_epoch = 1
    dataset.shuffle_buckets()
    out, batches = _end(start, built), []
    for entry in dataset.buckets_indices:
        bucket = dataset.bucket_manager.buckets[entry.bucket_index]
        first = entry.batch_index * entry.bucket_batch_size
        batches.append([int(key) for key in bucket[first : first + entry.bucket_batch_size]])
    return {**out, **_text(batches, chunks)}


def novelai(count: int, batch_size: int) -> dict[str, Any]:
    """BucketManager, its start_epoch, and its batches, which it draws one by one."""
    sys.path.insert(0, os.environ["NOVELAI_BUCKETING"])
    from bucketmanager import BucketManager

    sizes, chunks = inputs(count)
    with tempfile.NamedTemporaryFile(suffix=".pkl") as file:
        pickle.dump(dict(enumerate(map(tuple, sizes.tolist()))), file)
        file.flush()
        start = _begin()
        options = dict(
            max_size=(1024, 1024), min_dim=512, dim_limit=2048, base_res=(1024, 1024), bsz=batch_size
        )
        manager = BucketManager(file.name, **options)
    built = time.perf_counter()
    manager.start_epoch()
    batches = [batch for batch, _ in manager.generator()]
    return {**_end(start, built), **_text([list(map(int, batch)) for batch in batches], chunks)}


KINDS = {"ours": ours, "kohya": kohya, "NovelAI": novelai}


def _begin() -> tuple[float, float]:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    return time.perf_counter(), _peak_mb()


def _peak_mb() -> float:
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")
    )
    return int(line.split()[1]) * 1024 / 1e6


def _end(start: tuple[float, float], built: float) -> dict[str, Any]:
    now = time.perf_counter()
    return {"build_s": built - start[0], "plan_s": now - built, "peak_mb": _peak_mb() - start[1]}


def _text(batches: list[list[int]], chunks: Any) -> dict[str, Any]:
    longest = sum(int(chunks[batch].max()) * len(batch) for batch in batches)
    seen = sum(map(len, batches))
    return {
        "chunks": longest / seen,
        "floor": float(chunks.mean()),
        "lost": len(chunks) - seen,
        "batches": len(batches),
    }


def measure(kind: str, count: int, batch_size: int) -> dict[str, Any]:
    """One cell, in a fresh process."""
    words = [sys.executable, __file__, "--one", kind, str(count), str(batch_size)]
    process = subprocess.run(words, capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError(f"{kind} failed: {process.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--samples",
        type=float,
        nargs="+",
        default=[1e5, 1e6, 1e7],
        help="data set sizes (1e7 is for us alone)",
    )
    parser.add_argument(
        "--batch_sizes",
        type=int,
        nargs="+",
        default=[4, 16, 32, 64],
        help="for the chunks per batch, at 1e5 samples",
    )
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        kind, count, batch_size = args.one
        print(json.dumps(KINDS[kind](int(count), int(batch_size))))
        return
    kinds = [kind for kind in KINDS if NEEDS.get(kind) is None or NEEDS[kind] in os.environ]
    print("| samples | code | build, s | plan one epoch, s | against ours | peak, MB | lost | batches |")
    print("|---:|---|---:|---:|---:|---:|---:|---:|")
    for count in map(int, args.samples):
        base = 0.0
        for kind in kinds if count <= 1_000_000 else ["ours"]:
            cell = measure(kind, count, 16)
            base = cell["plan_s"] if kind == "ours" else base
            memory = f"{cell['peak_mb']:.0f}" + (
                f" (plan {cell['plan_numpy_mb']:.0f})" if kind == "ours" else ""
            )
            print(
                f"| {count:.0e} | {kind} | {cell['build_s']:.2f} | {cell['plan_s']:.3f} | "
                f"{cell['plan_s'] / base:.1f} x | {memory} "
                f"| {cell['lost']} | {cell['batches']} |",
                flush=True,
            )
    print("\n| code | " + " | ".join(f"chunks at batch {size}" for size in args.batch_sizes) + " | floor |")
    print("|---|" + "---:|" * (len(args.batch_sizes) + 1))
    for kind in kinds:
        cells = [measure(kind, 100_000, size) for size in args.batch_sizes]
        print(
            f"| {kind} | "
            + " | ".join(f"{cell['chunks']:.3f}" for cell in cells)
            + f" | {cells[0]['floor']:.3f} "
            "|",
            flush=True,
        )


if __name__ == "__main__":
    main()
