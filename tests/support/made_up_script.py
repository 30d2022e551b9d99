"""The made-up training script of tests/data, structured as diffusers' examples are, run in this process."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import torch

import sdxl_fixes.diffusers
from sdxl_fixes.diffusers.__main__ import main

DATA = Path(__file__).parents[1] / "data"
SCRIPT = DATA / "made_up_sdxl.py"
SDXL = {
    "_class_name": "EulerDiscreteScheduler",
    **{"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    "num_train_timesteps": 1000,
    **{"prediction_type": "epsilon", "timestep_spacing": "leading", "steps_offset": 1},
}


def model(folder, **changes):
    """A model folder in ``folder`` that has a scheduler alone: SDXL's config with ``changes``."""
    base = folder / "base"
    shutil.rmtree(base, ignore_errors=True)
    (base / "scheduler").mkdir(parents=True)
    (base / "scheduler" / "scheduler_config.json").write_text(json.dumps({**SDXL, **changes}))
    return base


def environment(monkeypatch):
    """What the script needs around it."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.syspath_prepend(str(DATA))


def run(folder, base, *flags, how="module"):
    """The steps of a training into ``folder``; ``how``: module (as the launcher), install, unpatched."""
    folder.mkdir(exist_ok=True)
    words = [str(SCRIPT), "--pretrained_model_name_or_path", str(base), "--output_dir", str(folder), *flags]
    before = sys.argv
    try:
        sys.argv = ["sdxl_fixes.diffusers", *words] if how == "module" else words
        if how == "install":
            sdxl_fixes.diffusers.install()
        main() if how == "module" else runpy.run_path(str(SCRIPT), run_name="__main__")
    finally:
        sdxl_fixes.diffusers.uninstall()
        sys.argv = before
    return torch.load(folder / "steps.pt")
