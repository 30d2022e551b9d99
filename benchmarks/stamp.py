"""Stamping against cp, side by side in one run: python benchmarks/stamp.py [--folder DIR] [--gib 2] [--runs
5] > docs/stamp-record.md

Every time includes the sync to disk, cp's too (cp and then fsync of the copy: a stamp that is not on the disk
is not done). cp and the stamps take turns on the same file, so that the disk's moods fall on both. Data are
random; every stamped file's tensors are hashed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import time
from pathlib import Path

from sdxl_fixes import NoiseSchedule
from sdxl_fixes.checkpoint import Sampling
from sdxl_fixes.model_files.stamp import stamp_file
from sdxl_fixes.model_files.write import data_hash

NAMES = {
    "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
    "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
    "first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3),
}


def make(path: Path, size: int) -> None:
    """A checkpoint of about ``size`` bytes of random tensors, with as many entries as SDXL's (2515)."""
    shapes = {
        **NAMES,
        **{f"model.diffusion_model.filler.{i}.weight": (size // 2512 // 2,) for i in range(2512)},
    }
    entries, end = [], 0
    for name, shape in shapes.items():
        count = 2
        for length in shape:
            count *= length
        entries.append(
            f'"{name}":{{"dtype":"F16","shape":{list(shape)},"data_offsets":[{end},{end + count}]}}'
        )
        end += count
    text = ("{" + ",".join(entries) + "}").encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        while end > 0:
            end -= file.write(os.urandom(min(end, 64 << 20)))
        os.fsync(file.fileno())


def copy(source: Path, target: Path) -> float:
    """Seconds that cp and a sync of the copy take."""
    start = time.perf_counter()
    subprocess.run(["cp", "--reflink=never", source, target], check=True)
    fd = os.open(target, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    return time.perf_counter() - start


def copy_over(source: Path, path: Path) -> float:
    """The same, with the copy then put in the place of ``path``, whose blocks and cached pages have to be
    freed."""
    part = path.with_suffix(".part")
    start = time.perf_counter()
    copy(source, part)
    part.replace(path)
    return time.perf_counter() - start


def forget(*paths: Path) -> None:
    """Drop the files' pages from the cache."""
    os.sync()
    for path in paths:
        if path.exists():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def stamp(path: Path, sigma: float, **options: bool) -> tuple[float, str]:
    """Seconds, and the way that was taken."""
    sampling = Sampling(NoiseSchedule.sdxl().with_terminal_sigma(sigma), "epsilon")
    start = time.perf_counter()
    way = stamp_file(path, sampling, force=True, **options).way
    return time.perf_counter() - start, way


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=Path("."))
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument(
        "--cold", action="store_true", help="drop the files from the page cache before each time"
    )
    args = parser.parse_args()
    source, work, other = (
        args.folder / f"stamp-benchmark-{name}.safetensors" for name in ("source", "work", "cp")
    )
    times: dict[str, list[float]] = {"cp": [], "cp, put in the old file's place": []}

    def settle() -> None:
        os.sync()  # what was deleted before is discarded before the clock starts
        if args.cold:
            forget(source, work)

    try:
        make(source, int(args.gib * 2**30))
        copy(source, work)
        digest = data_hash(work)
        for run in range(args.runs):
            settle()
            times["cp"].append(copy(source, other))
            other.unlink()
            settle()
            times["cp, put in the old file's place"].append(copy_over(source, work))
            for name, sigma, options in (
                ("no room", 300 + run, {}),
                ("room", 400 + run, {}),
                ("--in_place", 500 + run, {"in_place": True}),
            ):
                if name == "--in_place":  # an unstamped file again
                    work.unlink()
                    copy(source, work)
                settle()
                seconds, way = stamp(work, sigma, **options)
                times.setdefault(f"{name}: {way}", []).append(seconds)
                assert data_hash(work) == digest
    finally:
        for path in (source, work, other):
            path.unlink(missing_ok=True)
    system = subprocess.run(
        ["stat", "-f", "-c", "%T", args.folder], capture_output=True, text=True, check=False
    ).stdout.strip()
    cache = "cold" if args.cold else "hot"
    print(
        f"{args.gib:g} GiB of random tensors in 2515 entries on {system}, page cache {cache}, {args.runs} "
        "runs; every time includes the"
    )
    print("sync to disk, `cp --reflink=never` and the stamps take turns.\n")
    print("| way | seconds, each run | median | ratio to cp, median of each run's |")
    print("|---|---|---:|---:|")
    for name, seconds in times.items():
        ratio = statistics.median(mine / cp for mine, cp in zip(seconds, times["cp"], strict=True))
        print(
            f"| {name} | {' '.join(f'{value:.3g}' for value in seconds)} | "
            f"{statistics.median(seconds):.3g} | {ratio:.4f} |"
        )


if __name__ == "__main__":
    main()
