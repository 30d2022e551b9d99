"""sdxl-fixes for ComfyUI: a checkpoint or U-Net that carries a schedule record is sampled by it.

Nothing is needed in a workflow: what Load Checkpoint and Load Diffusion Model return follows the record, for
any schedule, and Save Checkpoint keeps it. A sampling node placed later (ModelSamplingDiscrete,
ModelSamplingSD3 ...) wins as always. Files without a record load exactly as without this package. To remove
it: ``sdxl-fixes comfyui remove PATH``, or delete this folder.
"""

from __future__ import annotations

import functools
import logging
import os
from typing import Any

import comfy.model_sampling
import comfy.sd
import folder_paths
import torch

from .schedule_file import MARKERS, RECORD_KEY, Schedule, check, printable, read_schedule, why

_KINDS = {"epsilon": "EPS", "v_prediction": "V_PREDICTION", "sample": "X0", "flow_prediction": "CONST"}
# comfy.sd.save_checkpoint's arguments
_SAVED = ("output_path", "model", "clip", "vae", "clip_vision", "metadata", "extra_keys")


def make_sampling(schedule: Schedule, model_config: Any) -> Any:
    """ComfyUI's own sampling object for the schedule, checked. What was read goes with it, for Save
    Checkpoint. Where the record cannot be followed it raises RecordError, or what a newer ComfyUI raises."""
    ours, flow = comfy.model_sampling, schedule.flow
    base = ours.ModelSamplingDiscreteFlow if flow else ours.ModelSamplingDiscrete
    kind = getattr(ours, _KINDS[schedule.prediction_type])

    class ModelSamplingFromFile(base, kind):  # type: ignore[valid-type,misc]
        def percent_to_sigma(self, percent: float) -> float:
            """As upstream, but for any number of timesteps (upstream's is for 1000)."""
            if flow or len(self.sigmas) == 1000 or not 0 < percent < 1:
                return float(super().percent_to_sigma(percent))
            return float(self.sigma(torch.tensor((1 - percent) * (len(self.sigmas) - 1))))

    sampling, sigmas = ModelSamplingFromFile(model_config), torch.from_numpy(schedule.sigmas)
    if flow:  # the network is told 1000 s, as everywhere; the shift spaces the steps
        sampling.set_parameters(shift=schedule.shift, timesteps=len(sigmas), multiplier=1000)
        sampling.sigmas = sigmas.float()
    else:
        sampling.set_sigmas(sigmas)
        sampling.num_timesteps, sampling.zsnr = len(sigmas), schedule.zero_snr
    check(sampling, schedule)
    sampling.sdxl_fixes = schedule
    return sampling


def follow(model: Any, path: str) -> None:
    """Make a freshly loaded model follow the record of its file, if it has one. Changes all or nothing, and
    raises nothing: what a newer ComfyUI makes of its own objects cannot be known here."""
    try:
        schedule = read_schedule(path)
        if schedule is None or model is None:
            return
        model.add_object_patch("model_sampling", make_sampling(schedule, model.model.model_config))
    except Exception as error:
        sentence = f"{printable(path)}: {why(error)}; the model is loaded as without it"
        logging.warning("[sdxl-fixes] %s", sentence)
        return
    logging.info("[sdxl-fixes] %s: %s", printable(path), schedule)


def _wrap(name: str, wrapper: Any) -> None:
    original = getattr(comfy.sd, name, None)
    if original is None:
        logging.warning("[sdxl-fixes] this ComfyUI has no comfy.sd.%s: update sdxl-fixes", name)
    elif not hasattr(original, "sdxl_fixes"):
        wrapped = functools.wraps(original)(functools.partial(wrapper, original))
        wrapped.sdxl_fixes = True  # type: ignore[attr-defined]
        setattr(comfy.sd, name, wrapped)


def load(original: Any, *args: Any, **kwargs: Any) -> Any:
    """A loader of comfy.sd, whose first argument is the file and whose first result is the model."""
    result = original(*args, **kwargs)
    path = args[0] if args else kwargs.get("ckpt_path", kwargs.get("unet_path"))
    if isinstance(path, (str, os.PathLike)):
        follow(result[0] if isinstance(result, tuple) else result, os.fspath(path))
    return result


def save(original: Any, *args: Any, **kwargs: Any) -> Any:
    """comfy.sd.save_checkpoint: the record goes with the model."""
    try:
        call = _with_record({**dict(zip(_SAVED, args, strict=False)), **kwargs})
    except Exception as error:
        logging.warning("[sdxl-fixes] the record is not saved: %s", why(error))
        call = None
    if call is None or len(args) > len(_SAVED):
        return original(*args, **kwargs)
    return original(**call)


def _with_record(call: dict[str, Any]) -> dict[str, Any] | None:
    """The call with the record, and with the markers of the file that the model came from; None for a model
    that is not sampled by a record."""
    schedule = getattr(call["model"].get_model_object("model_sampling"), "sdxl_fixes", None)
    if schedule is None:
        return None
    metadata = {**(call.get("metadata") or {}), RECORD_KEY: schedule.record}
    if schedule.modelspec is not None:
        metadata["modelspec.prediction_type"] = schedule.modelspec
    if "modelspec.predict_key" in metadata:
        is_v = schedule.prediction_type == "v_prediction"
        metadata["modelspec.predict_key"] = "v" if is_v else schedule.prediction_type
    extra = {name: value for name, value in (call.get("extra_keys") or {}).items() if name not in MARKERS}
    extra |= {name: torch.tensor([]) for name in schedule.markers}
    return {**call, "metadata": metadata, "extra_keys": extra}


_wrap("load_checkpoint_guess_config", load)
_wrap("load_diffusion_model", load)
_wrap("save_checkpoint", save)


class ScheduleFromFile:
    """The same by hand: the schedule of any stamped file (of a LoRA that changed it, say) for any model."""

    FOLDERS = ("checkpoints", "diffusion_models", "loras")
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "patch", "advanced/model"
    DESCRIPTION = (
        "Samples the model by the schedule record in a .safetensors file (sdxl-fixes stamp writes it)."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        files = [
            f"{folder}/{name}" for folder in cls.FOLDERS for name in folder_paths.get_filename_list(folder)
        ]
        return {
            "required": {
                "model": ("MODEL",),
                "file": ([name for name in files if name.endswith(".safetensors")],),
            }
        }

    def patch(self, model: Any, file: str) -> tuple[Any]:
        """A clone of the model that follows the file's record."""
        folder, _, name = file.partition("/")
        path = folder_paths.get_full_path_or_raise(folder, name)
        try:
            schedule = read_schedule(path)
            sampling = schedule and make_sampling(schedule, model.model.model_config)
        except Exception as error:
            raise ValueError(f"{printable(file)}: {why(error)}") from error
        if sampling is None:
            raise ValueError(f"{printable(file)} has no schedule record: write one with sdxl-fixes stamp")
        patched = model.clone()
        patched.add_object_patch("model_sampling", sampling)
        return (patched,)


NODE_CLASS_MAPPINGS = {"SDXLFixesScheduleFromFile": ScheduleFromFile}
NODE_DISPLAY_NAME_MAPPINGS = {"SDXLFixesScheduleFromFile": "Schedule from file (sdxl-fixes)"}
