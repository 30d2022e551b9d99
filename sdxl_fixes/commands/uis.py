"""``sdxl-fixes comfyui`` and ``sdxl-fixes webui``: put the node or the extension into a UI, and take it out
again."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sdxl_fixes.uis.install import TARGETS, install, remove, status

ACTIONS = {"install": install, "remove": remove, "status": status}


def add_command(commands: Any) -> None:
    """Register both."""
    for key, target in TARGETS.items():
        parser = commands.add_parser(
            key, help=f"make {target.name} sample stamped files as they say, without a node in the workflow"
        )
        parser.add_argument("action", choices=tuple(ACTIONS))
        parser.add_argument(
            "path",
            type=Path,
            help=f"the folder of {target.name}, or the one that holds {target.room} ({target.apart})",
        )
        parser.set_defaults(run=run, target=target)


def run(args: argparse.Namespace) -> int:
    """The command."""
    print(ACTIONS[args.action](args.target, args.path))
    return 0
