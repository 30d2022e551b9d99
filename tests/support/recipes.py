"""examples/recipes, read for tests."""

import json
import os
import shlex
import stat
import subprocess
import sys
from pathlib import Path

from sdxl_fixes.training_sets.read import load_toml

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "recipes"
KOHYA = {
    "big_v_ztsnr": "sdxl_train.py",
    "one_card_v_ztsnr": "sdxl_train.py",
    "lora_v_ztsnr": "sdxl_train_network.py",
    "epsilon": "sdxl_train.py",
    "big_flow": "sdxl_train.py",
}
DIFFUSERS = {
    "big_v_ztsnr": "train_text_to_image_sdxl.py",
    "lora_v_ztsnr": "train_text_to_image_lora_sdxl.py",
    "epsilon": "train_text_to_image_sdxl.py",
    "big_flow": "train_text_to_image_sdxl.py",
}

# What docs/recipes.md estimates memory and time from, counted by tests/kohya/real/count_unet.py on SDXL's
# real U-Net.
UNET, TEXT_ENCODERS, LORA_32, ADAFACTOR = 2_567_463_684, 817_720_320, 85_114_880, 244_330_500  # numbers
WHOLE, KEPT, RECOMPUTED = (
    19.99,
    0.551,
    0.852,
)  # GB of bfloat16 for a 1024 x 1024 image: no checkpointing; block inputs; the largest block
FORWARD, FULL, LORA = (
    6.76,
    26.9,
    20.2,
)  # TFLOP of a sample: forward; with checkpointing; without the gradients of the weights


def keys(recipe):
    """A kohya recipe's settings, its sections put together as kohya does."""
    return {
        key: value
        for section in load_toml(FOLDER / f"{recipe}.toml").values()
        for key, value in section.items()
    }


def data(recipe):
    """The data set's file of a kohya recipe."""
    return load_toml(FOLDER / keys(recipe)["dataset_config"])


def command(recipe, folder, *flags, **environment):
    """What a shell recipe gives to ``accelerate launch``; it runs with a stand-in for accelerate, made in
    ``folder``."""
    stand_in = folder / "accelerate"
    program = "import json, sys; print(json.dumps(sys.argv[1:]))"
    stand_in.write_text(f"#!/bin/sh\nexec {shlex.quote(sys.executable)} -c '{program}' \"$@\"\n")
    stand_in.chmod(stand_in.stat().st_mode | stat.S_IXUSR)
    environment = {**os.environ, **environment, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    shell = subprocess.run(
        ["bash", str(FOLDER / f"{recipe}.sh"), *flags],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        check=True,
    )
    return json.loads(shell.stdout)
