"""What the experiments share: real photographs of a known brightness, a tiny U-Net of SDXL's class, and honest statistics.

The latents are the photographs' own pixels (64 x 64, folded to 8 x 8 sites of 64 channels by :func:`sdxl_fixes.demo.fold`, a rotation).
A caption says dark, middle or bright, and as with real captions that is not all: the brightness of the photographs under one caption
spreads by 0.3 around what it says. So a model that sees the brightness in its input learns to read it there.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sdxl_fixes import NoiseSchedule, Objective, demo
from sdxl_fixes.files import replacing
from sdxl_fixes.validation import Validation

DOCS = Path(__file__).resolve().parent.parent / "docs" / "evidence"
RESULTS = Path(__file__).resolve().parent / "results"
CANVAS = 64
ASKED = (-1.0, 0.0, 1.0)  # what the three captions say: 0 is middle grey, 1 a quarter of the way from black to white
SPREAD = 0.3  # standard deviation of the brightness of the photographs under one caption
STOCK = NoiseSchedule.sdxl()
SEEDS = (0, 1, 2, 3, 4)
BASE_STEPS, BATCH = 1000, 8
SETTINGS = demo.Settings(crops=512, widths=(128, 64), batch=BATCH)
SAMPLES = 12  # generated pictures per caption


# ---------------------------------------------------------------- data


class Photos:
    """Crops that can be exposed to any brightness. Crops of one seed are the same in every run."""

    def __init__(self, seed: int) -> None:
        demo.CANVAS = CANVAS
        settings = demo.Settings(**{**vars(SETTINGS), "seed": seed})
        self.logits = demo.load_photos(settings).logits  # [N, 64, 64]
        self.shifts = torch.linspace(-8, 8, 65)
        self.means = torch.stack([self._expose(self.logits, shift).mean((1, 2)) for shift in self.shifts.tolist()], 1)  # [N, 65]

    @staticmethod
    def _expose(logits: torch.Tensor, shift: Any) -> torch.Tensor:
        return (torch.sigmoid(logits + shift) - demo.GREY) / demo.UNIT

    def latents(self, index: torch.Tensor, brightness: torch.Tensor) -> torch.Tensor:
        """Crops ``index`` ([B]) of mean ``brightness`` ([B]) -> folded latents [B, 64, 8, 8]."""
        means = self.means[index]
        after = (means < brightness[:, None]).sum(1).clamp(1, len(self.shifts) - 1)
        low, high = (means.gather(1, column[:, None])[:, 0] for column in (after - 1, after))
        shift = self.shifts[after - 1] + (self.shifts[1] - self.shifts[0]) * ((brightness - low) / (high - low)).clamp(0, 1)
        return demo.fold(self._expose(self.logits[index], shift[:, None, None])[:, None])

    def draw(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """``count`` captioned photographs: latents [B, 64, 8, 8], captions [B]."""
        index = torch.randint(len(self.logits), (count,), generator=generator)
        caption = torch.randint(len(ASKED), (count,), generator=generator)
        brightness = torch.tensor(ASKED)[caption] + SPREAD * torch.randn(count, generator=generator)
        return self.latents(index, brightness.clamp(-1.8, 1.8)), caption


# ---------------------------------------------------------------- training and generating


def train(
    unet: Any,
    objective: Objective,
    photos: Photos,
    seed: int,
    steps: int,
    rate: Callable[[int], float],
    at: Sequence[int] = (),
    measure: Callable[[int], None] = lambda step: None,
) -> None:
    """AdamW. ``rate(step)`` is the learning rate; ``measure(step)`` is called after the steps ``at``. Photographs, captions, noise and
    timesteps depend on the seed alone."""
    captions = demo.embed_captions(0)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1.0)
    generator = torch.Generator().manual_seed(seed)
    for number in range(steps):
        latents, caption = photos.draw(BATCH, generator)
        step = objective.draw(latents, generator=generator)
        loss = objective.loss(unet(step.noisy, step.timesteps, **captions.conditioning(caption)).sample, step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate(number)
        optimizer.step()
        optimizer.zero_grad()
        if number + 1 in at:
            unet.eval()
            with torch.no_grad():
                measure(number + 1)
            unet.train()


def base(seed: int, work: Path, prediction_type: str = "epsilon") -> Any:
    """A U-Net trained from scratch as SDXL was, on the stock schedule; kept in ``work``."""
    from safetensors.torch import load_file, save_file

    unet = demo.build_unet(demo.Settings(**{**vars(SETTINGS), "seed": seed}))
    path = work / f"{prediction_type}-{seed}.safetensors"
    if path.exists():
        unet.load_state_dict(load_file(path))
        return unet
    rate = lambda step: 1e-3 * min(1, (step + 1) / 50, (BASE_STEPS - step) / (0.3 * BASE_STEPS))  # noqa: E731
    train(unet, Objective(STOCK, prediction_type), Photos(seed), seed, BASE_STEPS, rate)
    work.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        save_file(unet.state_dict(), file)
    return unet


@torch.no_grad()
def generate(unet: Any, scheduler: Any, seed: int, steps: int = 25, samples: int = SAMPLES, network: Any = None) -> torch.Tensor:
    """[captions, samples, 64, 64] latents, from noise that depends on the seed alone. ``network(x, t, output)`` may change the output."""
    captions = demo.embed_captions(0)
    scheduler.set_timesteps(steps)
    noise = torch.randn(samples, 64, CANVAS // 8, CANVAS // 8, generator=torch.Generator().manual_seed(seed + 1000))
    x = noise.repeat(len(ASKED), 1, 1, 1) * scheduler.init_noise_sigma
    conditioning = captions.conditioning(torch.arange(len(ASKED)).repeat_interleave(samples))
    generator = torch.Generator().manual_seed(seed + 2000)
    extra = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for t in scheduler.timesteps:
        output = unet(scheduler.scale_model_input(x, t), t, **conditioning).sample
        x = scheduler.step(output if network is None else network(x, t, output), t, x, **extra).prev_sample
    return demo.unfold(x).reshape(len(ASKED), samples, CANVAS, CANVAS)


def brightness(pictures: torch.Tensor) -> dict[str, Any]:
    """Of generated pictures [captions, samples, 64, 64]: "got" per caption, how much of the asked difference is "kept" (1 is right),
    the "spread" of the brightness under one caption over the truth (1 is right), the "contrast" inside a picture."""
    means = pictures.double().mean((2, 3))
    got = means.mean(1).tolist()
    return {
        "got": got,
        "kept": (got[-1] - got[0]) / (ASKED[-1] - ASKED[0]),
        "miss": float(np.mean([abs(a - b) for a, b in zip(got, ASKED, strict=True)])),
        "spread": float(means.var(1).mean().sqrt()) / SPREAD,
        "contrast": float(pictures.double().flatten(2).std(2).mean()),
    }


def held_out(photos: Photos, objective: Objective, unet: Any, count: int = 24) -> dict[str, float]:
    """Validation loss on exposures that were not trained on (of the same crops), at ten timesteps."""
    captions = demo.embed_captions(0)
    latents, caption = photos.draw(count, torch.Generator().manual_seed(10**6))

    def predict(noisy: torch.Tensor, t: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        return unet(noisy, t, **captions.conditioning(caption[image])).sample  # type: ignore[no-any-return]

    return Validation(objective)(predict, latents, [unet], batch_size=24)


def adapt(
    job: Job, work: Path, from_type: str, objective: Objective, steps: int, at: Sequence[int], sampler: str = "dpmpp_2m"
) -> tuple[Any, Photos, list[dict[str, Any]]]:
    """Finetune the stock checkpoint of ``from_type`` for another objective. The learning rate, 3e-4, falls to 0 over the last half.
    Returns the network, its photographs, and the measurements after the steps ``at`` (0: before training)."""
    unet, photos = base(job.seed, work, from_type), Photos(job.seed)
    curve: list[dict[str, Any]] = []

    def measure(step: int) -> None:
        pictures = generate(unet, objective.schedule.scheduler(sampler, objective.prediction_type), job.seed)
        loss = held_out(photos, objective, unet)
        curve.append({"step": step, **brightness(pictures), "loss": loss["loss_unweighted"], "terminal": loss["loss_unweighted/t999"]})

    if 0 in at:
        measure(0)
    rate = lambda step: 3e-4 * min(1, (step + 1) / 20, 2 * (steps - step) / steps)  # noqa: E731
    train(unet, objective, photos, job.seed + 100, steps, rate, at, measure)
    return unet.eval(), photos, curve


# ---------------------------------------------------------------- running


@dataclass(frozen=True)
class Job:
    """One run of one variant with one seed."""

    key: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.key}/{self.seed}"


def arguments(doc: str) -> argparse.Namespace:
    """The command line of an experiment."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each (default 2)")
    parser.add_argument("--work", type=Path, default=Path("evidence-work"), help="folder for the base checkpoints (default evidence-work)")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--only", nargs="+", help="these variants only")
    parser.add_argument("--pages", action="store_true", help="write table and plot of the finished runs, run nothing")
    return parser.parse_args()


def run(
    name: str, work: Callable[[Job, Path], dict[str, Any]], keys: Sequence[str], args: argparse.Namespace, bases: Sequence[str] = ()
) -> dict[str, list[Any]]:
    """Run what is not in benchmarks/results/NAME.json yet, and return all of it: variant -> one result per seed. ``bases`` are the
    prediction types of the stock checkpoints that the runs start from."""
    path = RESULTS / f"{name}.json"
    done: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    todo = [Job(key, seed) for seed in args.seeds for key in keys if args.only is None or key in args.only]
    todo = [] if args.pages else [job for job in todo if job.name not in done]
    RESULTS.mkdir(exist_ok=True)
    done.setdefault("versions", _versions())
    if todo:
        with multiprocessing.get_context("spawn").Pool(args.jobs, _one_thread) as pool:
            for _ in pool.starmap(_prepare, [(seed, args.work, kind) for seed in args.seeds for kind in bases]):
                pass
            for number, (job, result) in enumerate(pool.imap_unordered(_Timed(work, args.work), todo), 1):
                done[job.name] = result
                with replacing(path) as file:
                    file.write_text(json.dumps(dict(sorted(done.items())), indent=0) + "\n")
                print(f"{number}/{len(todo)} {job.name}: {result['seconds']:.0f} s", flush=True)
    with replacing(path) as file:
        file.write_text(json.dumps(dict(sorted(done.items())), indent=0) + "\n")
    return finished(name, keys, args.seeds)


def _prepare(seed: int, work: Path, prediction_type: str) -> None:
    base(seed, work, prediction_type)


def finished(name: str, keys: Sequence[str], seeds: Sequence[int] = SEEDS) -> dict[str, list[Any]]:
    """The finished runs of an experiment: variant -> one result per seed."""
    path = RESULTS / f"{name}.json"
    done = json.loads(path.read_text()) if path.exists() else {}
    found = {key: [done[f"{key}/{seed}"] for seed in seeds if f"{key}/{seed}" in done] for key in keys}
    return {key: results for key, results in found.items() if results}


class _Timed:
    """Callable of a pool's worker: (job, its result with the seconds it took)."""

    def __init__(self, work: Callable[[Job, Path], dict[str, Any]], folder: Path) -> None:
        self.work, self.folder = work, folder

    def __call__(self, job: Job) -> tuple[Job, dict[str, Any]]:
        start = time.perf_counter()
        result = self.work(job, self.folder)
        return job, {**result, "seconds": round(time.perf_counter() - start, 1)}


def _one_thread() -> None:
    torch.set_num_threads(1)


# ---------------------------------------------------------------- statistics


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % confidence interval (Student's t over seeds)."""
    from scipy.stats import t

    if len(values) < 2:
        return float(np.mean(values)), math.nan
    return float(np.mean(values)), float(t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))


def show(values: Sequence[float], digits: int = 2) -> str:
    """``0.98 ± 0.03``."""
    mean, half = interval(values)
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def change(values: Sequence[float], digits: int = 2) -> str:
    """``+0.05 ± 0.03``, bold where the interval excludes 0."""
    mean, half = interval(values)
    text = f"{mean:+.{digits}f} ± {half:.{digits}f}"
    return f"**{text}**" if abs(mean) > half else text


def about(name: str) -> str:
    """What the numbers of an experiment's page are."""
    return f"mean and 95 % interval over seeds {', '.join(map(str, SEEDS))} ({versions(name)})"


def versions(name: str) -> str:
    """What an experiment was run with, for its page."""
    return str(json.loads((RESULTS / f"{name}.json").read_text())["versions"])


def _versions() -> str:
    import diffusers

    return f"torch {torch.__version__.split('+')[0]}, diffusers {diffusers.__version__}, {os.cpu_count()} CPU cores"


def text(found: dict[str, list[Any]], page: Callable[[dict[str, list[Any]]], list[str]]) -> str:
    """A page: a function of the results alone."""
    seconds = sum(result["seconds"] for results in found.values() for result in results)
    return "\n".join([*page(found), "", f"{sum(map(len, found.values()))} runs, {seconds / 60:.0f} minutes of one core.", ""])


def experiment(
    name: str,
    doc: str | None,
    work: Callable[[Job, Path], dict[str, Any]],
    keys: Sequence[str],
    page: Callable[[dict[str, list[Any]]], list[str]],
    plot: Callable[[dict[str, list[Any]]], Any] | None = None,
    bases: Sequence[str] = (),
) -> None:
    """The main of an experiment: runs what is missing, then writes docs/evidence/NAME.md and NAME.png."""
    args = arguments(doc or "")
    found = run(name, work, keys, args, bases)
    DOCS.mkdir(parents=True, exist_ok=True)
    (DOCS / f"{name}.md").write_text(text(found, page), encoding="utf-8")
    if plot is not None:
        import matplotlib

        matplotlib.use("Agg")
        figure = plot(found)
        figure.tight_layout()
        figure.savefig(DOCS / f"{name}.png", dpi=80)
