"""python -m sdxl_fixes.kohya sdxl_train.py ...   (also through ``accelerate launch -m``)"""

from __future__ import annotations

import sys
from pathlib import Path

from sdxl_fixes.kohya.flags import OURS
from sdxl_fixes.kohya.install import install
from sdxl_fixes.kohya.run import FIXES, SESSION
from sdxl_fixes.kohya.scripts import REFUSED, SCRIPTS
from sdxl_fixes.trainers.session import help_text, run_script

USAGE = (
    "usage: python -m sdxl_fixes.kohya PATH/TO/sdxl_train.py [the script's own flags and ours; --help "
    "lists both]"
)


def main() -> None:
    """Run an unmodified SDXL trainer of sd-scripts with the fixes installed."""
    if sys.argv[1:2] in (["-h"], ["--help"]):
        print(help_text(USAGE, OURS, FIXES))
        return
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(USAGE)
    script = Path(sys.argv[1])
    if script.name in REFUSED:
        sys.exit(
            f"sdxl-fixes: {script.name} cannot be fixed: {REFUSED[script.name]}; start it with plain python"
        )
    if script.name not in SCRIPTS:
        sys.exit(
            f"sdxl-fixes: {script.name} is not one of the trainers that the fixes are made for: "
            f"{', '.join(SCRIPTS)}"
        )
    if not script.is_file():
        sys.exit(
            f"sdxl-fixes: there is no {script}: give the path of {script.name} in your sd-scripts folder"
        )
    run_script(script, install, SESSION, OURS)


if __name__ == "__main__":
    main()
