"""python -m sdxl_fixes.diffusers train_text_to_image_sdxl.py ...   (also through ``accelerate launch -m``)"""

from __future__ import annotations

import sys
from pathlib import Path

from sdxl_fixes.diffusers.anchors import is_sdxl_script, refused
from sdxl_fixes.diffusers.flags import FLAGS_HERE
from sdxl_fixes.diffusers.install import install
from sdxl_fixes.diffusers.run import FIXES, SESSION
from sdxl_fixes.trainers.session import help_text, run_script

USAGE = (
    "usage: python -m sdxl_fixes.diffusers PATH/TO/train_text_to_image_sdxl.py [the script's own flags "
    "and ours; --help lists both]"
)


def main() -> None:
    """Run an unmodified SDXL example script of diffusers with the fixes installed."""
    if sys.argv[1:2] in (["-h"], ["--help"]):
        print(help_text(USAGE, FLAGS_HERE, FIXES))
        return
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(USAGE)
    script = Path(sys.argv[1])
    if not script.is_file():
        sys.exit(
            f"sdxl-fixes: there is no {script}: give the path of a training script of diffusers' examples"
        )
    source = script.read_text(encoding="utf-8")
    if not is_sdxl_script(source):
        sys.exit(
            f"sdxl-fixes: {script} is no SDXL training script like those of diffusers' examples: it needs "
            "main, parse_args and a pipeline"
        )
    if why := refused(source):
        sys.exit(f"sdxl-fixes: {script.name} cannot be fixed: {why}; start it with plain python")
    run_script(script, install, SESSION, FLAGS_HERE)


if __name__ == "__main__":
    main()
