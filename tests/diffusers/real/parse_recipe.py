"""parse_recipe.py SCRIPT FLAGS...: what the script's own parser and our adapter make of the flags, as JSON;
nothing is trained.

The adapter takes from the script what it serves itself (``snr_gamma`` is None then), so its settings are
printed beside the Namespace.
"""

import importlib
import json
import sys
from pathlib import Path

if __name__ == "__main__":
    script, *flags = sys.argv[1:]
    import sdxl_fixes.diffusers
    from sdxl_fixes.diffusers.run import SESSION
    from sdxl_fixes.flags import FLAGS

    sdxl_fixes.diffusers.install()
    sys.path.insert(0, str(Path(script).parent))
    sys.argv = [script, *flags]
    args = importlib.import_module(Path(script).stem).parse_args()
    run = SESSION.run
    answer = {
        "args": vars(args),
        "on": sorted(run.on),
        "settings": {name: getattr(run.flags, name) for name in FLAGS},
        "prediction_type": run.prediction_type,
        "terminal_snr": float(run.schedule.snr[-1]),
    }
    print(json.dumps(answer, default=str))
