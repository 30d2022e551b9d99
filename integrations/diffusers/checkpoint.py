"""What the scripts save: the schedule's record in model and LoRA files, and beside accelerate's
checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sdxl_fixes.checkpoint import metadata
from sdxl_fixes.model_files.header import ROOM, ROOM_KEY
from sdxl_fixes.trainers import states

from .run import SESSION

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
    """A checkpoint with the schedule beside it."""
    return states.save_state(SESSION, original, self, output_dir, *args, **kwargs)


def load_state(
    original: Callable[..., Any], self: Any, input_dir: str | None = None, *args: Any, **kwargs: Any
) -> Any:
    """Resume, on the schedule that the flags describe alone."""
    return states.load_state(SESSION, original, self, input_dir, *args, **kwargs)
