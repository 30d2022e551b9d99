"""What the scripts save: the schedule's record in model and LoRA files, and beside accelerate's
checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sdxl_fixes.atomic import replacing
from sdxl_fixes.checkpoint import metadata
from sdxl_fixes.errors import FixError
from sdxl_fixes.model_files.header import ROOM, ROOM_KEY
from sdxl_fixes.schedule import NoiseSchedule

from .run import SESSION

RECORD = "sdxl_fixes.json"
_VAE = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")


def save_file(
    original: Callable[..., Any], tensors: dict[str, torch.Tensor], *args: Any, **kwargs: Any
) -> Any:
    """A U-Net, ControlNet or LoRA file with the record in its metadata, and room for a later stamp. No marker
    tensors: those belong to single-file checkpoints, and diffusers would report them as unexpected keys."""
    noise_level_counts = not any(name.startswith(_VAE) for name in tensors)
    if noise_level_counts and (run := SESSION.on("saving")):
        SESSION.reached("saving")
        filename, given = (args[0], args[1:]) if args else (kwargs.pop("filename"), ())
        known = (given[0] if given else kwargs.pop("metadata", None)) or {}
        entries = {**metadata(run.schedule, run.prediction_type), ROOM_KEY: " " * ROOM}
        merged = {**known, **{key: value for key, value in entries.items() if value is not None}}
        return original(tensors, filename, metadata=merged, **kwargs)
    return original(tensors, *args, **kwargs)


def save_state(
    original: Callable[..., Any], self: Any, output_dir: str | None = None, *args: Any, **kwargs: Any
) -> Any:
    """A checkpoint with the schedule and the place in the stratified timesteps beside it: a file of its own,
    since accelerate refuses checkpoints with another number of registered objects, and these go from and to
    stock scripts."""
    result = original(self, output_dir, *args, **kwargs)
    run = SESSION.run
    if run is not None and run.on and output_dir is not None:
        state = {
            "schedule": run.schedule.to_record(),
            "prediction_type": run.prediction_type,
            "timesteps": None if run.timesteps is None else run.timesteps.state_dict(),
        }
        with replacing(Path(output_dir) / RECORD) as file:
            file.write_text(json.dumps(state, allow_nan=False), encoding="utf-8")
    return result


def load_state(
    original: Callable[..., Any], self: Any, input_dir: str | None = None, *args: Any, **kwargs: Any
) -> Any:
    """Resume, if the checkpoint was trained on the schedule that the flags describe. Raises FixError
    otherwise."""
    run, file = SESSION.run, Path(input_dir or "") / RECORD
    if run is not None and input_dir is not None and file.is_file():
        state = json.loads(file.read_text(encoding="utf-8"))
        trained = NoiseSchedule.from_record(state["schedule"])
        if run.on and (trained, state["prediction_type"]) != (run.schedule, run.prediction_type):
            raise FixError(
                f"{input_dir} was trained with {state['prediction_type']} on {trained!r}, and the flags of "
                "this run describe "
                f"{run.prediction_type} on {run.schedule!r}: resume with the flags that it was started with"
            )
        if run.timesteps is not None and state["timesteps"] is not None:
            run.timesteps.load_state_dict(state["timesteps"])
    return original(self, input_dir, *args, **kwargs)
