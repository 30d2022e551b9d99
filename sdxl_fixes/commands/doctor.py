"""``sdxl-fixes doctor``: which fixes fit a trainer's version, and why not."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_command(commands: Any) -> None:
    """Register it."""
    parser = commands.add_parser("doctor", help="which fixes fit a trainer's version, and why not")
    parser.add_argument("path", type=Path, help="a trainer's script, or the folder of sd-scripts")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The command; status 1 if a fix does not fit. Raises ValueError for a path that leads nowhere."""
    if not args.path.exists():
        raise ValueError(
            f"there is no {args.path}: give the folder of sd-scripts, or a training script of it or of "
            "diffusers' examples"
        )
    from sdxl_fixes.diffusers import doctor as diffusers
    from sdxl_fixes.kohya import doctor as kohya

    report, fits = (diffusers if diffusers.is_script(args.path) else kohya).examine(args.path)
    print(report)
    if not diffusers.is_script(args.path):
        print(_plain_starts())
    return 0 if fits else 1


def _plain_starts() -> str:
    from _sdxl_fixes_autostart import installed

    started = (
        "are started with the fixes"
        if installed()
        else ("ignore them and say nothing: install sdxl-fixes with pip")
    )
    return f"plain starts under keys of ours in a --config_file {started}"
