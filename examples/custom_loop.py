"""A training loop of your own on accelerate, with sdxl-fixes imported directly. Runs offline on a tiny SDXL
U-Net.

    python examples/custom_loop.py --output_dir out --zero_terminal_snr --min_snr_gamma 5 --min_snr_floor
    python examples/custom_loop.py --output_dir out --steps 12 --resume ...      goes on where it stopped
    python examples/custom_loop.py --output_dir logged --stable_loss_steps 2 --log_with tensorboard ...
    python examples/custom_loop.py --output_dir more --gradient_accumulation_steps 2 ...
    accelerate launch --num_processes 2 examples/custom_loop.py --output_dir two ...    (on two GPUs)
    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 examples/custom_loop.py --output_dir two ...

Everything random is a function of (seed, step, process), so a resumed run repeats the uninterrupted one: on
the CPU to the last bit; on a GPU, where two identical runs differ by 1e-5 (measured on an H100), as nearly.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel

from sdxl_fixes import Objective
from sdxl_fixes.command_line import add_flags
from sdxl_fixes.flags import FLAGS, TrainingFlags
from sdxl_fixes.trainers.checkpoints import checkpoint, checkpoints
from sdxl_fixes.validation import Validation

# widths of the text embeddings, the pooled one and the six time ids make the conditioning
TEXT, POOLED = 80, 48


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps")
    parser.add_argument("--checkpoint_every", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=4, help="of one process")
    # accelerate launch has a flag of the name, which is for DeepSpeed alone
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint in --output_dir"
    )
    parser.add_argument("--log_with", help="tensorboard, wandb, ...: a tracker that accelerate knows")
    # prediction, schedule, loss, weights, noise, timesteps, and the validation loss every --stable_loss_steps
    add_flags(parser, FLAGS)
    parser.set_defaults(prediction_type="v_prediction")
    return parser.parse_args()


def make_unet() -> UNet2DConditionModel:
    """A U-Net of SDXL's class and conditioning, small."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 1),
        projection_class_embeddings_input_dim=6 * 8 + POOLED,
        cross_attention_dim=TEXT,
        norm_num_groups=8,
    )


def make_data(count: int = 24, seed: int = 0) -> dict[str, torch.Tensor]:
    """Stands for your cached latents and embeddings: flat latents of a brightness that the embeddings
    tell."""
    generator = torch.Generator().manual_seed(seed)
    brightness = torch.linspace(-1.5, 1.5, count)
    return {
        "latents": brightness.reshape(-1, 1, 1, 1) + 0.1 * torch.randn(count, 4, 8, 8, generator=generator),
        "text": brightness.reshape(-1, 1, 1).expand(-1, 77, TEXT).clone(),
        "pooled": brightness.reshape(-1, 1).expand(-1, POOLED).clone(),
        "time_ids": torch.tensor([64.0, 64.0, 0.0, 0.0, 64.0, 64.0]).repeat(count, 1),
    }


def my_samples(step: int, count: int, args: argparse.Namespace, accelerator: Accelerator) -> np.ndarray:
    """This process's samples of a batch: every epoch a permutation by (seed, epoch), shared out in
    order."""
    together = args.batch_size * accelerator.num_processes
    epoch, place = divmod(step, count // together)
    order = np.random.default_rng([args.seed, epoch]).permutation(count)
    first = place * together + accelerator.process_index * args.batch_size
    return order[first : first + args.batch_size]


class Progress:
    """How many optimizer steps are done, and on what; accelerate saves and loads it with a checkpoint."""

    def __init__(self, objective: Objective) -> None:
        self.step = 0
        self.trained = json.dumps([objective.prediction_type, objective.schedule.to_record()], sort_keys=True)

    def state_dict(self) -> dict[str, int | str]:
        return {"step": self.step, "trained": self.trained}

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        if state["trained"] != self.trained:
            raise SystemExit(
                "--resume: the checkpoint was trained with another prediction type or schedule than the "
                "flags of this run describe: give the flags that it was started with"
            )
        self.step = int(state["step"])


def predict(
    unet: torch.nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor, batch: dict[str, torch.Tensor]
) -> torch.Tensor:
    conditions = {"text_embeds": batch["pooled"], "time_ids": batch["time_ids"]}
    return unet(noisy, timesteps, batch["text"], added_cond_kwargs=conditions, return_dict=False)[0]


def main() -> None:
    args = parse_args()
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=args.log_with,
        project_dir=args.output_dir,
    )
    accelerator.init_trackers("custom_loop")
    flags = TrainingFlags.from_args(args)
    batches = accelerator.gradient_accumulation_steps  # of one optimizer step
    objective = flags.objective(
        seed=args.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        accumulation=batches,
    )
    torch.manual_seed(args.seed)
    unet = make_unet()
    unet, optimizer = accelerator.prepare(unet, torch.optim.AdamW(unet.parameters(), lr=args.learning_rate))
    data = {name: tensor.to(accelerator.device) for name, tensor in make_data().items()}
    most = len(data["latents"]) // accelerator.num_processes
    if not 1 <= args.batch_size <= most:
        raise SystemExit(
            f"--batch_size {args.batch_size}: expected 1..{most}, what the data has for a process"
        )
    held_out = {
        name: tensor.to(accelerator.device)
        for name, tensor in make_data(flags.stable_loss_images or 8, seed=1).items()
    }
    validation = Validation(objective)

    progress = Progress(objective)
    # also where the stratified draws stand
    accelerator.register_for_checkpointing(progress, objective.timesteps)
    if args.resume:
        whole = checkpoints(args.output_dir)
        if not whole:
            raise SystemExit(f"--resume: {args.output_dir} holds no checkpoint-STEP: start without it")
        accelerator.load_state(str(whole[-1]))
    elif checkpoints(args.output_dir):
        raise SystemExit(f"{args.output_dir} holds checkpoints: give --resume, or another --output_dir")
    first_step = progress.step

    losses, validated = [], {}
    for step in range(first_step, args.steps):
        loss_of_step = 0.0
        for number in range(step * batches, (step + 1) * batches):
            samples = torch.from_numpy(my_samples(number, len(data["latents"]), args, accelerator)).to(
                accelerator.device
            )
            batch = {name: tensor[samples] for name, tensor in data.items()}
            generator = torch.Generator(accelerator.device)
            generator.manual_seed(
                (args.seed * 1_000_003 + number) * accelerator.num_processes + accelerator.process_index
            )

            with accelerator.accumulate(unet):
                # noisy latents, timesteps, target: one schedule
                drawn = objective.draw(batch["latents"], generator=generator)
                loss = objective.loss(predict(unet, drawn.noisy, drawn.timesteps, batch), drawn)

                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            loss_of_step += accelerator.gather(loss.detach().reshape(1)).mean().item() / batches
        losses.append(loss_of_step)
        accelerator.log({"loss": losses[-1]}, step=step + 1)

        if flags.stable_loss_steps and (step + 1) % flags.stable_loss_steps == 0:
            # of the same images, noise and timesteps every time; the training's random numbers stay as they
            # are
            numbers = validation(
                lambda noisy, timesteps, image: predict(
                    unet, noisy, timesteps, {name: held_out[name][image] for name in held_out}
                ),
                held_out["latents"],
                models=(unet,),
                batch_size=args.batch_size,
                accelerator=accelerator,  # every process takes its share
            )
            validated[step + 1] = numbers["loss"]
            accelerator.log({f"validation/{name}": number for name, number in numbers.items()}, step=step + 1)

        if (step + 1) % args.checkpoint_every == 0:
            progress.step = step + 1
            # under another name until it is whole, so that a killed run goes on from the last whole one
            with checkpoint(args.output_dir, progress.step, accelerator, keep=2) as partial:
                accelerator.save_state(str(partial))

    weights = accelerator.get_state_dict(unet)  # whole, where FSDP deals them out
    accelerator.end_training()
    if accelerator.is_main_process:
        network = make_unet()
        network.load_state_dict(weights)
        network.save_pretrained(args.output_dir / "unet")
        # samples the trained schedule, also in stock diffusers; a pipeline's save_pretrained writes the same
        # file
        objective.schedule.scheduler("ddim", objective.prediction_type).save_pretrained(
            args.output_dir / "scheduler"
        )
        (args.output_dir / "losses.json").write_text(
            json.dumps({"first_step": first_step, "losses": losses, "validation": validated})
        )
        print(f"steps {first_step} to {args.steps}: losses {' '.join(f'{loss:.4f}' for loss in losses)}")


if __name__ == "__main__":
    main()
