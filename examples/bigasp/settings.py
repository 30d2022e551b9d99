"""The settings of train.py: its flags, and what is wrong with them, told before anything is loaded."""

from __future__ import annotations

import argparse
import importlib.util
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.tracking import get_available_trackers
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

from sdxl_fixes.command_line import add_flags
from sdxl_fixes.flags import FLAGS, grouped
from sdxl_fixes.names import HUBER_KINDS
from sdxl_fixes.sample_table import SampleTable

OURS = {
    **grouped("prediction", "schedule", "loss", "weighting", "noise", "timesteps"),
    "ema_decay": FLAGS["ema_decay"],
}
WEIGHTED = ("unet", "vae", "text_encoder", "text_encoder_2")
# the least that numbers may be
LEAST = {
    **dict.fromkeys(("samples", "global_batch", "batch_size", "planned_batch", "keep", "sample_steps"), 1),
    **dict.fromkeys(("checkpoint_every", "evaluate_every", "sample_every"), 1),
    **dict.fromkeys(("seed", "workers", "warmup", "weight_decay", "heldout", "stable"), 0),
    **dict.fromkeys(("keep_activations", "sample_guidance"), 0),
}
# flags that do nothing without another: they, what they need, and whether it is there
NEEDS: tuple[tuple[tuple[str, ...], str, Callable[[Any], Any]], ...] = (
    (
        ("keep_activations",),
        "--checkpointing transformers",
        lambda args: args.checkpointing == "transformers",
    ),
    (("compile_backend",), "--compile_blocks", lambda args: args.compile_blocks),
    (
        ("sample_every", "sample_side", "sample_steps", "sample_guidance"),
        "--sample_prompts",
        lambda args: args.sample_prompts,
    ),
    (("evaluate_every",), "--heldout or --stable", lambda args: args.heldout or args.stable),
    (("ip_noise_gamma_random_strength",), "--ip_noise_gamma", lambda args: args.ip_noise_gamma),
    (
        ("huber_schedule", "huber_c", "huber_scale"),
        "--loss_type huber or smooth_l1",
        lambda args: args.loss_type in HUBER_KINDS,
    ),
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="SDXL's U-Net, trained on a store of latents.")
    add = parser.add_argument
    add("--table", type=Path, required=True, help="parquet: see prompt.py")
    add("--latents", type=Path, required=True, help="the store that encode.py made of it")
    add("--model", required=True, help="a pipeline's folder or name, where training begins")
    add("--output", type=Path, required=True)
    add("--resume", action="store_true", help="go on from the last checkpoint in --output")
    add("--samples", type=int, required=True, help="to be seen; the learning rate falls to 0 over them")
    add("--global_batch", type=int, default=2048, help="samples of an optimizer step")
    add("--batch_size", type=int, default=4, help="samples that a process trains at a time")
    add(
        "--planned_batch",
        type=int,
        help="of one size and chunk count (default: --batch_size; on resuming, as it was)",
    )
    add("--learning_rate", type=float, default=1e-4)
    add("--warmup", type=int, default=100_000, help="samples over which the learning rate rises")
    add("--weight_decay", type=float, default=0.1)
    add("--max_grad_norm", type=float, default=1.0)
    add("--train_text_encoder", action="store_true", help="train text encoder 1 as well")
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=4, help="processes that read latents and draw noise, for each GPU")
    add("--checkpoint_every", type=int, default=500_000, help="samples")
    add("--keep", type=int, default=2, help="checkpoints, the last ones")
    add("--evaluate_every", type=int, default=100_000, help="samples between held-out and stable losses")
    add("--heldout", type=int, default=0, help="pictures of the store that are not trained on")
    add("--stable", type=int, default=0, help="pictures of the stable training loss")
    add("--log_with", help="tensorboard, wandb, ...: a tracker that accelerate knows")
    add("--sample_prompts", type=Path, help="a text file, a prompt a line, for OUTPUT/samples.html")
    add("--sample_every", type=int, default=500_000, help="samples between its columns")
    add("--sample_side", type=int, default=1024, help="pixels")
    add("--sample_steps", type=int, default=25)
    add("--sample_guidance", type=float, default=5.0)
    fast = parser.add_argument_group("speed")
    fast.add_argument(
        "--precision", choices=("fp32", "amp", "bf16"), default="amp",
        help="amp: float32, bfloat16 by autocast; bf16: weights, too, rounded stochastically by torchao",
    )  # fmt: skip
    fast.add_argument("--fused_adamw", action="store_true")
    fast.add_argument("--channels_last", action="store_true")
    fast.add_argument("--compile_blocks", action="store_true", help="torch.compile of each transformer block")
    fast.add_argument("--compile_backend", default="inductor")
    fast.add_argument(
        "--checkpointing", choices=("none", "transformers", "all"), default="none",
        help="what computes its activations twice to save memory",
    )  # fmt: skip
    fast.add_argument(
        "--keep_activations", type=int, default=0,
        help="so many of the deepest (SDXL: 6 of 11) keep theirs under --checkpointing transformers",
    )  # fmt: skip
    add_flags(parser, OURS)
    args = parser.parse_args()
    # again with nothing for a default: what was given
    again = parser.parse_args(namespace=argparse.Namespace(**dict.fromkeys(vars(args))))
    check(args, {name for name, value in vars(again).items() if value is not None})
    return args


def check(args: argparse.Namespace, given: set[str]) -> None:
    """Raise SystemExit, in one sentence, for what could not be trained, or would be found out late. ``model``
    becomes its folder, ``named`` is what it was called."""
    for name, least in LEAST.items():
        value = getattr(args, name)
        if value is not None and not least <= value < math.inf:
            raise SystemExit(f"--{name} {value}: expected {least} or more")
    if not 0 < args.learning_rate < math.inf:
        raise SystemExit(f"--learning_rate {args.learning_rate}: expected more than 0")
    if not args.max_grad_norm > 0:
        raise SystemExit(f"--max_grad_norm {args.max_grad_norm}: expected more than 0; 1e9 clips nothing")
    for names, needed, is_there in NEEDS:
        if not is_there(args) and (idle := next((name for name in names if name in given), None)):
            raise SystemExit(
                f"--{idle} does nothing without {needed}: give it as well, or leave --{idle} out"
            )
    if args.huber_l2_gradient == "batch":
        raise SystemExit(
            "--huber_l2_gradient batch: its factor is of a process's batch, and a step must not depend on "
            "how it is shared out: take sample"
        )
    if args.log_with and args.log_with not in {str(getattr(t, "value", t)) for t in get_available_trackers()}:
        raise SystemExit(f"--log_with {args.log_with}: no tracker of that name is installed: pip install it")
    _check_speed(args)
    for name, file in (("table", args.table), ("sample_prompts", args.sample_prompts)):
        if file and not (file.exists() if name == "table" else file.is_file()):  # or a folder of parquet
            raise SystemExit(f"--{name} {file}: there is no such file")
    _check_output(args.output)
    if args.sample_prompts:
        _check_samples(args)
    args.named, args.model = args.model, str(pipeline_folder(args.model))


def _check_speed(args: argparse.Namespace) -> None:
    if args.compile_blocks and not hasattr(UNet2DConditionModel, "compile_repeated_blocks"):
        raise SystemExit("--compile_blocks needs diffusers 0.35 or newer: update it, or leave the flag out")
    if args.precision == "bf16" and args.fused_adamw:
        raise SystemExit("--fused_adamw is not for --precision bf16, whose AdamW is torchao's: leave it out")
    if args.precision == "bf16" and importlib.util.find_spec("torchao") is None:
        raise SystemExit("--precision bf16 rounds weights stochastically by torchao: pip install torchao")


def _check_output(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"?")
    except OSError as error:
        raise SystemExit(f"--output {folder}: nothing can be written there ({error.strerror})") from error


def _check_samples(args: argparse.Namespace) -> None:
    if args.sample_side < 64 or args.sample_side % 8:
        raise SystemExit(f"--sample_side {args.sample_side}: expected a multiple of 8, at least 64")
    try:
        prompts(args.sample_prompts)
        SampleTable(args.output / "samples.html")
    except ValueError as error:
        raise SystemExit(str(error)) from error


def prompts(file: Path) -> list[str]:
    """The lines that are not empty. Raises ValueError where there are none, or where it is not UTF-8."""
    try:
        found = [line for line in file.read_text("utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"--sample_prompts {file}: it is not in UTF-8: save it so") from error
    if not found:
        raise ValueError(f"--sample_prompts {file}: it is empty: write a prompt a line")
    return found


def pipeline_folder(model: str) -> Path:
    """Where the pipeline ``model`` is, downloaded where that is no folder. Raises SystemExit where it lacks
    what is ever read of it: its VAE is needed when the first checkpoint is saved."""
    folder = Path(model)
    if not folder.exists():
        try:
            folder = Path(StableDiffusionXLPipeline.download(model))
        except (OSError, ValueError) as error:
            why = str(error).strip().split("\n")[0]
            raise SystemExit(
                f"--model {model}: there is no such folder, and no such name was downloaded ({why})"
            ) from error
    if not (folder / "model_index.json").is_file():
        raise SystemExit(
            f"--model {model}: it is no pipeline's folder (no model_index.json); of a single file "
            "StableDiffusionXLPipeline.from_single_file(FILE).save_pretrained(FOLDER) makes one"
        )
    for name in (*WEIGHTED, "scheduler", "tokenizer", "tokenizer_2"):
        if not any((folder / name).glob("*.json")):
            raise SystemExit(f"--model {model}: it lacks {name}: give the folder of a whole SDXL pipeline")
        if name in WEIGHTED and not weight_files(folder / name):
            raise SystemExit(
                f"--model {model}: {name} has no weights that are read without a variant (fp16 or the like): "
                "give a folder that has"
            )
    return folder


def weight_files(part: Path) -> list[Path]:
    """Those that from_pretrained reads of a model's folder, by name."""
    for end in (".safetensors", ".bin"):
        found = [part / f"{stem}{end}" for stem in ("diffusion_pytorch_model", "model", "pytorch_model")]
        shards = part.glob(f"*model-?????-of-?????{end}")
        if whole := [file for file in (*found, *sorted(shards)) if file.is_file()]:
            return whole
    return []
