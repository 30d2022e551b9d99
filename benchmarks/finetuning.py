"""The fixes judged as users meet them: tiny-sdxl, a checkpoint trained as SDXL was (epsilon, stock schedule),
finetuned with and without them.

python benchmarks/finetuning.py run [--experiment E] [--seeds 1 2 3] [--length 0 1 4 16]
python benchmarks/finetuning.py page      writes docs/evidence/finetuning.md and its plots

A run is one arm with one seed for length x STEPS steps of BATCH. Arms of a seed see the same pictures, noise
and timesteps. Each finished run is a line of benchmarks/results/finetuning.jsonl: kill it and start it again.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lab
import numpy as np
import pairing
import pictures
import torch

from sdxl_fixes import InputPerturbation, MinSNR, NoiseSchedule, Objective, ScheduledHuber
from sdxl_fixes.demo.world import OBJECTS, PLACES, fold, load_tiny_sdxl, load_world
from sdxl_fixes.densities import Beta, LogitNormal
from sdxl_fixes.loss import LossFunction
from sdxl_fixes.schedule import Array
from sdxl_fixes.timesteps import TimestepSampler
from sdxl_fixes.validation import Validation
from sdxl_fixes.weighting import Weighting

RESULTS = lab.RESULTS / "finetuning.jsonl"
# RATE is the peak of the checkpoint's own training. Seed 0, which is in no mean, says why not less: after 100
# steps to v at zero SNR its held-out error was 0.61, with 3e-4 1.26 (of an earlier state of the checkpoint)
STEPS, BATCH, RATE = 400, 16, 1e-3
ANCESTRAL = ("terminal", "perturbation")  # experiments that are sampled with euler_a, too
STOCK = NoiseSchedule.sdxl()
SCHEDULES = {
    "14.6": STOCK,
    **{
        f"{sigma} {method}": STOCK.with_terminal_sigma(sigma, method)
        for sigma in (100, 300)
        for method in ("rescale", "beta_end")
    },
    "zero SNR": STOCK.zero_terminal_snr(),
}

# ---------------------------------------------------------------- arms


@dataclass(frozen=True)
class AtTheEnd(Weighting):
    """Another weight's (None: 1), but ``value`` at the smallest SNR of the table."""

    inner: Weighting | None
    value: float

    def __call__(self, snr: Array, prediction_type: str) -> Array:
        inner = np.ones(np.shape(snr)) if self.inner is None else self.inner(snr, prediction_type)
        return np.where(snr == np.min(snr), self.value, inner)


@dataclass(frozen=True)
class AtLeast(Weighting):
    """Another weight's, but no less than ``least``."""

    inner: Weighting
    least: float

    def __call__(self, snr: Array, prediction_type: str) -> Array:
        return np.maximum(self.inner(snr, prediction_type), self.least)


@dataclass(frozen=True)
class Arm:
    """One way of finetuning."""

    experiment: str
    name: str
    prediction_type: str = "v_prediction"
    schedule: str = "zero SNR"
    weighting: Weighting | None = None
    loss: LossFunction | None = None
    perturbation: InputPerturbation | None = None
    draws: dict[str, Any] = field(default_factory=dict)  # of the TimestepSampler
    told: bool = False  # the output is multiplied by the input's scale (see Told)
    dirty: float = 0.0  # share of the samples whose caption is another's
    paired: int = 1  # the noise is the nearest of so many

    def objective(self) -> Objective:
        schedule = SCHEDULES[self.schedule]
        return Objective(
            schedule,
            self.prediction_type,
            self.loss,
            self.weighting,
            self.perturbation,
            timesteps=TimestepSampler(schedule, **self.draws),
        )


TEXTBOOK = MinSNR(5)
WEIGHTS: dict[str, Weighting | None] = {
    "textbook": TEXTBOOK,
    "floor": MinSNR(5, floor=True),
    "textbook, 1 at 999": AtTheEnd(TEXTBOOK, 1.0),
    "none, 0 at 999": AtTheEnd(None, 0.0),
    "textbook, at least .1": AtLeast(TEXTBOOK, 0.1),
}
HUBER = ScheduledHuber("huber", "snr", c=0.1)


def _arms() -> list[Arm]:
    """All arms, the most telling first."""
    terminal = [
        Arm("terminal", f"{short} {name}", kind, name)
        for name in ("14.6", "300 beta_end", "zero SNR", "300 rescale", "100 beta_end", "100 rescale")
        for short, kind in (("eps", "epsilon"), ("v", "v_prediction"))
        if (short, name) != ("eps", "zero SNR")
    ]
    told = [
        Arm("terminal", f"eps {name}, told the scale", "epsilon", name, told=True)
        for name in ("300 beta_end", "14.6")
    ]
    weights = [
        Arm("min-SNR", f"{schedule}: {name}", schedule=schedule, weighting=weighting)
        for name, weighting in WEIGHTS.items()
        for schedule in ("zero SNR", "14.6")
    ]
    huber = [
        Arm("Huber", "l2, 15 % wrong captions", dirty=0.15),
        Arm("Huber", "huber, 15 % wrong captions", dirty=0.15, loss=HUBER),
        Arm("Huber", "huber, clean", loss=HUBER),
    ]
    perturbed = [
        Arm("perturbation", "v, .1", perturbation=InputPerturbation(0.1)),
        Arm("perturbation", "eps, .1", "epsilon", "14.6", perturbation=InputPerturbation(0.1)),
    ]
    paired = [Arm("pairing", f"nearest of {k}", paired=k) for k in (4, 64)]
    draws = {
        "999 only": {"min_timestep": 999},
        "terminal share .3": {"terminal_share": 0.3},
        "logit_normal": {"density": LogitNormal()},
        "beta": {"density": Beta()},
        "stratified": {"stratified": True},
    }
    timesteps = [Arm("timesteps", name, draws=how) for name, how in draws.items()]
    return [*terminal, *told, *weights[:6], *huber, *paired, *perturbed, *timesteps, *weights[6:]]


ARMS = _arms()
EXPERIMENTS = list(dict.fromkeys(arm.experiment for arm in ARMS))
# what each arm is compared with: one that differs from it in one thing
REFERENCE = {
    "min-SNR": lambda arm: f"v {arm.schedule}",
    "Huber": lambda arm: "v zero SNR" if not arm.dirty else "l2, 15 % wrong captions",
    "perturbation": lambda arm: "v zero SNR" if arm.prediction_type == "v_prediction" else "eps 14.6",
    "pairing": lambda arm: "v zero SNR",
    "timesteps": lambda arm: "v zero SNR",
    "terminal": lambda arm: arm.name.split(",")[0] if arm.told else f"{arm.name.split()[0]} 14.6",
}
# arms whose verdict more steps could turn
LONGER = [arm for arm in ARMS if arm.experiment in ("terminal", "min-SNR", "Huber")]
LONGEST = [
    arm for arm in ARMS if arm.name in ("eps 14.6", "eps 300 beta_end", "v zero SNR", "zero SNR: textbook")
]


@dataclass(frozen=True)
class Job:
    arm: Arm
    seed: int
    length: int

    @property
    def key(self) -> tuple[str, str, int, int]:
        return self.arm.experiment, self.arm.name, self.seed, STEPS * self.length


def by_worth(seeds: Sequence[int] = (1, 2, 3, 4, 5), lengths: Sequence[int] = (0, 1, 4, 16)) -> list[Job]:
    """All runs: the checkpoint as it is, the whole matrix with two seeds, four times the steps where the sign
    could turn, more seeds, then sixteen times of four arms."""
    first, more = (1, 2), [seed for seed in seeds if seed not in (1, 2)]
    stock = next(arm for arm in ARMS if arm.name == "eps 14.6")
    order = [Job(stock, seed, 0) for seed in (*first, *more)]
    order += [Job(arm, seed, 1) for seed in first for arm in ARMS]
    order += [Job(arm, seed, 4) for seed in first for arm in LONGER]
    for seed in more:
        order += [Job(arm, seed, 1) for arm in ARMS] + [Job(arm, seed, 4) for arm in LONGER]
    order += [Job(arm, seed, 16) for seed in first for arm in LONGEST]
    return [job for job in order if job.seed in seeds and job.length in lengths]


# ---------------------------------------------------------------- a run


class Told(torch.nn.Module):
    """A network whose output is multiplied by how large its input is, over what is expected at the timestep:
    a network that sees its input only through normalisations is blind to that, this one is not. Nothing is
    trained for it, and an input of the expected size gives the old output. ``energy`` is the latents' mean
    square."""

    def __init__(self, unet: Any, schedule: NoiseSchedule, energy: float) -> None:
        super().__init__()
        self.unet = unet
        alpha, sigma, _ = schedule.levels()
        self.expected = torch.from_numpy(np.sqrt(alpha**2 * energy + sigma**2)).float()

    def forward(self, x: torch.Tensor, t: torch.Tensor, conditioning: dict[str, Any]) -> torch.Tensor:
        size = x.float().square().mean((1, 2, 3)).sqrt() / self.expected[t.long()]
        output: torch.Tensor = self.unet(x, t, **conditioning).sample
        return output * size[:, None, None, None]


class Plain(torch.nn.Module):
    """The U-Net, called as :class:`Told` is."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: torch.Tensor, t: torch.Tensor, conditioning: dict[str, Any]) -> torch.Tensor:
        output: torch.Tensor = self.unet(x, t, **conditioning).sample
        return output


def finetune(network: Any, arm: Arm, seed: int, steps: int) -> float | None:
    """AdamW, gradients clipped at norm 1, bfloat16 autocast as in the checkpoint's own training; returns the
    mean loss of the last tenth. Pictures, noise and timesteps depend on the seed alone."""
    world, objective = load_world(), arm.objective()
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, fused=True)
    drawn, noised, extra = (torch.Generator().manual_seed(seed + 10**5 * part) for part in range(3))
    network.train()
    losses = []
    for number in range(steps):
        latents, objects, places = world.draw(BATCH, drawn)
        if arm.dirty:
            wrong = torch.rand(BATCH, generator=extra) < arm.dirty
            objects = torch.where(wrong, torch.randint(len(OBJECTS), (BATCH,), generator=extra), objects)
            places = torch.where(wrong, torch.randint(len(PLACES), (BATCH,), generator=extra), places)
        noise = torch.randn(latents.shape, generator=noised)
        index = objective.timesteps.draw(BATCH, generator=noised)
        noise = pairing.nearest(latents, noise, arm.paired, extra)
        step = objective.draw(latents, generator=extra, index=index, noise=noise)
        with torch.autocast("cpu", torch.bfloat16):
            output = network(step.noisy, step.timesteps, world.conditioning(objects, places))
        loss = objective.loss(output.float(), step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (number + 1) / 20, 2 * (steps - number) / steps)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    network.eval()
    return float(np.mean(losses[-max(1, steps // 10) :])) if losses else None


@torch.no_grad()
def generate(
    network: Any, objective: Objective, sampler: str, seed: int, objects: torch.Tensor, places: torch.Tensor
) -> torch.Tensor:
    """Latents [B, CHANNELS, 8, 8] for captions: 25 steps without guidance, in float32, from the seed's
    noise."""
    conditioning = load_world().conditioning(objects, places)
    scheduler = objective.schedule.scheduler(sampler, objective.prediction_type)
    scheduler.set_timesteps(25)
    generator = torch.Generator().manual_seed(seed + 1000)
    x = torch.randn(len(objects), pictures.CHANNELS, 8, 8, generator=generator) * scheduler.init_noise_sigma
    extra = {"generator": generator} if sampler == "euler_a" else {}
    for t in scheduler.timesteps:
        told = torch.as_tensor(t).expand(len(objects))
        x = scheduler.step(
            network(scheduler.scale_model_input(x, t), told, conditioning), t, x, **extra
        ).prev_sample
    return x


def measure(network: Any, arm: Arm, seed: int, truth: pictures.Truth) -> dict[str, Any]:
    """Samples judged, by sampler; held-out errors; the response to the input's scale."""
    objective, world = arm.objective(), load_world()
    objects, places = pictures.captions()
    found: dict[str, Any] = {}
    for sampler, every in (("dpmpp_2m", 1), ("euler_a", 2)):
        if sampler == "euler_a" and arm.experiment not in ANCESTRAL:
            continue
        part = slice(None, None, every)
        latents = generate(network, objective, sampler, seed, objects[part], places[part])
        found[sampler] = truth.judge(latents, objects[part], places[part])
    held, their_objects, their_places = world.draw(48, torch.Generator().manual_seed(10**6 + 1))
    conditioning = world.conditioning(their_objects, their_places)

    def predict(noisy: torch.Tensor, t: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = network(
            noisy, t, world.conditioning(their_objects[image], their_places[image])
        )
        return output

    errors = Validation(objective)(predict, held, [network], batch_size=48)
    found["error"], found["error_last"] = errors["loss_unweighted"], errors["loss_unweighted/t999"]
    found |= pictures.response(lambda x, t: network(x, t, conditioning), objective, held)
    return found


def run(job: Job, truth: pictures.Truth) -> dict[str, Any]:
    """The line of one run."""
    start, unet = time.process_time(), load_tiny_sdxl()
    network = (
        Told(unet, SCHEDULES[job.arm.schedule], float(truth.latents.square().mean()))
        if job.arm.told
        else Plain(unet)
    )
    loss = finetune(network, job.arm, job.seed, STEPS * job.length)
    found = measure(network, job.arm, job.seed, truth)
    experiment, arm, seed, steps = job.key
    key = {"experiment": experiment, "arm": arm, "seed": seed, "steps": steps}
    return {**key, **found, "loss": loss, "seconds": round(time.process_time() - start, 1)}


def truth_line(truth: pictures.Truth) -> dict[str, Any]:
    """What the measures say of the world's own pictures; the mean square "energy" of their latents, and the
    "brightness_share" of it that the canvas's mean brightness has (benchmarks/pairing.py)."""
    objects, places = pictures.captions()
    latents = fold(load_world().pictures(objects, places, torch.Generator().manual_seed(10**6 + 2)))
    judged = truth.judge(latents, objects, places)
    mean = truth.latents[:, 0].mean((1, 2)) * truth.latents.shape[-1]
    length = truth.latents.flatten(1).square().sum(1).mean()
    return {
        **{"experiment": "truth", "arm": "pictures", "seed": 0, "steps": 0},
        **{"dpmpp_2m": judged, "euler_a": judged},
        "energy": float(truth.latents.square().mean()),
        "brightness_share": float(mean.var() / length),
    }


# ---------------------------------------------------------------- the record


def checkpoint() -> str:
    """The first digits of the SHA-256 of tiny-sdxl's weights and of the settings, which all lines of a record
    share."""
    from sdxl_fixes.demo.world import DATA

    weights = (DATA / "tiny-sdxl" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    return hashlib.sha256(weights + repr((BATCH, RATE)).encode()).hexdigest()[:12]


def record(path: Path = RESULTS) -> list[dict[str, Any]]:
    """The finished runs. A last line that a kill cut off is left out."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def append(line: dict[str, Any], path: Path) -> None:
    """Write one run behind the others, over what a kill cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    with path.open("r+b") as file:
        file.seek(file.read().rfind(b"\n") + 1)
        file.truncate()
        file.write(json.dumps(line).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def missing(jobs: Sequence[Job], path: Path, weights: str) -> Iterator[Job]:
    """The jobs that have no line yet; the record is read again before each. Raises SystemExit for a record of
    another checkpoint."""
    for job in jobs:
        done = record(path)
        if any(line["checkpoint"] != weights for line in done):
            raise SystemExit(
                f"{path} was made with another checkpoint or other settings than {weights}: move it away "
                "to start anew"
            )
        if job.key not in [(line["experiment"], line["arm"], line["seed"], line["steps"]) for line in done]:
            yield job


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Only one process at a time writes to ``path``."""
    import fcntl

    with path.with_suffix(".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SystemExit(f"{path}: another process writes to it; wait for it or end it") from None
        yield


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("run", "page"))
    parser.add_argument("--experiment", choices=EXPERIMENTS, nargs="+", default=EXPERIMENTS)
    parser.add_argument("--arm", nargs="+", help="these arms only, by name")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--length", type=int, nargs="+", choices=(0, 1, 4, 16), default=[0, 1, 4, 16])
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help=f"default {RESULTS.name} in benchmarks/results"
    )
    parser.add_argument("--work", type=Path, default=Path("evidence-work"), help="folder for the classifier")
    args = parser.parse_args()
    if args.what == "page":
        import finetuning_page

        return finetuning_page.write(record(args.results))
    torch.set_num_threads(1)
    jobs = [
        job
        for job in by_worth(args.seeds, args.length)
        if job.arm.experiment in args.experiment and (args.arm is None or job.arm.name in args.arm)
    ]
    args.work.mkdir(parents=True, exist_ok=True)
    with alone(args.work / args.results.name):
        truth = pictures.Truth.load(load_world(), pictures.classifier(args.work))
        weights = checkpoint()
        if not record(args.results):
            append({**truth_line(truth), "checkpoint": weights, "versions": versions()}, args.results)
        for job in missing(jobs, args.results, weights):
            line = run(job, truth)
            append({**line, "checkpoint": weights, "versions": versions()}, args.results)
            print(*job.key, f"{line['seconds']:.0f} s", flush=True)


def versions() -> str:
    """What a run was made with."""
    import diffusers

    return f"torch {torch.__version__}, diffusers {diffusers.__version__}"


if __name__ == "__main__":
    main()
