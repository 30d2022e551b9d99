"""What planning an epoch of many samples costs one process, CPU seconds and memory.

python benchmarks/buckets_at_scale.py 1e6          one row of docs/at-scale.md; 1e8 takes 3 GB
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sdxl_fixes.buckets import ChunkBucketBatchSampler

BUCKETS, BATCH, RANKS = 43, 8, 8


def peak() -> float:
    """The largest memory of this process so far, GB."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def held() -> float:
    """Its memory now, GB (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e9


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What ``work`` returns, and its CPU seconds."""
    start = time.process_time()
    return work(), time.process_time() - start


def measured(samples: int) -> dict[str, float]:
    """Of ``samples`` in random buckets, of one chunk to three."""
    random = np.random.default_rng(0)
    buckets = random.integers(0, BUCKETS, samples, dtype=np.uint8)
    chunks = np.maximum(1, random.integers(-1, 4, samples, dtype=np.int8))
    given = peak()

    def make() -> ChunkBucketBatchSampler:
        return ChunkBucketBatchSampler(buckets, chunks, batch_size=BATCH, world_size=RANKS, rank=0, seed=1)

    sampler, made = timed(make)
    batches = iter(sampler)
    _, planned = timed(lambda: next(batches))
    top, kept = peak(), held()
    count, read = timed(lambda: sum(1 for _ in itertools.islice(batches, 20_000)))
    state = sampler.state_dict(count + 1)
    _, loaded = timed(lambda: sampler.load_state_dict(state))
    _, accounted = timed(sampler.account)
    return {
        "samples": samples,
        "given_gb": given,
        "made_s": made,
        "planned_s": planned,
        "peak_gb": top,
        "kept_gb": kept,
        "batches_a_second": count / read,
        "state_bytes": len(json.dumps(state)),
        "loaded_s": loaded,
        "loaded_peak_gb": peak(),
        "account_s": accounted,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("samples", type=float, nargs="?", default=1e6)
    found = measured(int(parser.parse_args().samples))
    print(json.dumps({name: float(f"{value:.3g}") for name, value in found.items()}))


if __name__ == "__main__":
    main()
