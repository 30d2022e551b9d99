"""Write into a file how to sample it: the record, the markers that tell the truth, and beside it a scheduler
config."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sdxl_fixes.atomic import real, replacing
from sdxl_fixes.checkpoint import (
    Sampling,
    markers,
    metadata,
    read_json,
    stock_config,
)
from sdxl_fixes.errors import about
from sdxl_fixes.model_files.header import ROOM_KEY, Header, encode_header
from sdxl_fixes.model_files.model_file import SCHEDULER_CONFIG, ModelFile, unet_files
from sdxl_fixes.model_files.write import check_output, check_writable, data_hash, longer, replace_header

MODEL_INDEX = "model_index.json"


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
    if output is None:
        check_writable(path)
    else:
        check_output(path, output)
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
    things stays. Of a pipeline's folder also its class, which model_index.json names. Returns "written",
    "unchanged", or why there is none."""
    with scheduler_config_ready(file, sampling) as said:
        return said


@contextmanager
def scheduler_config_ready(file: Path, sampling: Sampling) -> Iterator[str]:
    """The same in two steps: within the block it is written and synced beside its place, so that only a move
    can still fail, and it takes the place when the block ends. Raises ValueError or OSError, with nothing
    written, for what is no regular file, is read-only, or holds no JSON object."""
    if os.path.lexists(file) and not file.is_file() and real(file).exists():
        raise OSError(f"{file} is not a regular file: move it away")
    old = read_json(file) if file.is_file() else {}
    new = stock_config(sampling, old)
    if new is None or new == old:
        yield "unchanged" if new else "not written: no stock diffusers scheduler samples that"
        if new:
            _name_class(file, new["_class_name"])
        return
    if old:
        check_writable(file)
    try:
        text = json.dumps(new, indent=2, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} holds what is no strict JSON ({error}): move it away") from error
    with replacing(file) as part:
        with about(file), open(part, "w", encoding="utf-8") as out:
            out.write(text + "\n")
            out.flush()
            os.fsync(out.fileno())
        yield "written"
    _name_class(file, new["_class_name"])


def _name_class(config: Path, name: str) -> None:
    """The scheduler's class in the model_index.json of the pipeline whose scheduler's config that is:
    diffusers makes that one, whatever the config says."""
    index = config.parent.parent / MODEL_INDEX
    if config.parts[-2:] != ("scheduler", SCHEDULER_CONFIG) or not index.is_file():
        return
    content = read_json(index)
    if not isinstance(content.get("scheduler"), list) or content["scheduler"] == ["diffusers", name]:
        return
    with replacing(index) as part:
        part.write_text(json.dumps(content | {"scheduler": ["diffusers", name]}, indent=2) + "\n", "utf-8")


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
