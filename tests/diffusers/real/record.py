"""python record.py FILE: what the unmodified example scripts make of --snr_gamma 5 on SDXL's own schedule, as
data for tests that have no checkout. Needs DIFFUSERS_EXAMPLES."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from run_script import assets, run_script

if __name__ == "__main__":
    examples = Path(os.environ["DIFFUSERS_EXAMPLES"])
    commit = subprocess.run(
        ["git", "-C", str(examples), "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    out = {"diffusers": commit, "min-SNR": {}}
    with tempfile.TemporaryDirectory() as folder:
        made = assets(Path(folder) / "assets")
        for script, name in (("t2i_lora", "text_to_image"), ("dreambooth", "dreambooth")):
            for base, prediction_type in (("base", "epsilon"), ("base-v", "v_prediction")):
                _, trace = run_script(
                    "unpatched", script, made, Path(folder) / "run", "--snr_gamma", "5", base=base, steps=6
                )
                steps = [
                    dict(zip(("timesteps", "errors", "loss"), s, strict=True))
                    for s in zip(*(trace[k] for k in ("timesteps", "errors", "losses")), strict=True)
                ]
                out["min-SNR"][f"{name} {prediction_type}"] = steps
    Path(sys.argv[1]).write_text(json.dumps(out, indent=1) + "\n")
