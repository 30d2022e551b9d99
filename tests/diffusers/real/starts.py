"""starts.py EXAMPLES MODEL: what doctor says of every SDXL script of a checkout and what its start does, with
the flags of one fix at a time, as JSON: script -> {"doctor": the table, "starts": fix -> null if it gets
through its arguments, else what it says}.

A start is the launcher's own, up to the moment the script has its arguments; nothing is loaded.
"""

import contextlib
import io
import json
import sys
from pathlib import Path
from unittest import mock

FLAGS = {
    "schedule": ("--terminal_sigma", "300"),
    "loss": ("--loss_type", "huber"),
    "weighting": ("--snr_gamma", "5"),
    "noise": ("--ip_noise_gamma", "0.1"),
    "timesteps": ("--stratified_timesteps",),
    "validation": ("--stable_loss_steps", "2"),
    "prompts": ("--max_token_length", "225"),
    "buckets": ("--max_token_length", "225", "--chunk_buckets"),
    "crops": ("--true_crop_coordinates",),
    "caches": ("--checked_caches",),
    "nothing": (),
    "many": (
        *("--zero_terminal_snr", "--prediction_type", "v_prediction", "--snr_gamma", "5"),
        *("--stratified_timesteps", "--loss_type", "huber"),
    ),
}
NEEDED = {
    "dataset_name": "x",
    "train_data_dir": ".",
    "instance_prompt": "x",
    "placeholder_token": "x",
    "initializer_token": "a",
}


class Started(BaseException):
    """The script has its arguments."""


def start(script, flags, model):
    """None if the script gets through its arguments, else what the launcher says."""
    from sdxl_fixes.diffusers.__main__ import main
    from sdxl_fixes.diffusers.install import uninstall
    from sdxl_fixes.diffusers.run import SESSION

    source = script.read_text()
    needed = [
        word for name, value in NEEDED.items() if f'"--{name}"' in source for word in (f"--{name}", value)
    ]
    needed = needed[2:] if "--dataset_name" in needed and "--train_data_dir" in needed else needed
    argv = [
        "sdxl_fixes.diffusers",
        str(script),
        "--pretrained_model_name_or_path",
        str(model),
        "--resolution",
        "64",
        *needed,
        *flags,
    ]
    said, path = io.StringIO(), list(sys.path)
    try:
        with mock.patch.object(SESSION, "begin", side_effect=Started), mock.patch.object(sys, "argv", argv):
            with contextlib.redirect_stderr(said):
                main()
    except Started:
        return None
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, str) else said.getvalue()
    finally:
        uninstall()
        sys.path[:] = path
    raise AssertionError(f"{script} ended by itself")


if __name__ == "__main__":
    examples, model = map(Path, sys.argv[1:])
    from sdxl_fixes.diffusers.anchors import is_sdxl_script
    from sdxl_fixes.diffusers.doctor import examine

    found = {}
    for script in sorted(examples.rglob("*.py")):
        if is_sdxl_script(script.read_text(encoding="utf-8")):
            starts = {fix: start(script, flags, model) for fix, flags in FLAGS.items()}
            found[str(script.relative_to(examples))] = {"doctor": examine(script), "starts": starts}
    print(json.dumps(found))
