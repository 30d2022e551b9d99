"""Write into a file how to sample it: the record, the markers that tell the truth, and beside it a scheduler
config."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdxl_fixes.atomic import replacing
from sdxl_fixes.checkpoint import (
    Sampling,
    flow_shift,
    markers,
    metadata,
    read_json,
    sampling_of_config,
    scheduler_config,
)
from sdxl_fixes.model_files.header import ROOM_KEY, Header, encode_header
from sdxl_fixes.model_files.model_file import KINDS, ModelFile
from sdxl_fixes.model_files.write import data_hash, longer, replace_header
from sdxl_fixes.schedule import EXACT_KEY

SCHEDULER_CONFIG = "scheduler_config.json"
# what SDXL's own scheduler_config.json says beside the schedule
_EULER = {
    "_class_name": "EulerDiscreteScheduler",
    "steps_offset": 1,
    "interpolation_type": "linear",
    "use_karras_sigmas": False,
}


# any of these may stay
_FOLLOW = ("DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")


@dataclass(frozen=True)
class Stamped:
    """What was done to one file: the way it was written ("unchanged" if it said so already), and the markers
    it now has."""

    path: Path
    kind: str
    way: str
    markers: tuple[str, ...]
    notes: tuple[str, ...] = ()


def stamp_file(
    path: Path,
    sampling: Sampling,
    *,
    force: bool = False,
    in_place: bool = False,
    output: Path | None = None,
    check: bool = False,
    dry_run: bool = False,
) -> Stamped:
    """Stamp one file. Raises ValueError, with the file untouched, if it says something else, or its record is
    broken, and ``force`` is not given."""
    file = ModelFile.read(path, overrule=force)
    if file.is_sdxl is False and not force:
        raise ValueError(
            f"{path} is a {KINDS[file.kind][0]}, but not of SDXL, and the markers would mean something "
            "else there: "
            "--force writes the record alone"
        )
    found = file.contradictions(sampling)
    if found and not force:
        raise ValueError(
            f"{path}: {'; '.join(found)}; the stamp would say {sampling}: give --force if the stamp is right"
        )
    notes = [*([file.mended] if file.mended else []), *(f"overruled: {what}" for what in found)]
    wanted = markers(sampling.schedule, sampling.prediction_type) if file.is_sdxl else ()
    if file.kind == "lora" and markers(sampling.schedule, sampling.prediction_type):
        notes.append("a LoRA gets no markers: the checkpoint it is used with decides, so stamp that too")
    entries = _metadata(file.header, sampling)
    tensors = file.with_markers(wanted) if file.is_sdxl else dict(file.header.tensors)
    placed = tuple(prefix + name for prefix in file.marker_prefixes for name in wanted)
    had = {key: value for key, value in file.header.metadata.items() if key != ROOM_KEY}
    if entries == had and tensors == file.header.tensors and output is None:
        return Stamped(path, file.kind, "unchanged", placed, tuple(notes))
    if dry_run:
        return Stamped(path, file.kind, "not written (--dry_run)", placed, tuple(notes))
    before = data_hash(path) if check else None
    text_size = len(encode_header(entries, tensors).rstrip())
    way = replace_header(
        path, file.header, encode_header(entries, tensors, longer(file.header, text_size)), in_place, output
    )
    if before is not None and before != data_hash(output or path):
        raise OSError(
            f"{output or path}: the tensors' bytes are not what they were before the stamp: do "
            "not trust this disk"
        )
    return Stamped(
        output or path,
        file.kind,
        way,
        placed,
        (*notes, *([f"tensor bytes unchanged, SHA-256 {before}"] if before else [])),
    )


def model_files(folder: Path) -> list[Path]:
    """The files of a diffusers folder (or of a folder that holds one sharded model) that carry a record.
    Raises ValueError for a folder that is neither."""
    unet = folder / "unet" if (folder / "unet").is_dir() else folder
    found = sorted(unet.glob("*.safetensors"))
    single = (unet / "config.json").is_file() or any(unet.glob("*.safetensors.index.json"))
    if not found or not (single or unet != folder):
        raise ValueError(
            f"{folder} is neither a diffusers folder nor a sharded model: give one "
            ".safetensors file at a time"
        )
    return found


def write_scheduler_config(file: Path, sampling: Sampling) -> str:
    """A scheduler_config.json that stock diffusers reads; keys of an existing one that are not about the
    schedule stay. Returns "written", "unchanged", or why there is none."""
    new = stock_config(sampling)
    if new is None:
        return "not written: no stock diffusers scheduler samples that"
    old = read_json(file) if file.is_file() else {}
    if new["_class_name"] == _EULER["_class_name"] and old.get("_class_name") in _FOLLOW:
        new["_class_name"] = old["_class_name"]
    content = {**{key: value for key, value in old.items() if key != EXACT_KEY}, **new}
    if content == old:
        return "unchanged"
    with replacing(file) as part:
        part.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return "written"


def stock_config(sampling: Sampling) -> dict[str, Any] | None:
    """The whole config, with a stock class that follows it; None where diffusers has none."""
    if sampling.prediction_type != "flow_prediction":
        return {**_EULER, **scheduler_config(sampling.schedule, sampling.prediction_type)}
    shift = flow_shift(sampling.schedule)
    if shift is None:
        return None
    return {
        "_class_name": "UniPCMultistepScheduler",
        "num_train_timesteps": len(sampling.schedule),
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": shift,
        "timestep_spacing": "trailing",
    }


def sampling_from_config(config: dict[str, Any], name: str) -> Sampling:
    """What the scheduler_config.json ``name`` says. Raises ValueError, naming it, for one that describes no
    noise schedule."""
    try:
        return sampling_of_config(config)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def a1111_yaml(sampling: Sampling) -> str:
    """A complete sgm config of SDXL with v-prediction, for A1111 up to 1.10, as JSON (which YAML includes).
    Raises ValueError where it would not help: it can say v-prediction and nothing else."""
    if markers(sampling.schedule, sampling.prediction_type)[:1] != ("v_pred",):
        raise ValueError(
            f"a YAML can tell A1111 only v-prediction on SDXL's own betas, not {sampling}: leave --yaml out"
        )
    return (
        json.dumps({"model": {"target": "sgm.models.diffusion.DiffusionEngine", "params": _sgm()}}, indent=1)
        + "\n"
    )


def _metadata(old: Header, sampling: Sampling) -> dict[str, str]:
    # its bytes become padding
    entries = {key: value for key, value in old.metadata.items() if key != ROOM_KEY}
    if not old.metadata:
        entries["format"] = "pt"  # transformers refuses metadata without it
    for key, value in metadata(sampling.schedule, sampling.prediction_type).items():
        if value is None:
            entries.pop(key, None)
        else:
            entries[key] = value
    if "ss_zero_terminal_snr" in entries:  # kohya's own word for it
        zero_snr = sampling.schedule.residual_signal == 0 and sampling.prediction_type != "flow_prediction"
        entries["ss_zero_terminal_snr"] = str(zero_snr)
    return entries


def _sgm() -> dict[str, Any]:
    """SDXL's architecture in the words of sgm, the library that A1111 builds it with."""
    modules = "sgm.modules"
    diffusion, encoders = f"{modules}.diffusionmodules", f"{modules}.encoders.modules"
    sizes = [
        {
            "is_trainable": False,
            "input_key": key,
            "target": f"{encoders}.ConcatTimestepEmbedderND",
            "params": {"outdim": 256},
        }
        for key in ("original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple")
    ]
    clip_l = {"layer": "hidden", "layer_idx": 11}
    clip_g = {"arch": "ViT-bigG-14", "version": "laion2b_s39b_b160k", "freeze": True, "layer": "penultimate"}
    clip_g |= {"always_return_pooled": True, "legacy": False}
    texts: list[dict[str, Any]] = [
        {"is_trainable": False, "input_key": "txt", "target": f"{encoders}.{name}", "params": params}
        for name, params in (("FrozenCLIPEmbedder", clip_l), ("FrozenOpenCLIPEmbedder2", clip_g))
    ]
    unet = {
        "adm_in_channels": 2816,
        "num_classes": "sequential",
        "use_checkpoint": False,
        "in_channels": 4,
        "out_channels": 4,
    }
    unet |= {
        "model_channels": 320,
        "attention_resolutions": [4, 2],
        "num_res_blocks": 2,
        "channel_mult": [1, 2, 4],
    }
    unet |= {
        "num_head_channels": 64,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": True,
        "transformer_depth": [1, 2, 10],
    }
    unet |= {"context_dim": 2048, "spatial_transformer_attn_type": "softmax-xformers", "legacy": False}
    vae = {
        "attn_type": "vanilla-xformers",
        "double_z": True,
        "z_channels": 4,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
    }
    vae |= {"ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0}
    autoencoder = {
        "embed_dim": 4,
        "monitor": "val/rec_loss",
        "ddconfig": vae,
        "lossconfig": {"target": "torch.nn.Identity"},
    }
    denoiser = {
        "num_idx": 1000,
        "weighting_config": {"target": f"{diffusion}.denoiser_weighting.VWeighting"},
        "scaling_config": {"target": f"{diffusion}.denoiser_scaling.VScaling"},
        "discretization_config": {"target": f"{diffusion}.discretizer.LegacyDDPMDiscretization"},
    }
    return {
        "scale_factor": 0.13025,
        "disable_first_stage_autocast": True,
        "denoiser_config": {"target": f"{diffusion}.denoiser.DiscreteDenoiser", "params": denoiser},
        "network_config": {"target": f"{diffusion}.openaimodel.UNetModel", "params": unet},
        "conditioner_config": {
            "target": f"{modules}.GeneralConditioner",
            "params": {"emb_models": [*texts, *sizes]},
        },
        "first_stage_config": {
            "target": "sgm.models.autoencoder.AutoencoderKLInferenceWrapper",
            "params": autoencoder,
        },
    }


def beside(path: Path, suffix: str) -> Path:
    """The companion of a file: model.safetensors -> model.scheduler_config.json, model.yaml."""
    return path.with_name(path.name.removesuffix(".safetensors") + suffix)
