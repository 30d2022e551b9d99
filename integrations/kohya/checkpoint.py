"""What kohya saves: metadata of full models and networks, marker tensors of full models and the scheduler
config beside them, the scheduler of diffusers folders, states."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sdxl_fixes.checkpoint import Sampling, markers, metadata
from sdxl_fixes.model_files.header import ROOM, ROOM_KEY
from sdxl_fixes.model_files.model_file import SCHEDULER_CONFIG, beside
from sdxl_fixes.model_files.stamp import write_scheduler_config
from sdxl_fixes.trainers import states

from . import ema
from .resume import RESUME
from .run import SESSION, pickled, saves_full


def model_spec(original: Callable[..., dict[str, str]], *args: Any, **kwargs: Any) -> dict[str, str]:
    """Upstream's metadata with the schedule's record and the prediction type that UIs understand, and room
    for a later stamp."""
    spec = original(*args, **kwargs)
    if run := SESSION.on("saving"):
        if not saves_full(run.args) or pickled(run.args):  # else the file is due, and not just what it says
            SESSION.reached("saving")
        for key, value in metadata(run.schedule, run.prediction_type).items():
            if value is None:
                spec.pop(key, None)
            else:
                spec[key] = value
        if not saves_full(run.args):  # a network has kohya's own word for it, too: its flag
            spec["ss_zero_terminal_snr"] = str(Sampling(run.schedule, run.prediction_type).zero_terminal)
        spec[ROOM_KEY] = " " * ROOM
    return spec


def save_file(
    original: Callable[..., Any], tensors: dict[str, torch.Tensor], filename: Any, *args: Any, **kwargs: Any
) -> Any:
    """A full model with its marker tensors, and beside it the scheduler config for stock diffusers."""
    run = SESSION.on("saving")
    if run is None:
        return original(tensors, filename, *args, **kwargs)
    tensors = {**tensors, **{name: torch.empty(0) for name in markers(run.schedule, run.prediction_type)}}
    result = original(tensors, filename, *args, **kwargs)
    write_scheduler_config(_config_of(filename), Sampling(run.schedule, run.prediction_type))
    SESSION.reached("saving")
    return result


def save_and_remove(original: Callable[..., Any], args: Any, *rest: Any, **kwargs: Any) -> Any:
    """A save between, after which upstream may remove an older file: its config goes with it, and so do its
    average and the average's."""
    run = SESSION.on("saving")
    if run is None:
        return original(args, *rest, **kwargs)
    before = set(Path(args.output_dir).glob("*.safetensors"))
    result = original(args, *rest, **kwargs)
    ema.tidy(run)
    for gone in before - set(Path(args.output_dir).glob("*.safetensors")):
        _config_of(gone).unlink(missing_ok=True)
    return result


def upload(
    original: Callable[..., Any], args: Any, src: Any, dest_suffix: str = "", *rest: Any, **kwargs: Any
) -> Any:
    """A file that goes to the Hugging Face Hub, and after it the config beside it."""
    result = original(args, src, dest_suffix, *rest, **kwargs)
    if SESSION.on("saving") and isinstance(src, str) and (config := _config_of(src)).is_file():
        original(args, str(config), dest_suffix.removesuffix(Path(src).name) + config.name, *rest, **kwargs)
    return result


def _config_of(file: str | Path) -> Path:
    return beside(Path(file), "." + SCHEDULER_CONFIG)


def save_folder(original: Callable[..., Any], output_dir: str, *args: Any, **kwargs: Any) -> Any:
    """A diffusers folder whose scheduler is the trained one, of the class that upstream saved."""
    result = original(output_dir, *args, **kwargs)
    if run := SESSION.on("saving"):
        file = Path(output_dir) / "scheduler" / SCHEDULER_CONFIG
        write_scheduler_config(file, Sampling(run.schedule, run.prediction_type))
        SESSION.reached("saving")
    return result


def save_state(
    original: Callable[..., Any], self: Any, output_dir: str | None = None, *args: Any, **kwargs: Any
) -> Any:
    """A state folder with the schedule, and the place in the training, beside it."""
    return states.save_state(SESSION, original, self, output_dir, *args, place=RESUME.state(), **kwargs)


def load_state(
    original: Callable[..., Any], self: Any, input_dir: str | None = None, *args: Any, **kwargs: Any
) -> Any:
    """Resume, on the schedule that the flags describe alone; with --exact_resume at the very place."""
    exact = RESUME if SESSION.on("resume") else None
    return states.load_state(SESSION, original, self, input_dir, *args, exact=exact, **kwargs)
