"""The checkouts of kohya-ss/sd-scripts that SD_SCRIPTS names: one, or several as in PATH. The matrix takes
all, all else the first."""

import os
from pathlib import Path

SKIP = (
    "set SD_SCRIPTS to a checkout of kohya-ss/sd-scripts (v0.10.1 or newer), or to several with "
    f"{os.pathsep!r} between them, to run"
)


def named():
    """Their folders."""
    return [Path(name).resolve() for name in os.environ.get("SD_SCRIPTS", "").split(os.pathsep) if name]


def first():
    """The folder of the first."""
    if not named():
        raise SystemExit(SKIP)
    return named()[0]
