"""One run of a real SDXL trainer of sd-scripts on the tiny model, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
_IMAGES, _CONTROL = (
    ("--dataset_config", "{assets}/dataset.toml"),
    ("--dataset_config", "{assets}/control.toml"),
)
SCRIPTS = {  # script -> what it needs to train, beside what all need
    "sdxl_train.py": _IMAGES,
    "sdxl_train_network.py": (
        *_IMAGES,
        "--network_module",
        "networks.lora",
        "--network_dim",
        "4",
        "--network_alpha",
        "4",
    ),
    # a new token that captions hold
    "sdxl_train_textual_inversion.py": (*_IMAGES, "--token_string", "on", "--init_word", "a"),
    "sdxl_train_control_net.py": _CONTROL,
    "sdxl_train_control_net_lllite.py": (*_CONTROL, "--cond_emb_dim", "8", "--network_dim", "4"),
    "sdxl_train_leco.py": ("--prompts_file", "{assets}/leco.toml", "--max_denoising_steps", "4"),
}


def make_assets(folder, checkout=None):
    """The folder of what assets.py makes."""
    subprocess.run(
        [sys.executable, str(HERE / "assets.py"), str(folder)],
        check=True,
        stdout=subprocess.DEVNULL,
        env=_environment(checkout),
    )
    return folder


def expected(trace, abar, **form):
    """Every step's loss in closed form, float64, of a trace with tensors; ``form`` as closed_form.loss."""
    from closed_form import trained  # here: programs without tests/support on their path import this module

    assert len(trace["tensors"]) == len(trace["timesteps"]) > 0
    steps = zip(trace["tensors"], trace["timesteps"], strict=True)
    return [trained(*tensors, timesteps, abar, **form) for tensors, timesteps in steps]


def _environment(checkout):
    chosen = {} if checkout is None else {"SD_SCRIPTS": str(checkout)}
    return {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": "", **chosen}


def arguments(script, flags, assets, folder, steps):
    """What ``script`` is given."""
    common = {
        "pretrained_model_name_or_path": "{assets}/model.safetensors",
        "tokenizer_cache_dir": "{assets}/tokenizers",
        "output_dir": folder / "out",
        "output_name": "out",
        "save_model_as": "safetensors",
        "mixed_precision": "no",
        "max_train_steps": steps,
        "learning_rate": "1e-4",
        "seed": 7,
        "max_data_loader_n_workers": 0,
        "optimizer_type": "AdamW",
    }
    given = [str(x) for name, value in common.items() for x in (f"--{name}", value)]
    return [word.replace("{assets}", str(assets)) for word in (*given, *SCRIPTS[script], *flags)]


def run(how, script, *flags, assets, folder, steps, checkout=None, tensors=False):
    """(process, trace) of a run in ``folder``, whose model is folder/out/out.safetensors; trace is None if it
    did not come to trace.

    ``how`` is launch.py's, or a whole command to put before it. ``{assets}`` in a flag stands for that
    folder. With ``tensors`` the trace holds what ``expected`` computes from, with "base"
    what the frozen base says, too.
    """
    trace = folder / "trace.json"
    trace.unlink(missing_ok=True)
    before = [sys.executable] if isinstance(how, str) else how[:-1]
    command = [*before, str(HERE / "launch.py"), how if isinstance(how, str) else how[-1], str(trace), script]
    process = subprocess.run(
        [*command, *arguments(script, flags, assets, folder, steps)],
        capture_output=True,
        text=True,
        env={**_environment(checkout), **({"TRACE_TENSORS": str(tensors)} if tensors else {})},
        cwd=folder,
        timeout=600,
    )
    return process, json.loads(trace.read_text()) if trace.exists() else None
