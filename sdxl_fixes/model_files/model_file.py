"""What a .safetensors file says about its schedule."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sdxl_fixes.atomic import companion
from sdxl_fixes.checkpoint import (
    MARKERS,
    MODELSPEC,
    UNET,
    Sampling,
    overruled,
    read_json,
    read_record,
    said_of_file,
    sampling_of_config,
    sampling_of_file,
    sampling_of_json,
)
from sdxl_fixes.errors import about, quoted
from sdxl_fixes.model_files.header import FormatError, Header, Tensor, read_header
from sdxl_fixes.model_files.kinds import KINDS, Contents, contents
from sdxl_fixes.model_files.write import recover

SCHEDULER_CONFIG = "scheduler_config.json"
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
# ComfyUI's markers of models that are told another timestep (0.25 log sigma): wrong in any model with a noise
# schedule
EDM_MARKERS = ("edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")


def read_sampling(path: Path, predicts: str | None = None) -> Sampling | None:
    """How a model file, a diffusers folder, a scheduler_config.json or a schedule record (.json) says that it
    is sampled; None where nothing is said, as :func:`read_said`."""
    said = read_said(path, predicts)
    return None if said is None else said[0]


def read_said(path: Path, predicts: str | None = None) -> tuple[Sampling, str] | None:
    """The same, and by what it is said, for people.

    A file is believed by its record, else by its marker tensors, else by the metadata of modelspec and kohya
    (ss_), else by the scheduler config beside it (a pickle by that alone); a folder by the record in its
    U-Net, else by its scheduler config. ``predicts`` is for a JSON record that tells a schedule alone. Only
    headers are read, and nothing is written. Raises OSError or FormatError for what cannot be read,
    ValueError, in one sentence that names the file, for what is there but broken.
    """
    if path.is_dir():
        files, config = unet_files(path), read_scheduler(path)[0]
        by_file = next(filter(None, map(_said_by, files)), None)
        return by_file or (None if config is None else (config, "its scheduler config"))
    config_file = beside(path, "." + SCHEDULER_CONFIG)
    if config_file.is_file() and path.suffix != ".json":
        said = None if is_pickle(path) else _said_by(path)
        return said or (_of_json(config_file), f"{config_file.name} beside it")
    _check_readable(path, "a .safetensors file, a folder, or a .json that tells a schedule")
    return (_of_json(path, predicts), "it") if path.suffix == ".json" else _said_by(path)


def is_pickle(path: Path) -> bool:
    """Whether a file is one that is never opened here, by its name."""
    return path.suffix.lower() in PICKLES


def beside(path: Path, suffix: str) -> Path:
    """The companion of a file: model.safetensors -> model.scheduler_config.json, model.yaml."""
    known = is_pickle(path) or path.suffix == ".safetensors"
    return companion(path, suffix, path.stem if known else path.name)


def _of_json(path: Path, predicts: str | None = None) -> Sampling:
    content = read_json(path)
    with _named(path):
        return sampling_of_json(content, predicts)


def _said_by(path: Path) -> tuple[Sampling, str] | None:
    header = read_header(path)
    with _named(path):
        return said_of_file(header.metadata, header.tensors)


def read_scheduler(folder: Path) -> tuple[Sampling | None, list[str]]:
    """What the scheduler config of a diffusers folder says, and what in it overrules that in diffusers (see
    :func:`sdxl_fixes.checkpoint.overruled`). Raises ValueError, naming it, for a broken one."""
    file = next((file for file in _scheduler_configs(folder) if file.is_file()), None)
    if file is None:
        return None, []
    config = read_json(file)
    with _named(file):
        return sampling_of_config(config), overruled(config)


def _scheduler_configs(folder: Path) -> tuple[Path, Path]:
    """Where it may lie: also in ``folder`` itself, which is then the pipeline's scheduler folder."""
    return folder / "scheduler" / SCHEDULER_CONFIG, folder / SCHEDULER_CONFIG


def unet_files(folder: Path) -> list[Path]:
    """The files of a diffusers folder, or of a folder that holds one sharded model, that carry a record; none
    in any other folder."""
    unet = folder / "unet" if (folder / "unet").is_dir() else folder
    single = (unet / "config.json").is_file() or any(unet.glob("*.safetensors.index.json"))
    return sorted(unet.glob("*.safetensors")) if single or unet != folder else []


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors that name the file."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _check_readable(path: Path, expected: str = "a .safetensors file or a folder") -> None:
    if is_pickle(path):
        raise FormatError(f"{path} is a pickle, which is never opened here: convert it to safetensors first")
    if path.is_symlink() and not os.path.exists(path):
        raise FileNotFoundError(f"{path} is a symbolic link to {os.readlink(path)}, which leads to no file")
    if not os.path.exists(path):
        raise FileNotFoundError(f"there is no {path}: give {expected}")
    if not path.is_file():
        raise OSError(f"{path} is not a regular file: give {expected}")


@dataclass(frozen=True)
class ModelFile:
    """A checked header, what the file holds, and its schedule record. ``mended`` tells what an interrupted
    stamp had left behind, ``broken`` what is wrong with a record that :meth:`read` was told to overrule."""

    path: Path
    header: Header
    contents: Contents
    record: Sampling | None
    mended: str | None = None
    broken: str | None = None

    @classmethod
    def read(cls, path: Path, overrule: bool = False) -> ModelFile:
        """Read ``path`` (its header only). Raises ValueError or OSError, in one sentence, for what is no
        model of SDXL's kind, and for a broken record, unless it is to be overruled: then the file has
        none."""
        _check_readable(path)
        with about(path):
            mended = recover(path)
        header = read_header(path)
        record, broken = None, None
        try:
            record = read_record(header.metadata)
        except ValueError as error:
            if not overrule:
                raise ValueError(f"{path}: {error}") from error
            broken = str(error)
        return cls(path, header, contents(path, header), record, mended, broken)

    @property
    def sampling(self) -> Sampling | None:
        """How the file itself says that it is sampled, as :func:`read_sampling` but for what is beside it."""
        return sampling_of_file(self.header.metadata, self.header.tensors)

    @property
    def kind(self) -> str:
        """A key of KINDS."""
        return self.contents.kind

    @property
    def is_sdxl(self) -> bool | None:
        """Whether it is SDXL's U-Net, or a network for it; None where that cannot be seen."""
        return self.contents.sdxl

    @property
    def marker_prefixes(self) -> tuple[str, ...]:
        """Where the markers of this kind of file belong."""
        return KINDS[self.kind][1]

    def marked(self, name: str, prefix: str = "") -> bool:
        """Whether the marker tensor is there."""
        return prefix + name in self.header.tensors

    def said(self) -> dict[str, str]:
        """Everything in the file that says something about its schedule: where -> what."""
        found: dict[str, str] = {"the record": str(self.record)} if self.record else {}
        for name in (*MARKERS, *EDM_MARKERS):
            found |= {f"the marker {prefix + name}": "" for prefix in ("", UNET) if self.marked(name, prefix)}
        names = ("modelspec.prediction_type", "modelspec.predict_key", "ss_zero_terminal_snr")
        return found | {
            f"the metadata {name}": quoted(self.header.metadata[name])
            for name in names
            if name in self.header.metadata
        }

    def contradictions(self, sampling: Sampling) -> list[str]:
        """What the file says that is not so for ``sampling``, each as half a sentence."""
        v, zero_snr = sampling.prediction_type == "v_prediction", sampling.zero_terminal
        found = []
        if self.broken is not None:
            found.append("its record was broken")
        if self.record is not None and self.record != sampling:
            found.append(f"its record says {self.record}")
        for prefix in ("", UNET):
            if self.marked("v_pred", prefix) and not v:
                found.append(f"its marker {prefix}v_pred says v_prediction")
            if self.marked("ztsnr", prefix) and not zero_snr:
                found.append(f"its marker {prefix}ztsnr says zero terminal SNR")
            found += [
                f"its marker {prefix + name} says an EDM model"
                for name in EDM_MARKERS
                if self.marked(name, prefix)
            ]
        says = self.header.metadata.get("modelspec.prediction_type")
        told = {**MODELSPEC, "sd3": ("flow_prediction", False)}.get(says or "")
        if told is not None and (told[0] != sampling.prediction_type or (told[1] and not zero_snr)):
            found.append(f"its modelspec.prediction_type says {quoted(str(says))}")
        says = self.header.metadata.get("ss_zero_terminal_snr")
        if says in ("True", "False") and (says == "True") != zero_snr:
            found.append(f"its ss_zero_terminal_snr says {says}")
        return found

    def lost(self) -> str | None:
        """Half a sentence if the file was written by a tool that merges or extracts, and that wrote no word
        of how its sources were trained (kohya's write epsilon whatever they merge); None otherwise."""
        metadata = self.header.metadata
        if self.sampling is not None or metadata.get("modelspec.prediction_type") == "sd3":
            return None
        for key in ("modelspec.merged_from", "sd_merge_models", "sd_merge_recipe"):
            if metadata.get(key):
                return f"it is a merge ({key}: {quoted(metadata[key])})"
        trained = ("ss_steps", "ss_learning_rate", "ss_num_train_images", "ss_max_train_steps")
        if "ss_network_module" in metadata and not any(key in metadata for key in trained):
            return "a tool that merges or extracts wrote it (ss_network_module, and nothing of a training)"
        base = metadata.get("ss_sd_model_name", "")
        if re.search(r"v[-_ ]?pred|ztsnr|zsnr|[-_ ]rf\b|rectified", base, re.IGNORECASE):
            return f"its ss_sd_model_name is {quoted(base)}"
        return None

    def with_markers(self, wanted: tuple[str, ...]) -> dict[str, Tensor]:
        """The file's entries with exactly the markers ``wanted``. A marker that holds bytes cannot go without
        moving the others': it is renamed, and means nothing any more."""
        end = max((tensor.end for tensor in self.header.tensors.values()), default=0)
        entries: dict[str, Tensor] = {
            prefix + name: Tensor("F32", (0,), end, end) for prefix in self.marker_prefixes for name in wanted
        }
        known = {prefix + name for prefix in ("", UNET) for name in (*MARKERS, *EDM_MARKERS)}
        for name, tensor in self.header.tensors.items():
            if name in entries:
                entries[name] = tensor
            elif name not in known:
                entries[name] = tensor
            elif tensor.begin != tensor.end:
                entries[f"sdxl_fixes.removed.{name}"] = tensor
        return entries
