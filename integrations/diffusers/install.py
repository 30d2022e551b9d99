"""Apply the patches to the libraries that the example scripts call, and take them back."""

from __future__ import annotations

from sdxl_fixes.errors import FixError
from sdxl_fixes.trainers.patching import PatchSet

from .patches import PATCHES
from .run import SESSION


def install() -> None:
    """Get ready for an example script of diffusers, or your own copy of one, that will run in this process:
    call it before the script parses its arguments. Only then is anything else replaced, and only what the
    flags ask for.

    Installing twice is the same as once. Raises FixError when diffusers or accelerate are of a shape that we
    do not know.
    """
    uninstall()
    patches = PatchSet(PATCHES, calls=SESSION.called)
    patches.apply({"run"})
    if "run" in patches.refused:
        patches.undo()
        raise FixError(f"this diffusers or accelerate is not one that we know ({patches.refused['run']})")
    SESSION.patches = patches
    SESSION.watch_optimizers()


def uninstall() -> None:
    """Put the libraries' own functions back."""
    SESSION.patches.undo()
    SESSION.unwatch()
    SESSION.reset()
