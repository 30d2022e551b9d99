"""Where a step of kohya's real trainers would wait for a GPU, with and without --speed syncs:
SD_SCRIPTS=path/to/sd-scripts python benchmarks/host_syncs.py

A tiny SDXL on the CPU, batch 2, in which tests/support/played_device.py plays the GPU; counts are per
optimizer step, of the whole steps after the first two.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "kohya" / "real"))
import runs

CACHED = ("--cache_latents", "--cache_text_encoder_outputs")
CASES = {
    "sdxl_train.py, all cached": ("sdxl_train.py", CACHED),
    "sdxl_train_network.py, nothing cached": ("sdxl_train_network.py", ()),
}


def main() -> None:
    """Print a table for each case."""
    os.environ["COUNT_WAITS"] = "1"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        assets = runs.make_assets(folder / "assets")
        for case, (script, flags) in CASES.items():
            counted = []
            for how, more in (("unpatched", ()), ("module", ("--speed", "syncs"))):
                process, trace = runs.run(how, script, *flags, *more, assets=assets, folder=folder, steps=4)
                if process.returncode:
                    sys.exit(process.stderr[-2000:])
                counted.append(trace)
            before, after = ({(k, at): n for k, at, n in trace["waits"]} for trace in counted)
            same = "the same losses" if counted[0]["losses"] == counted[1]["losses"] else "OTHER LOSSES"
            print(f"\n{case}: {sum(before.values()):g}, with --speed syncs {sum(after.values()):g}, {same}\n")
            print("| | upstream | --speed syncs | place |\n|---|---:|---:|---|")
            for key in sorted(before | after, key=lambda key: -before.get(key, 0)):
                kind, place = key
                print(f"| {kind} | {before.get(key, 0):g} | {after.get(key, 0):g} | `{place}` |", flush=True)


if __name__ == "__main__":
    main()
