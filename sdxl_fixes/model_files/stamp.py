"""Write into a file how to sample it: the record, the markers that tell the truth, and beside it a scheduler
config."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sdxl_fixes.atomic import replacing
from sdxl_fixes.checkpoint import (
    Sampling,
    markers,
    metadata,
    read_json,
    stock_config,
)
from sdxl_fixes.model_files.header import ROOM_KEY, Header, encode_header
from sdxl_fixes.model_files.model_file import ModelFile, unet_files
from sdxl_fixes.model_files.write import data_hash, longer, replace_header


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
            f"{path} is not of SDXL, it is a {file.contents.what}, and the markers would mean something else "
            "there: "
            "--force writes the record alone"
        )
    found = file.contradictions(sampling)
    if found and not force:
        raise ValueError(
            f"{path}: {'; '.join(found)}; the stamp would say {sampling}: give --force if the stamp is right"
        )
    notes = [*([file.mended] if file.mended else []), *(f"overruled: {what}" for what in found)]
    markable = file.is_sdxl and file.kind != "lora"
    wanted = markers(sampling.schedule, sampling.prediction_type) if markable else ()
    if file.kind == "lora" and markers(sampling.schedule, sampling.prediction_type):
        notes.append("a LoRA gets no markers: the checkpoint it is used with decides, so stamp that too")
    entries = _metadata(file.header, sampling)
    tensors = file.with_markers(wanted) if markable else dict(file.header.tensors)
    placed = tuple(prefix + name for prefix in file.marker_prefixes for name in wanted)
    had = {key: value for key, value in file.header.metadata.items() if key != ROOM_KEY}
    if entries == had and tensors == file.header.tensors and output is None:
        return Stamped(path, file.kind, "unchanged", placed, tuple(notes))
    if dry_run:
        return Stamped(path, file.kind, "not written (--dry_run)", placed, tuple(notes))
    before = data_hash(path) if check else None
    text = encode_header(entries, tensors, partial(longer, file.header))
    way = replace_header(path, file.header, text, in_place, output)
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
    """The files of a folder that carry a record. Raises ValueError for a folder that is neither diffusers'
    nor one sharded model's."""
    if not (found := unet_files(folder)):
        raise ValueError(
            f"{folder} is neither a diffusers folder nor a sharded model: give one "
            ".safetensors file at a time"
        )
    return found


def write_scheduler_config(file: Path, sampling: Sampling) -> str:
    """A scheduler_config.json by which stock diffusers samples that; what an existing one says of other
    things stays. Returns "written", "unchanged", or why there is none."""
    old = read_json(file) if file.is_file() else {}
    new = stock_config(sampling, old)
    if new is None:
        return "not written: no stock diffusers scheduler samples that"
    if new == old:
        return "unchanged"
    with replacing(file) as part:
        part.write_text(json.dumps(new, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return "written"


def a1111_yaml(sampling: Sampling) -> str:
    """A complete sgm config of SDXL with v-prediction, for A1111 up to 1.10, as JSON (which YAML includes).
    Raises ValueError where it would not help: it can say v-prediction and nothing else."""
    if markers(sampling.schedule, sampling.prediction_type)[:1] != ("v_pred",):
        raise ValueError(
            f"a YAML can tell A1111 only v-prediction on SDXL's own betas, not {sampling}: leave --yaml out"
        )
    return (Path(__file__).parent / "sgm_v_prediction.json").read_text(encoding="utf-8")


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
        entries["ss_zero_terminal_snr"] = str(sampling.zero_terminal)
    return entries


def beside(path: Path, suffix: str) -> Path:
    """The companion of a file: model.safetensors -> model.scheduler_config.json, model.yaml."""
    return path.with_name(path.name.removesuffix(".safetensors") + suffix)
