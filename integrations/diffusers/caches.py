"""The embeddings and latents that a script keeps with ``datasets``."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sdxl_fixes.version import __version__

from . import crops, prompts
from .run import SESSION

KEPT = ("model_input", crops.COLUMN, prompts.COLUMN)


def map(original: Callable[..., Any], self: Any, function: Any = None, *args: Any, **kwargs: Any) -> Any:
    """The script's cached map, keyed by all that its content depends on, leaving the random generators as it
    found them.

    (It draws random numbers only where it finds no cache: without this a cold and a warm run of one seed
    train on different noise.)
    """
    run = SESSION.run
    if run is None or "new_fingerprint" not in kwargs or not SESSION.called_by_script():
        return original(self, function, *args, **kwargs)
    SESSION.reached("caches")
    key = f"{kwargs['new_fingerprint']} {content_key(run.args.pretrained_model_name_or_path, SESSION.script)}"
    kwargs["new_fingerprint"] = hashlib.sha256(key.encode()).hexdigest()[:32]
    generators = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        return original(self, function, *args, **kwargs)
    finally:
        random.setstate(generators[0])
        np.random.set_state(generators[1])
        torch.set_rng_state(generators[2])
        torch.cuda.set_rng_state_all(cuda)


def remove_columns(
    original: Callable[..., Any], self: Any, column_names: Any, *args: Any, **kwargs: Any
) -> Any:
    """The script drops the columns "image" and "text" of its latents by name; here whatever is not latents
    goes."""
    if SESSION.run is not None and SESSION.called_by_script():
        SESSION.reached("caches")
        column_names = [name for name in self.column_names if name not in KEPT]
    return original(self, column_names, *args, **kwargs)


def content_key(model: str, script: dict[str, Any]) -> str:
    """What upstream's key, the hash of the arguments, leaves out: the script's code, ours, the encoders'
    files, the precision."""
    digest = hashlib.sha256(f"{__version__} {os.environ.get('ACCELERATE_MIXED_PRECISION')}".encode())
    for ours in (crops, prompts):
        digest.update(Path(str(ours.__file__)).read_bytes())
    if "__file__" in script:
        digest.update(Path(script["__file__"]).read_bytes())
    for file in sorted(Path(model).glob("*/*")) if Path(model).is_dir() else ():
        if file.parent.name.startswith(("text_encoder", "tokenizer", "vae")):
            status = file.stat()
            digest.update(f"{file.parent.name}/{file.name} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()
