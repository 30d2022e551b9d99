"""What each UI will make of a file, as data: what it takes the model to predict, on which schedule, up to
which sigma.

Read from the UIs' own code, of the version in each row; the cases that a row names as run are tests against
that code (tests/uis).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sdxl_fixes.checkpoint import MODELSPEC, STAND_IN_SIGMA, UNET, Sampling, flow_shift
from sdxl_fixes.errors import printable
from sdxl_fixes.model_files.model_file import (
    SCHEDULER_CONFIG,
    ModelFile,
    beside,
    read_sampling,
    read_scheduler,
)
from sdxl_fixes.model_files.stamp import model_files
from sdxl_fixes.schedule import NoiseSchedule

# where ComfyUI, Forge, reForge and A1111 end zero terminal SNR: alphas_cumprod 4.897345e-08
ZERO_SNR_SIGMA = 4518.7636987
NODE, EXTENSION = (
    "install the node (sdxl-fixes comfyui install PATH)",
    ("install the extension (sdxl-fixes webui install PATH)"),
)

OTHER = "not known here: it is not of SDXL"


@dataclass(frozen=True)
class Verdict:
    """What one UI does. ``sampling`` None: it does not load the file, or nobody can say; ``right`` None: the
    truth is not known."""

    ui: str
    sampling: Sampling | None
    sigma_max: float | None
    right: bool | None
    missing: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "ui": self.ui,
            "prediction_type": self.sampling.prediction_type if self.sampling else None,
            "sigma_max": self.sigma_max,
            "right": self.right,
            "missing": self.missing,
        }


# what a UI takes a file for (None: it does not load it), and what would help where that is wrong
Reading = tuple[Sampling | None, str]
FolderReading = tuple[Sampling | None, str, bool]  # and whether it samples something else all the same


def verdicts(path: Path) -> tuple[ModelFile, Sampling | None, list[Verdict]]:
    """The file (of a folder: its U-Net's first), how it must be sampled if it says so, and one verdict per
    UI. Raises ValueError or OSError as ModelFile.read."""
    if path.is_dir():
        folder = _Folder.read(path)
        truth = read_sampling(path)
        unknown = (None, OTHER, False) if folder.file.is_sdxl is False else None
        rows = [_verdict(ui, truth, *(unknown or UIS[ui].folder(folder))) for ui in UIS]
        return folder.file, truth, rows
    file = ModelFile.read(path)
    return file, file.sampling, [_verdict(ui, file.sampling, *_reading(ui, file)) for ui in UIS]


def _reading(ui: str, file: ModelFile) -> Reading:
    if file.is_sdxl is False:
        return None, OTHER
    if file.kind == "lora":
        return None, "the checkpoint that it is used with decides: no UI reads a schedule from a LoRA"
    return (None, "loads no single shard") if file.kind == "shard" else UIS[ui].file(file)


def _verdict(
    ui: str, truth: Sampling | None, sampling: Sampling | None, note: str, wrong: bool = False
) -> Verdict:
    """``wrong``: it does not sample what it takes the model for."""
    if sampling is None:
        return Verdict(ui, None, None, None, note)
    right = None if truth is None else _agree(sampling, truth) and not wrong
    return Verdict(ui, sampling, _sigma_max(UIS[ui], sampling), right, "" if right else note)


def _agree(sampling: Sampling, truth: Sampling) -> bool:
    """Two shifts of rectified flow are the same model, whose steps are spaced otherwise."""
    flows = all(
        s.prediction_type == "flow_prediction" and flow_shift(s.schedule) is not None
        for s in (sampling, truth)
    )
    return flows or sampling == truth


def _sigma_max(ui: UI, sampling: Sampling) -> float:
    """The sigma that sampling starts from, in the UI's own terms (1 for flow)."""
    if sampling.prediction_type == "flow_prediction":
        return 1.0
    return ui.zero_snr_sigma if sampling.zero_terminal else sampling.schedule.terminal_sigma


# ---------------------------------------------------------------- the UIs, one reader each


def _stock(v: bool, zero_snr: bool) -> Sampling:
    schedule = NoiseSchedule.sdxl()
    return Sampling(
        schedule.zero_terminal_snr() if zero_snr else schedule, "v_prediction" if v else "epsilon"
    )


def _comfy_markers(file: ModelFile, prefix: str) -> Reading:
    if file.marked("edm_mean", prefix) and file.marked("edm_std", prefix):
        return None, "takes it for Playground's EDM (edm_mean, edm_std)"
    if file.marked("edm_vpred.sigma_max", prefix):
        return None, (
            "takes it for CosXL's EDM v-prediction (edm_vpred.sigma_max) and tells the network "
            "another timestep"
        )
    v = file.marked("v_pred", prefix)
    return _stock(v, v and file.marked("ztsnr", prefix)), NODE if _needs_node(file) else "stamp the file"


def _needs_node(file: ModelFile) -> bool:
    """Whether no marker could help ComfyUI: any schedule but eps, v and v with zero terminal SNR, all on
    SDXL's betas."""
    stock = (_stock(False, False), _stock(True, False), _stock(True, True))
    return file.record is not None and file.record not in stock


def _comfy_checkpoint(file: ModelFile) -> Reading:
    return (_stock(False, False), NODE) if file.kind == "diffusers_unet" else _comfy_markers(file, "")


def _comfy_unet(file: ModelFile) -> Reading:
    if file.kind == "diffusers_unet":
        return _stock(False, False), NODE
    sampling, note = _comfy_markers(file, "" if file.kind == "bare_unet" else UNET)
    return sampling, NODE if file.kind == "checkpoint" and note == "stamp the file" else note


def _with_node(file: ModelFile) -> Reading:
    if file.record is not None:
        return file.record, ""
    return _comfy_checkpoint(file)[0], "stamp the file"


def _forge(file: ModelFile) -> Reading:
    if file.kind == "diffusers_unet":
        return None, "does not load a U-Net in diffusers' names"
    if file.marked("edm_mean") and file.marked("edm_std"):
        return None, "does not load it (edm_mean, edm_std)"
    marked = file.kind != "bare_unet"  # it puts a prefix before every bare name, the markers' included
    v = (marked and file.marked("v_pred") and not file.marked("edm_vpred.sigma_max")) or _yaml_says_v(file)
    return _stock(v, marked and file.marked("ztsnr")), EXTENSION if _needs_extension(
        file
    ) or not marked else "stamp the file"


def _extension(file: ModelFile) -> str:
    """What helps in reForge and A1111 where no marker does."""
    assert file.record is not None
    types = ("epsilon", "v_prediction")
    return (
        EXTENSION
        if file.record.prediction_type in types
        else ("in reForge: Advanced Model Sampling, by hand; in A1111: nothing")
    )


def _needs_extension(file: ModelFile) -> bool:
    """Whether no marker could help Forge, reForge and A1111: they also know epsilon with zero terminal
    SNR."""
    return _needs_node(file) and file.record != _stock(False, True)


def _reforge(file: ModelFile) -> Reading:
    if file.kind in ("diffusers_unet", "bare_unet"):
        return None, "loads whole checkpoints"
    if file.marked("edm_vpred.sigma_max") or file.marked("edm_mean"):
        return _comfy_markers(file, "")
    return _stock(file.marked("v_pred"), file.marked("ztsnr")), _extension(file) if _needs_extension(
        file
    ) else "stamp the file"


def _a1111_dev(file: ModelFile) -> Reading:
    if file.kind != "checkpoint":
        return None, "loads whole checkpoints"
    v = file.marked("v_pred") or _yaml_says_v(file)
    return _stock(v, file.marked("ztsnr")), _extension(file) if _needs_extension(file) else "stamp the file"


def _a1111_old(file: ModelFile) -> Reading:
    if file.kind != "checkpoint":
        return None, "loads whole checkpoints"
    by_yaml = file.record in (_stock(True, False), _stock(True, True))
    note = (
        "stamp --yaml"
        if by_yaml and not _yaml_says_v(file)
        else _extension(file)
        if _needs_extension(file)
        else ""
    )
    if file.record is not None and file.record.schedule == _stock(False, True).schedule:
        note = (
            note + "; " if note else ""
        ) + 'set "Noise schedule for sampling" to Zero Terminal SNR, or install the extension'
    return _stock(_yaml_says_v(file), False), note or "stamp the file"


WEBUI_TIMESTEPS = 1000  # which the web UIs' samplers count on, and so our extension


def _forge_extension(file: ModelFile) -> Reading:
    if file.record is None:
        return _forge(file)[0], "stamp the file"
    if file.kind not in ("checkpoint", "unet", "bare_unet") or file.record.prediction_type == "sample":
        return _forge(file)[0], "samples no x0 prediction"
    if len(file.record.schedule) != WEBUI_TIMESTEPS:
        return _forge(file)[0], f"knows tables of {WEBUI_TIMESTEPS} timesteps only"
    return file.record, ""


def _a1111_extension(file: ModelFile) -> Reading:
    if file.record is not None and len(file.record.schedule) != WEBUI_TIMESTEPS:
        return _a1111_dev(file)[0], f"knows tables of {WEBUI_TIMESTEPS} timesteps only"
    if (
        file.record is None
        or file.kind != "checkpoint"
        or file.record.prediction_type not in ("epsilon", "v_prediction")
    ):
        return _a1111_dev(file)[0], "stamp the file" if file.record is None else (
            "in reForge: Advanced Model Sampling, by hand"
        )
    return file.record, ""


def _sd_next(file: ModelFile) -> Reading:
    if file.kind != "checkpoint":
        return None, "use it as a U-Net of another checkpoint, whose schedule rules"
    name = file.path.stem.lower()
    if "bigaspv25" in name or "noobai-rf" in name or ("flow" in name and "flower" not in name):
        return Sampling(NoiseSchedule.flow(2.5), "flow_prediction"), (
            "its file name says flow to SD.Next, at shift 2.5: rename it"
        )
    note = "use a diffusers folder with its scheduler_config.json and the sampler Default"
    if any(word in name for word in ("vpred", "v-pred", "v_pred")):
        return _stock(True, True), f"its file name says zero terminal SNR to SD.Next: rename it, or {note}"
    v = file.marked("v_pred")
    return _stock(v, v and file.marked("ztsnr")), note


def _invokeai(file: ModelFile) -> Reading:
    if file.kind != "checkpoint":
        return None, "loads checkpoints and diffusers folders"
    note = "use a diffusers folder, stamped"
    if file.record == _stock(True, False):
        note = "choose v-prediction in the model manager"
    elif file.record is not None and file.record.prediction_type not in ("epsilon", "v_prediction"):
        note = "samples epsilon and v-prediction only"
    return _stock(False, False), note


def _diffusers(file: ModelFile) -> Reading:
    if file.kind not in ("checkpoint", "diffusers_unet"):
        return None, "loads checkpoints and diffusers folders"
    name = printable(beside(file.path, "." + SCHEDULER_CONFIG).name)
    return _stock(False, False), (
        f"from_single_file reads no schedule: load {name} into the pipeline's "
        "scheduler, or use a folder, stamped"
    )


def _swarm(file: ModelFile) -> Reading:
    metadata = file.header.metadata
    says = metadata.get("modelspec.prediction_type", "").strip() or metadata.get("prediction_type", "")
    if says in MODELSPEC:
        predicts, zero_snr = MODELSPEC[says]
        return Sampling(_stock(False, zero_snr).schedule, predicts), "stamp the file"
    if says == "sd3":
        return Sampling(NoiseSchedule.flow(_shift(file)), "flow_prediction"), "stamp the file"
    return _comfy_checkpoint(file)


def _shift(file: ModelFile) -> float:
    """SwarmUI's Sigma Shift is the user's (3 by default) and only spaces the steps: any one samples a flow
    model."""
    shift = (
        flow_shift(file.record.schedule)
        if file.record and file.record.prediction_type == "flow_prediction"
        else None
    )
    return 3.0 if shift is None else shift


def _forge_neo(file: ModelFile) -> Reading:
    if "rectified" in str(file.path.resolve()).lower():
        return Sampling(NoiseSchedule.flow(), "flow_prediction"), (
            f"its path says rectified flow to Forge Neo: rename it, or {EXTENSION}"
        )
    return _forge(file)


def _neo_extension(file: ModelFile) -> Reading:
    if file.record is None:
        return _forge_neo(file)
    return _forge_extension(file)


def _yaml_says_v(file: ModelFile) -> bool:
    """Whether the YAML beside the file (sgm's config) gives the denoiser v-prediction's scaling."""
    path = beside(file.path, ".yaml")
    try:
        said = yaml.safe_load(path.read_bytes()) if path.is_file() else {}
        for key in ("model", "params", "denoiser_config", "params", "scaling_config", "target"):
            said = said[key]
    except (yaml.YAMLError, KeyError, TypeError):
        return False
    return str(said).endswith("denoiser_scaling.VScaling")


# ---------------------------------------------------------------- diffusers folders


@dataclass(frozen=True)
class _Folder:
    """A diffusers folder: its U-Net's first file, what its scheduler config says, and what overrules that."""

    path: Path
    file: ModelFile
    says: Sampling | None
    overruled: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> _Folder:
        says, overruled = read_scheduler(path)
        return cls(path, ModelFile.read(model_files(path)[0]), says, tuple(overruled))


def _no_folder(folder: _Folder) -> FolderReading:
    return None, "loads no diffusers folder", False


def _comfy_folder(folder: _Folder) -> FolderReading:
    return _stock(False, False), NODE, False


def _node_folder(folder: _Folder) -> FolderReading:
    return folder.file.record, "stamp the folder", False


def _config_folder(folder: _Folder) -> FolderReading:
    if not folder.overruled:
        return folder.says, "stamp the folder", False
    return folder.says, f"{'; '.join(folder.overruled)}: sdxl-fixes stamp {folder.path}", True


def _invokeai_folder(folder: _Folder) -> FolderReading:
    known = folder.says is None or folder.says.prediction_type in ("epsilon", "v_prediction")
    return _config_folder(folder) if known else (None, "takes epsilon and v-prediction only", False)


# ---------------------------------------------------------------- the table


# the cases of docs/loading.md
CASES = ("eps 14.6", "v", "v + ZTSNR", "eps + ZTSNR", "eps 300", "any betas", "flow")


@dataclass(frozen=True)
class UI:
    """A UI: what it makes of a file, what of a diffusers folder, and at which sigma it ends zero terminal
    SNR. ``code`` is the version of its code where that was read; of CASES, a test runs ``ran`` (files) and
    ``ran_folder`` on that code."""

    code: str
    file: Callable[[ModelFile], Reading]
    folder: Callable[[_Folder], FolderReading] = _no_folder
    zero_snr_sigma: float = ZERO_SNR_SIGMA
    ran: tuple[str, ...] = ()
    ran_folder: tuple[str, ...] = ()


_COMFYUI, _FORGE, _REFORGE = "ComfyUI 0.33.0 and 0.3.64", "Forge dfdcbab6", "reForge 3b56b268"
_A1111, _NEO, _SWARM = "A1111 as of 2025", "Forge Neo 2.26", "SwarmUI 062407c7"
_SD_NEXT, _INVOKEAI, _STOCK = "SD.Next 058a7f0c", "InvokeAI 8e71a8a5 (6.14)", "diffusers 0.42"

UIS = {
    "ComfyUI, Load Checkpoint": UI(_COMFYUI, _comfy_checkpoint, _comfy_folder, ran=CASES),
    "ComfyUI, Load Diffusion Model": UI(_COMFYUI, _comfy_unet, _comfy_folder, ran=CASES),
    "ComfyUI with our node": UI(_COMFYUI, _with_node, _node_folder, ran=CASES),
    "Forge": UI(_FORGE, _forge),
    "reForge": UI(_REFORGE, _reforge),
    "A1111, dev branch": UI(_A1111, _a1111_dev),
    "A1111 up to 1.10": UI(_A1111, _a1111_old),
    "Forge with our extension": UI(_FORGE, _forge_extension, ran=CASES),
    "reForge or A1111 with our extension": UI(_REFORGE, _a1111_extension, ran=CASES),
    "Forge Neo": UI(_NEO, _forge_neo),
    "Forge Neo with our extension": UI(_NEO, _neo_extension, ran=CASES),
    "SwarmUI": UI(_SWARM, _swarm),
    "SD.Next": UI(_SD_NEXT, _sd_next, _config_folder, STAND_IN_SIGMA, ran=CASES, ran_folder=CASES),
    "InvokeAI": UI(_INVOKEAI, _invokeai, _invokeai_folder, STAND_IN_SIGMA, ran=CASES, ran_folder=CASES),
    "diffusers": UI(_STOCK, _diffusers, _config_folder, STAND_IN_SIGMA, ran_folder=CASES),
}


def as_json(file: ModelFile, truth: Sampling | None, rows: list[Verdict]) -> str:
    """Strict JSON."""
    content = {
        "file": str(file.path),
        "kind": file.kind,
        "model": file.contents.model,
        "sdxl": file.is_sdxl,
        "room": file.header.size - len(file.header.raw.rstrip()),
        "says": file.said(),
        "prediction_type": truth.prediction_type if truth else None,
        "terminal_sigma": truth.schedule.to_record()["terminal_sigma"] if truth else None,
        "uis": [row.to_dict() for row in rows],
    }
    return json.dumps(content, indent=2, allow_nan=False)
