"""Images a second of your own sd-scripts training, without --speed and with it, in turn on one machine:

python benchmarks/kohya_speed.py PATH/TO/sdxl_train.py --config_file my.toml -- --speed syncs,fused

What stands behind ``--`` is given to the second of two runs. Each is stopped after WARM_UP optimizer steps
that do not count and STEPS that do, before it saves a model; the device is waited for at both ends alone.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WARM_UP = int(os.environ.get("WARM_UP", "10"))
STEPS = int(os.environ.get("STEPS", "30"))


def train(out: str, arguments: list[str]) -> None:
    """Run the trainer in this process until the steps are measured."""
    sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
    import library.train_util  # noqa: F401  (before the U-Net, which it imports)
    import torch
    from library.sdxl_original_unet import SdxlUNet2DConditionModel
    from torch.optim.optimizer import register_optimizer_step_post_hook

    done, images, began, forward = 0, 0, 0.0, SdxlUNet2DConditionModel.forward

    @functools.wraps(forward)  # the plugin checks the parameters
    def counted(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal images
        images += len(x) if torch.is_grad_enabled() else 0
        return forward(self, x, *args, **kwargs)

    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def stepped(*_: Any) -> None:
        nonlocal done, images, began
        done += 1
        if done == WARM_UP:
            began, images = now(), 0
        if done == WARM_UP + STEPS:
            Path(out).write_text(json.dumps(images / (now() - began)))
            os._exit(0)

    SdxlUNet2DConditionModel.forward = counted
    register_optimizer_step_post_hook(stepped)
    sys.argv = ["sdxl_fixes.kohya", *arguments]
    from sdxl_fixes.kohya.__main__ import main as launch

    launch()
    sys.exit(f"the training ended after {done} steps, and {WARM_UP + STEPS} are needed: give more")


def main() -> None:
    """Print images a second of both."""
    if sys.argv[1:2] == ["--measure"]:
        return train(sys.argv[2], sys.argv[3:])
    if "--" not in sys.argv or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    middle = sys.argv.index("--")
    plain, more = sys.argv[1:middle], sys.argv[middle + 1 :]
    with tempfile.TemporaryDirectory() as folder:
        for name, flags in (("without", []), (" ".join(more), more)):
            out = Path(folder) / "images"
            subprocess.run([sys.executable, __file__, "--measure", str(out), *plain, *flags], check=True)
            print(f"{name}: {json.loads(out.read_text()):.2f} images a second", flush=True)


if __name__ == "__main__":
    main()
