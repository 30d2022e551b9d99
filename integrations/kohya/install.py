"""Apply the patches to the sd-scripts that Python would import, and take them back."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from sdxl_fixes.errors import FixError
from sdxl_fixes.trainers.patching import PatchSet

from .patches import NEEDED, PATCHES
from .run import SESSION


def install() -> None:
    """Patch sd-scripts in this process, before its script trains; its folder must be importable (on
    sys.path).

    Installing twice is the same as once. Raises FixError when there is no sd-scripts, or when it is one whose
    argument handling we do not know.
    """
    spec = importlib.util.find_spec("library")
    where = Path(next(iter(spec.submodule_search_locations or []), "")) if spec else None
    if where is None or not (where / "train_util.py").is_file():
        raise FixError(
            "no sd-scripts found: put the folder that holds sdxl_train.py and library/ on sys.path first"
        )
    uninstall()
    root = where.resolve().parent
    patches, needed = PatchSet(PATCHES, root, SESSION.called), PatchSet((NEEDED,), root).check()[NEEDED]
    if needed is None:
        patches.apply()
    if needed or "run" in patches.refused:
        patches.undo()
        raise FixError(
            "sd-scripts v0.10.0 or newer is needed, and this one is not, or is newer than we know "
            f"({needed or patches.refused['run']})"
        )
    SESSION.patches = patches
    SESSION.watch_optimizers()


def uninstall() -> None:
    """Put sd-scripts' own functions back."""
    SESSION.patches.undo()
    SESSION.unwatch()
    SESSION.reset()
