"""Step time of the real sdxl_train.py with and without --chunk_buckets: SD_SCRIPTS=path/to/sd-scripts python
benchmarks/kohya_step.py

A scaled-down SDXL (tests/kohya/real, TINY_SCALE times its size) on the CPU, 128 x 128 pixels, batch 4,
prompts of 1 to 3 chunks as in docs/buckets.md, --max_token_length 225. Both ways in turn, a few times; the
first step of a run is left out.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

SCALE, IMAGES, BATCH, STEPS, ROUNDS = 4, 32, 4, 8, 2
KOHYA = Path(__file__).resolve().parent.parent / "tests" / "kohya" / "real"


def run(folder: Path, flags: list[str]) -> list[tuple[float, int]]:
    """Seconds and context length of every step but the first."""
    trace = folder / "trace.json"
    common = {
        "pretrained_model_name_or_path": folder / "assets" / "model.safetensors",
        "tokenizer_cache_dir": folder / "assets" / "tokenizers",
        "dataset_config": folder / "set.toml",
        "output_dir": folder / "out",
        "output_name": "out",
        "mixed_precision": "no",
        "max_train_steps": STEPS,
        "seed": 7,
        "max_data_loader_n_workers": 0,
        "optimizer_type": "SGD",
        "max_token_length": 225,
    }
    words = [str(x) for name, value in common.items() for x in (f"--{name}", value)]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "STEP_TIMES": str(folder / "times.json"),
    }
    command = [
        sys.executable,
        str(KOHYA / "launch.py"),
        "module",
        str(trace),
        "sdxl_train.py",
        *words,
        *flags,
    ]
    process = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    if process.returncode:
        raise RuntimeError(process.stderr[-2000:])
    times, contexts = (
        json.loads((folder / "times.json").read_text()),
        json.loads(trace.read_text())["contexts"],
    )
    return [
        (later - earlier, length)
        for earlier, later, (_, length) in zip(times, times[1:], contexts[1:], strict=False)
    ]


def main() -> None:
    os.environ["TINY_SCALE"] = str(SCALE)
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run(
            [sys.executable, str(KOHYA / "assets.py"), str(folder / "assets")],
            check=True,
            capture_output=True,
        )
        (folder / "images").mkdir()
        for number in range(IMAGES):
            Image.new("RGB", (128, 128), (number, 0, 0)).save(folder / "images" / f"{number}.png")
            tokens = max(1, int(1.35 * rng.gauss(45, 30)))
            (folder / "images" / f"{number}.txt").write_text("x" * tokens)
        (folder / "set.toml").write_text(
            '[general]\ncaption_extension = ".txt"\nenable_bucket = true\n[[datasets]]\n'
            "resolution = 128\nmin_bucket_reso = 64\nmax_bucket_reso = 256\n"
            f"batch_size = {BATCH}\n[[datasets.subsets]]\nimage_dir = {json.dumps(str(folder / 'images'))}\n"
        )
        steps: dict[str, list[tuple[float, int]]] = {"padded to the limit": [], "--chunk_buckets": []}
        for _ in range(ROUNDS):
            steps["padded to the limit"] += run(folder, [])
            steps["--chunk_buckets"] += run(folder, ["--chunk_buckets"])
    print("| | steps | median step, s | mean context |\n|---|---:|---:|---:|")
    for name, found in steps.items():
        print(
            f"| {name} | {len(found)} | {np.median([s for s, _ in found]):.2f} | "
            f"{np.mean([n for _, n in found]):.0f} |"
        )


if __name__ == "__main__":
    main()
