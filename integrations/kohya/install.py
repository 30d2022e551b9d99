"""Apply the patches to the sd-scripts that Python would import, and take them back."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from sdxl_fixes.trainers.patching import PatchSet

from .patches import NEEDED, PATCHES
from .run import SESSION

TRAINERS = ("sdxl_train", "sdxl_train_network", "train_network")


def install() -> None:
    """Patch sd-scripts in this process, before its script is executed or imported; its folder must be importable (on sys.path).

    Installing twice is the same as once. Raises RuntimeError when there is no sd-scripts, when it is one whose argument handling we
    do not know, or when a trainer was imported already (it holds the unpatched functions by then).
    """
    spec = importlib.util.find_spec("library")
    where = Path((spec.submodule_search_locations or [""])[0]) if spec else None
    if where is None or not (where / "train_util.py").is_file():
        raise RuntimeError("sdxl-fixes: no sd-scripts found: put the folder that holds sdxl_train.py and library/ on sys.path first")
    late = [name for name in TRAINERS if name in sys.modules]
    if late and not SESSION.patches.applied:
        raise RuntimeError(f"sdxl-fixes: {late[0]} was imported before install(), so it holds unpatched functions: call install() first")
    uninstall()
    patches, needed = PatchSet(PATCHES), PatchSet((NEEDED,)).check()[NEEDED]
    if needed is None:
        patches.apply()
    if needed or "run" in patches.refused:
        patches.undo()
        raise RuntimeError(f"sdxl-fixes: sd-scripts v0.10.0 or newer is needed, and this one is not ({needed or patches.refused['run']})")
    SESSION.patches = patches


def uninstall() -> None:
    """Put sd-scripts' own functions back."""
    SESSION.patches.undo()
    SESSION.patches, SESSION.run = PatchSet(()), None
