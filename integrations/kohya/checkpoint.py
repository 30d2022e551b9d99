"""What kohya saves: metadata of full models and networks, marker tensors of full models, the scheduler of
diffusers folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sdxl_fixes.checkpoint import Sampling, markers, metadata
from sdxl_fixes.model_files.header import ROOM, ROOM_KEY
from sdxl_fixes.model_files.model_file import SCHEDULER_CONFIG
from sdxl_fixes.model_files.stamp import write_scheduler_config

from .run import SESSION


def model_spec(original: Callable[..., dict[str, str]], *args: Any, **kwargs: Any) -> dict[str, str]:
    """Upstream's metadata with the schedule's record and the prediction type that UIs understand, and room
    for a later stamp."""
    spec = original(*args, **kwargs)
    if run := SESSION.on("saving"):
        SESSION.reached("saving")
        for key, value in metadata(run.schedule, run.prediction_type).items():
            if value is None:
                spec.pop(key, None)
            else:
                spec[key] = value
        spec[ROOM_KEY] = " " * ROOM
    return spec


def save_file(
    original: Callable[..., Any], tensors: dict[str, torch.Tensor], filename: Any, *args: Any, **kwargs: Any
) -> Any:
    """A full model with its marker tensors."""
    if run := SESSION.on("saving"):
        tensors = {**tensors, **{name: torch.empty(0) for name in markers(run.schedule, run.prediction_type)}}
    return original(tensors, filename, *args, **kwargs)


def save_folder(original: Callable[..., Any], output_dir: str, *args: Any, **kwargs: Any) -> Any:
    """A diffusers folder whose scheduler is the trained one, of the class that upstream saved."""
    result = original(output_dir, *args, **kwargs)
    if run := SESSION.on("saving"):
        file = Path(output_dir) / "scheduler" / SCHEDULER_CONFIG
        write_scheduler_config(file, Sampling(run.schedule, run.prediction_type))
        SESSION.reached("saving")
    return result
