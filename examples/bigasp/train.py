"""SDXL's U-Net, and text encoder 1 if asked for, trained on a store of latents.

    accelerate launch examples/bigasp/train.py --table scored.parquet --latents latents --output out
        --model stabilityai/stable-diffusion-xl-base-1.0 --samples 40000000 --prediction_type v_prediction
        --zero_terminal_snr --min_snr_gamma 5 --ema_decay 0.9999 ...
    accelerate launch --num_processes 8 ...         the same steps, shared out
    ... --resume                                    goes on from the last checkpoint in --output

Counted are samples: pictures seen. A step's pictures, prompts, noise and timesteps are functions of (seed,
step), so a training that was killed goes on as if it had not been, on the CPU to the last bit; on another
number of processes, or with another --batch_size, it does the same steps but for rounding.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import feed
import network
import numpy as np
import state
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from loader import Pictures
from prompt import Prompts
from settings import parse_args, prompts

from sdxl_fixes.errors import FixError, FlagError
from sdxl_fixes.flags import TrainingFlags
from sdxl_fixes.log import world_size
from sdxl_fixes.objective import Objective
from sdxl_fixes.sample_table import SampleTable
from sdxl_fixes.trainers.checkpoints import checkpoint, checkpoints
from sdxl_fixes.trainers.ema import Average, check_average
from sdxl_fixes.trainers.fixed_loss import Called, check_whole, fixed_loss
from sdxl_fixes.validation import Validation


def rate(seen: float, args: argparse.Namespace) -> float:
    """The learning rate after ``seen`` samples: linear warm-up, then a cosine to 0."""
    if seen < args.warmup:
        return float(args.learning_rate * seen / args.warmup)
    share = min(1.0, (seen - args.warmup) / max(1, args.samples - args.warmup))
    return float(args.learning_rate * 0.5 * (1 + math.cos(math.pi * share)))


def set_rate(optimizer: Any, value: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):  # torchao's
            group["lr"].fill_(value)
        else:
            group["lr"] = value


def suit_engine(accelerator: Accelerator, args: argparse.Namespace, shares: feed.Shares) -> None:
    """Refuse what the engine that deals out the training cannot do, and tell DeepSpeed what it takes from a
    config of its own."""
    if args.ema_decay:
        check_average(accelerator)
    for name in ("heldout", "stable"):
        if getattr(args, name):
            check_whole(accelerator, f"--{name}")
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is None:
        return
    if plugin.zero_stage != 2:
        raise SystemExit(
            f"DeepSpeed ZeRO-{plugin.zero_stage} has not been run with train.py: take ZeRO-2 "
            "(configs/deepspeed_zero2.yaml), or FSDP2 (configs/fsdp.yaml), which also deals out the weights"
        )
    if args.precision == "bf16":
        raise SystemExit(
            "--precision bf16: DeepSpeed steps float32 copies of the weights, which are not rounded "
            "stochastically: take --precision amp or fp32"
        )
    plugin.deepspeed_config |= {
        "gradient_clipping": args.max_grad_norm,
        "gradient_accumulation_steps": shares.accumulation,
        "train_micro_batch_size_per_gpu": shares.alone,
    }


class Fixed:
    """A loss on some pictures that is the same whenever the network is: same prompts, noise and timesteps."""

    def __init__(
        self, pictures: Pictures, places: np.ndarray, objective: Objective, accelerator: Accelerator
    ) -> None:
        self.total, self.validation, self.accelerator = len(places), Validation(objective), accelerator
        mine = places[accelerator.process_index :: accelerator.num_processes].tolist()
        self.samples = []
        for place in mine:
            batch = pictures.collate([pictures[place, 0]])
            told = tuple(batch[name][0] for name in ("ids", "ids_2", "time_ids"))
            self.samples.append((place, batch["latents"][0].float(), (told, {})))

    def __call__(self, net: network.Network, batch_size: int) -> dict[str, float]:
        called = Called(net, torch.float32, batch_size)
        return fixed_loss(self.validation, self.samples, self.total, called, self.accelerator)


class Training:
    """What is trained, on what, and how far it is."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.flags = args, TrainingFlags.from_args(args)
        found = checkpoints(args.output)
        if args.resume and not found:
            raise SystemExit(f"--resume: {args.output} holds no checkpoint-N: start without it")
        if found and not args.resume:
            raise SystemExit(f"{args.output} holds checkpoints: give --resume, or another --output")
        self.state = state.read(found[-1]) if found else None
        args.planned_batch = args.planned_batch or (self.state or {}).get("planned_batch") or args.batch_size
        self.shares = feed.Shares(args.global_batch, args.planned_batch, args.batch_size, world_size())
        if args.precision == "bf16" and self.shares.accumulation > 64:
            raise SystemExit(
                f"--precision bf16: {self.shares.accumulation} gradients would be summed in bfloat16, where "
                "small ones are lost (64 at most): give a larger --batch_size, more processes, or "
                "--precision amp"
            )
        self.accelerator = Accelerator(
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=timedelta(hours=3)),  # the others wait while one saves
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            ],
            mixed_precision="bf16" if args.precision == "amp" else "no",
            gradient_accumulation_steps=self.shares.accumulation,
            log_with=args.log_with,
            project_dir=args.output,
        )
        suit_engine(self.accelerator, args, self.shares)
        steps = args.global_batch // args.planned_batch
        self.objective = self.flags.objective(seed=args.seed, accumulation=steps)
        self.lasting = state.lasting(args, self.flags, self.objective, self.accelerator)
        if self.state:
            state.refuse_other(found[-1], self.state["lasting"], self.lasting)
        self.step = self.samples = 0
        self._read_pictures()
        if found:
            self._find_place(found[-1])
        net = network.load(args, self.accelerator.device)
        self.network, self.optimizer = self.accelerator.prepare(net, network.optimizer(net, args))
        self.ema = Average(self.flags.ema_decay) if self.flags.ema_decay else None
        if found:
            self._resume(found[-1])
        self._begin_logs()
        if args.warmup >= args.samples:
            self.accelerator.print(
                f"--warmup {args.warmup} is not below --samples {args.samples}: the learning rate ends at "
                f"{rate(args.samples, args):.3g}, still rising"
            )
        each, shares = "process" if self.shares.world == 1 else "processes", self.shares
        self.accelerator.print(
            f"{len(self.feed.places)} pictures; {shares.together} an optimizer step: {shares.world} {each} x "
            f"{shares.alone} x {shares.accumulation} accumulated"
        )

    @property
    def net(self) -> network.Network:
        found: network.Network = self.accelerator.unwrap_model(self.network)
        return found

    def _begin_logs(self) -> None:
        """One line a step, also after a kill, and the tracker's own run where it can go on: wandb by the
        run's id in the state, tensorboard in its folder."""
        args, accelerator, before = self.args, self.accelerator, self.state
        self.run = before["run"] if before else uuid.uuid4().hex
        if accelerator.is_main_process:
            if before is None:
                aside = state.set_aside(args.output, bool(args.sample_prompts))
                if aside:
                    print(f"a training that was not saved left its log or samples: now {', '.join(aside)}")
            elif again := state.cut_log(args.output, self.samples):
                print(f"{state.LOG}: {again} line(s) after the checkpoint are trained again")
        if before and (other := state.changed(before["flags"], state.plain_flags(args))):
            accelerator.print(f"goes on with {other}")
        if before and args.log_with not in (None, "wandb", "tensorboard"):
            accelerator.print(f"--log_with {args.log_with}: going on is a new run there")
        options = {
            "wandb": {"id": self.run, "resume": "allow"},
            "tensorboard": {"purge_step": self.samples + 1 if before else None},
        }
        accelerator.init_trackers("bigasp", config=state.plain_flags(args), init_kwargs=options)

    def _read_pictures(self) -> None:
        args = self.args
        pictures = Pictures(args.table, args.latents, args.model, Prompts(args.seed))
        if not 0 <= args.heldout < len(pictures) or not 0 <= args.stable <= len(pictures) - args.heldout:
            raise SystemExit(
                f"--heldout {args.heldout} and --stable {args.stable}: the store has {len(pictures)} pictures"
            )
        order = feed.shuffled(len(pictures), args.seed)
        held_out, trained = order[: args.heldout], np.sort(order[args.heldout :])
        stable = order[args.heldout :][: args.stable]
        self.feed = feed.Feed(
            pictures, trained, self.objective, self.shares, self.accelerator.process_index, args.seed
        )
        sets = {"heldout": held_out, "stable_loss": stable}
        self.fixed = {
            n: Fixed(pictures, p, self.objective, self.accelerator) for n, p in sets.items() if len(p)
        }

    def _find_place(self, folder: Path) -> None:
        assert self.state is not None
        self.step, self.samples = self.state["step"], self.state["samples"]
        try:
            self.feed.load(self.step, self.state["feed"])
        except ValueError as error:
            raise SystemExit(
                f"--resume: {folder} was trained on another --table or --latents: {error}"
            ) from error

    def _resume(self, folder: Path) -> None:
        assert self.state is not None
        self.accelerator.load_state(str(folder))
        for group in self.optimizer.param_groups:  # a state's are the old flags'
            group["weight_decay"] = self.args.weight_decay
            if "fused" in group:
                group["fused"] = self.args.fused_adamw
            for moments in (self.optimizer.state.get(p, {}) for p in group["params"]):
                if group.get("fused") and "step" in moments:  # a state that was not fused has it on the CPU
                    moments["step"] = moments["step"].to(moments["exp_avg"].device, torch.float32)
        self.accelerator.step = 0  # every process begins an optimizer step, however many batches it has
        if self.ema:
            self.ema.load(folder)

    def save(self) -> None:
        with checkpoint(self.args.output, self.samples, self.accelerator, self.args.keep) as folder:
            self.accelerator.save_state(str(folder))
            self._save_model(folder / "model")
            if self.ema:
                self.ema.save(folder)
                with self.ema.applied():
                    self._save_model(folder / "model_ema")
            if self.accelerator.is_main_process:
                progress = {
                    "step": self.step,
                    "samples": self.samples,
                    "planned_batch": self.shares.planned,
                    "feed": self.feed.states[self.step],
                    "run": self.run,
                    "lasting": self.lasting,
                    "flags": state.plain_flags(self.args),
                }
                (folder / state.FILE).write_text(json.dumps(progress))

    def _save_model(self, folder: Path) -> None:
        weights = self.accelerator.get_state_dict(self.network)
        if self.accelerator.is_main_process:
            network.save(network.pipeline(self.net, weights, self.args, to_save=True), folder, self.objective)

    def draw_samples(self) -> None:
        """A column of the sample table."""
        weights = self.accelerator.get_state_dict(self.network)
        if self.accelerator.is_main_process:
            lines = prompts(self.args.sample_prompts)
            pipe = network.pipeline(self.net, weights, self.args)
            with self.accelerator.autocast():
                drawn = network.samples(pipe, lines, self.objective, self.args, self.accelerator.device)
                table = SampleTable(self.args.output / "samples.html", str(self.args.output))
                table.update((f"{self.samples} samples", *each) for each in drawn)
        self.accelerator.wait_for_everyone()

    def evaluate(self) -> dict[str, float]:
        """The fixed losses, also of the average where there is one."""
        numbers: dict[str, float] = {}
        for name, fixed in self.fixed.items():
            losses = {name: fixed(self.net, self.args.batch_size)}
            if self.ema:
                with self.ema.applied():
                    losses[f"{name}_ema"] = fixed(self.net, self.args.batch_size)
            numbers |= {f"{what}/{n}": value for what, each in losses.items() for n, value in each.items()}
        return numbers

    def steps(self) -> Iterator[dict[str, float]]:
        """An optimizer step each, and what is logged of it."""
        accelerator, shares, device = self.accelerator, self.shares, self.accelerator.device
        total, start = torch.zeros((), device=device), time.perf_counter()
        for batch in feed.loader(self.feed, self.objective, self.args.workers):
            batch = {
                n: t.to(device, non_blocking=True) for n, t in batch.items() if isinstance(t, torch.Tensor)
            }
            step, count = feed.drawn_step(batch), self.feed.states[self.step + 1]["count"]
            with accelerator.accumulate(self.network):
                told = (batch["ids"], batch["ids_2"], batch["time_ids"])
                prediction = self.network(step.noisy, step.timesteps, *told)
                # the mean over the step's pictures, whoever trains them: accelerate takes that of the
                # batches and of the processes
                loss = (self.objective.loss(prediction, step, reduction="none") * batch["weight"]).sum()
                lr = rate(self.samples + min(count, self.args.samples - self.samples) / 2, self.args)
                set_rate(self.optimizer, lr)  # before the backward pass, in which DeepSpeed steps
                torch.manual_seed(self.args.seed + self.step)  # stochastic rounding is everywhere the same
                accelerator.backward(loss * shares.accumulation * shares.world)
                total += loss.detach()
                if accelerator.sync_gradients:
                    norm = float(
                        accelerator.clip_grad_norm_(self.network.parameters(), self.args.max_grad_norm)
                    )
                    if not math.isfinite(norm):
                        raise SystemExit(
                            f"step {self.step + 1}: the gradients are not finite; nothing was saved since: "
                            "go on from the last checkpoint (--resume) with a lower --learning_rate"
                        )
                self.optimizer.step()
                self.optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            self.feed.states.pop(self.step, None)
            self.step, self.samples = self.step + 1, self.samples + count
            if self.ema:
                self.ema.update(accelerator)
            mean, end = accelerator.reduce(total, "sum").item(), time.perf_counter()
            yield {"loss": mean, "norm": norm, "rate": lr, "samples_per_second": count / (end - start)}
            total.zero_()
            start = time.perf_counter()


def run(training: Training) -> None:
    args, accelerator = training.args, training.accelerator

    def log(numbers: dict[str, float]) -> None:
        accelerator.log(numbers, step=training.samples)
        if accelerator.is_main_process:
            with open(args.output / state.LOG, "a") as out:
                out.write(json.dumps({"step": training.step, "samples": training.samples, **numbers}) + "\n")

    if training.step == 0 and training.fixed:
        log(training.evaluate())
    if training.step == 0 and args.sample_prompts:
        training.draw_samples()  # what it begins with; what cannot be drawn is found out now
    before = training.samples
    steps = training.steps() if before < args.samples else ()
    for numbers in steps:
        log(numbers)
        last = training.samples >= args.samples

        def due(every: int, before: int = before, last: bool = last) -> bool:
            return last or training.samples // every > before // every

        if training.fixed and due(args.evaluate_every):
            log(training.evaluate())
        if due(args.checkpoint_every):
            training.save()
        if args.sample_prompts and due(args.sample_every):
            training.draw_samples()
        before = training.samples
        if last:
            break
    accelerator.end_training()
    accelerator.print(
        f"{training.samples} samples in {training.step} steps: {checkpoints(args.output)[-1]}/model"
    )


def main() -> None:
    try:
        run(Training(parse_args()))
    except (FixError, FlagError) as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
