"""The settings of train.py: its flags, and what is wrong with them, told before anything is loaded."""

from __future__ import annotations

import argparse
from pathlib import Path

from accelerate.tracking import get_available_trackers

from sdxl_fixes.command_line import add_flags
from sdxl_fixes.flags import FLAGS, grouped

OURS = {
    **grouped("prediction", "schedule", "loss", "weighting", "noise", "timesteps"),
    "ema_decay": FLAGS["ema_decay"],
}


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
    for name in (
        "samples",
        "global_batch",
        "batch_size",
        "checkpoint_every",
        "keep",
        "evaluate_every",
        "sample_every",
    ):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: expected 1 or more")
    if not args.max_grad_norm > 0:
        raise SystemExit(f"--max_grad_norm {args.max_grad_norm}: expected more than 0; 1e9 clips nothing")
    if args.huber_l2_gradient == "batch":
        raise SystemExit(
            "--huber_l2_gradient batch: its factor is of a process's batch, and a step must not depend on "
            "how it is shared out: take sample"
        )
    if args.sample_prompts and not args.sample_prompts.is_file():
        raise SystemExit(f"--sample_prompts {args.sample_prompts}: there is no such file")
    if args.log_with and args.log_with not in {str(getattr(t, "value", t)) for t in get_available_trackers()}:
        raise SystemExit(f"--log_with {args.log_with}: no tracker of that name is installed: pip install it")
    return args
