"""Runs inside InvokeAI's own Python: what its model manager takes files and folders for, and the schedulers
that it makes of a folder's, as JSON.

invokeai_run.py CHECKOUT SAMPLERS PATH...: SAMPLERS are names of its scheduler menu, with commas between. No
server is started, no database opened, and no weight is read.
"""

import contextlib
import json
import sys
import types
from pathlib import Path

checkout, samplers, *paths = sys.argv[1:]
sys.path.insert(0, checkout)
sys.argv = sys.argv[:1]

import diffusers  # noqa: E402
from invokeai.app.invocations.denoise_latents import get_scheduler  # noqa: E402
from invokeai.backend.model_manager.configs.factory import ModelConfigFactory  # noqa: E402


def sampled(folder, config, name):
    """Of a folder's scheduler, loaded as its loader does (the class that the config names), what its sampler
    ``name`` becomes."""
    saved = Path(folder) / "scheduler"
    named = json.loads((saved / "scheduler_config.json").read_text())["_class_name"]
    loaded = contextlib.nullcontext(getattr(diffusers, named).from_pretrained(saved, local_files_only=True))
    context = types.SimpleNamespace(models=types.SimpleNamespace(load=lambda info: loaded))
    made = get_scheduler(context, None, name, 0, config)
    made.set_timesteps(10)
    return {
        "prediction_type": getattr(made.config.prediction_type, "value", made.config.prediction_type),
        "alphas_cumprod": made.alphas_cumprod.double().tolist(),
        "first": float(made.timesteps[0]),
    }


def describe(path):
    found = ModelConfigFactory.from_model_on_disk(path, hash_algo="random").config
    predicts = getattr(found, "prediction_type", None)
    said = {"base": found.base.value, "type": found.type.value, "predicts": predicts and predicts.value}
    if Path(path).is_dir() and predicts is not None:
        said["samplers"] = {name: sampled(path, found, name) for name in samplers.split(",")}
    return said


print(json.dumps({path: describe(path) for path in paths}))
