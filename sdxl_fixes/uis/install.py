"""Put the node or the extension into a UI, and take it out again."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from sdxl_fixes.errors import printable
from sdxl_fixes.version import __version__

FOLDER = "sdxl_fixes_schedule"
STAMP = "installed-by-sdxl-fixes.txt"  # names what we may replace or remove


@dataclass(frozen=True)
class Target:
    """A UI: the file that its code is known by, the folder of the code in its portable packages, the folder
    for additions, what else lies beside that folder where it is kept apart from the code (any of these), and
    the files, ours -> theirs."""

    name: str
    known_by: str
    portable: str
    room: str
    beside: tuple[str, ...]
    apart: str  # how a UI comes to keep them apart
    files: dict[str, str]


TARGETS = {
    "comfyui": Target(
        "ComfyUI",
        "comfy/model_sampling.py",
        "ComfyUI",
        "custom_nodes",
        (),  # no other program has a folder of that name
        "ComfyUI Desktop, --base-directory",
        {
            "uis/nodes/comfyui/__init__.py": "__init__.py",
            "uis/nodes/comfyui/pyproject.toml": "pyproject.toml",
            "uis/nodes/schedule_file.py": "schedule_file.py",
        },
    ),
    "webui": Target(
        "Forge, Forge Neo, reForge or AUTOMATIC1111",
        "modules/script_callbacks.py",
        "webui",
        "extensions",
        ("models", "config.json", "ui-config.json"),
        "--data-dir",
        {
            "uis/nodes/webui/scripts/sdxl_fixes_schedule.py": "scripts/sdxl_fixes_schedule.py",
            "uis/nodes/schedule_file.py": "sdxl_fixes_schedule_file.py",
        },
    ),
}


def install(target: Target, path: Path) -> str:
    """Copy the files; an older installation is replaced. Returns a sentence. Raises OSError, with nothing
    changed, if that is not the UI's folder, or if anything that is not ours lies in the way."""
    folder = _folder(target, path)
    part = folder.with_name(f".{FOLDER}.part")  # ComfyUI and the web UIs skip hidden folders
    shutil.rmtree(part, ignore_errors=True)
    try:
        for ours, theirs in target.files.items():
            (part / theirs).parent.mkdir(parents=True, exist_ok=True)
            (part / theirs).write_bytes(_content(ours))
        stamp = "\n".join([f"sdxl-fixes {__version__}", *target.files.values(), ""])
        (part / STAMP).write_text(stamp, encoding="utf-8")
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
        (folder / theirs).is_file() and (folder / theirs).read_bytes() == _content(ours)
        for ours, theirs in target.files.items()
    )
    return f"installed in {folder}" + ("" if same else ", but not as this version has it: install again")


def _content(ours: str) -> bytes:
    return resources.files("sdxl_fixes").joinpath(ours).read_bytes()


def _folder(target: Target, path: Path) -> Path:
    """Where ours goes. Raises OSError unless nothing of anybody else lies there."""
    folder = _room(target, Path(os.path.abspath(path))) / FOLDER
    if not os.path.lexists(folder):
        return folder
    if folder.is_symlink() or not (folder / STAMP).is_file():
        raise OSError(f"{folder} exists and is not ours: move it away first")
    ours = {STAMP, *(folder / STAMP).read_text(encoding="utf-8", errors="replace").splitlines()[1:]}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        if not file.is_dir() and "__pycache__" not in name.parts and name.as_posix() not in ours:
            raise OSError(f"{folder} holds {printable(str(name))}, which is not ours: move it away first")
    return folder


def _room(target: Target, path: Path) -> Path:
    """The folder for additions: of the UI's own folder, of a portable package's, or where it is kept apart
    from the code; ``path`` may be that folder itself."""
    inside = path.name == target.room
    for code in (path, path / target.portable, *([path.parent] if inside else [])):
        if (code / target.known_by).is_file():
            return code / target.room
    holder = path.parent if inside else path
    beside = not target.beside or any((holder / name).exists() for name in target.beside)
    if beside and (holder / target.room).is_dir():
        return holder / target.room
    others = f" beside {' or '.join(target.beside)}" if target.beside else ""
    apart = f"the folder {target.room}{others} ({target.apart})"
    known = f"expected one that holds {target.known_by}, or {apart}"
    raise OSError(f"{path} is not the folder of {target.name}: {known}")
