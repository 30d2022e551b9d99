"""run_script(how, script, assets, folder, *flags): one real example script on the tiny SDXL, in a process of
its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SCRIPTS = {
    "t2i": "text_to_image/train_text_to_image_sdxl.py",
    "t2i_lora": "text_to_image/train_text_to_image_lora_sdxl.py",
    "dreambooth": "dreambooth/train_dreambooth_lora_sdxl.py",
    "advanced": "advanced_diffusion_training/train_dreambooth_lora_sdxl_advanced.py",
    "controlnet": "controlnet/train_controlnet_sdxl.py",
    "instruct": "instruct_pix2pix/train_instruct_pix2pix_sdxl.py",
    "inversion": "textual_inversion/textual_inversion_sdxl.py",
    "adapter": "t2i_adapter/train_t2i_adapter_sdxl.py",
    "lpl": "research_projects/lpl/train_sdxl_lpl.py",
}


def assets(folder):
    """The tiny models and images, made once."""
    subprocess.run([sys.executable, str(HERE / "assets.py"), str(folder)], check=True, capture_output=True)
    return folder


def data(script, made):
    if script in ("t2i", "t2i_lora", "lpl"):
        return ("--train_data_dir", str(made / "images"), *(("--use_lpl",) if script == "lpl" else ()))
    if script in ("controlnet", "adapter"):
        columns = (
            "--conditioning_image_column",
            "conditioning_image",
            "--image_column",
            "image",
            "--caption_column",
            "text",
        )
        adapter = ("--adapter_model_name_or_path", str(made / "adapter")) if script == "adapter" else ()
        return ("--dataset_name", str(made / "control"), *columns, *adapter)
    if script == "instruct":
        columns = (
            "--original_image_column",
            "original_image",
            "--edit_prompt_column",
            "text",
            "--edited_image_column",
            "image",
        )
        return ("--dataset_name", str(made / "edits"), *columns)
    if script == "inversion":
        return (
            "--train_data_dir",
            str(made / "plain"),
            "--placeholder_token",
            "<cat>",
            "--initializer_token",
            "a",
        )
    columns = ("--caption_column", "text", "--image_column", "image", "--instance_prompt", "photo")
    return ("--dataset_name", str(made / "images"), *columns)


def expected(trace, abar, halves=False, **form):
    """Every step's loss in closed form, float64, of a trace with tensors; ``form`` as for closed_form.loss.
    With ``halves`` (prior preservation) that of each half of the batch, added."""
    from closed_form import trained  # here: programs without tests/support on their path import this module

    names = ("latents", "noise", "predictions")
    steps = list(zip(*(trace["tensors"][name] for name in names), trace["timesteps"], strict=True))
    assert steps
    at = [len(step[-1]) // 2 if halves else 0 for step in steps]
    parts = [
        [[part[k:] for part in step], [part[:k] for part in step]] for k, step in zip(at, steps, strict=True)
    ]
    return [sum(trained(*half, abar, **form) for half in step[: 1 + halves]) for step in parts]


def run_script(
    how, script, made, folder, *flags, base="base", steps=3, launcher=(), check=True, tensors=False
):
    """(process, trace); the caches of ``datasets`` live in ``folder`` and are found again by a second run
    there."""
    folder.mkdir(exist_ok=True, parents=True)
    trace = folder / "trace.json"
    trace.unlink(missing_ok=True)
    if script == "inversion" and base == "base":
        base = "base-whole"  # it adds tokens
    common = {
        "pretrained_model_name_or_path": made / base,
        "output_dir": folder / "out",
        "resolution": 64,
        "train_batch_size": 2,
        "seed": 7,
        "lr_warmup_steps": 0,
        "learning_rate": "1e-3",
        "mixed_precision": "no",
        "max_train_steps": steps,
    }
    arguments = [str(x) for name, value in common.items() for x in (f"--{name}", value)]
    path = Path(os.environ["DIFFUSERS_EXAMPLES"]).resolve() / SCRIPTS[script]
    environment = {
        **os.environ,
        **{
            "HF_DATASETS_OFFLINE": "1",
            "HF_HOME": str(folder / "hf"),
            "HF_DATASETS_CACHE": str(folder / "datasets"),
        },
        **{
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "ACCELERATE_USE_CPU": "true",
        },
        **({"TRACE_TENSORS": str(tensors)} if tensors else {}),
    }
    command = [
        sys.executable,
        *launcher,
        str(HERE / "launch.py"),
        how,
        str(trace),
        str(path),
        *arguments,
        *data(script, made),
        *flags,
    ]
    process = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=folder, timeout=600
    )
    if check and process.returncode:
        raise AssertionError(process.stderr[-3000:])
    return process, json.loads(trace.read_text()) if trace.exists() else None
