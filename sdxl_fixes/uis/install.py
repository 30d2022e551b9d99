"""Put the node or the extension into a UI, and take it out again."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from sdxl_fixes.version import __version__

FOLDER = "sdxl_fixes_schedule"
STAMP = "installed-by-sdxl-fixes.txt"  # what we may replace or remove


@dataclass(frozen=True)
class Target:
    """A UI: how its folder is known, where additions go, and the files, ours -> theirs."""

    name: str
    known_by: str
    room: str
    files: dict[str, str]


TARGETS = {
    "comfyui": Target(
        "ComfyUI",
        "comfy/model_sampling.py",
        "custom_nodes",
        {"uis/nodes/comfyui/__init__.py": "__init__.py", "uis/nodes/schedule_file.py": "schedule_file.py"},
    ),
    "webui": Target(
        "Forge, reForge or AUTOMATIC1111",
        "modules/script_callbacks.py",
        "extensions",
        {
            "uis/nodes/webui/scripts/sdxl_fixes_schedule.py": "scripts/sdxl_fixes_schedule.py",
            "uis/nodes/schedule_file.py": "sdxl_fixes_schedule_file.py",
        },
    ),
}


def install(target: Target, path: Path) -> str:
    """Copy the files; an older installation is replaced. Returns a sentence. Raises OSError, with nothing
    changed, if that is not the UI's folder or another package has the name."""
    folder = _folder(target, path)
    part = folder.with_name(f".{FOLDER}.part")  # ComfyUI and the web UIs skip hidden folders
    shutil.rmtree(part, ignore_errors=True)
    try:
        for ours, theirs in target.files.items():
            (part / theirs).parent.mkdir(parents=True, exist_ok=True)
            (part / theirs).write_bytes(resources.files("sdxl_fixes").joinpath(ours).read_bytes())
        (part / STAMP).write_text(f"sdxl-fixes {__version__}\n", encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return f"installed in {folder}; restart {target.name}"


def remove(target: Target, path: Path) -> str:
    """Delete what install copied; returns a sentence."""
    folder = _folder(target, path)
    if not folder.exists():
        return "it was not installed"
    shutil.rmtree(folder)
    return f"removed {folder}; restart {target.name}"


def status(target: Target, path: Path) -> str:
    """Whether it is installed, and whether it is this version's."""
    folder = _folder(target, path)
    if not folder.exists():
        return "not installed"
    same = all(
        (folder / theirs).is_file()
        and (folder / theirs).read_bytes() == resources.files("sdxl_fixes").joinpath(ours).read_bytes()
        for ours, theirs in target.files.items()
    )
    return f"installed in {folder}" + ("" if same else ", but not as this version has it: install again")


def _folder(target: Target, path: Path) -> Path:
    if not (path / target.known_by).is_file():
        raise OSError(f"{path} is not the folder of {target.name}: expected one that holds {target.known_by}")
    folder = path / target.room / FOLDER
    if folder.exists() and not (folder / STAMP).is_file():
        raise OSError(f"{folder} exists and is not ours: move it away first")
    return folder
