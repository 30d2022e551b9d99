"""What the experiments share: real photographs of a known brightness, a tiny U-Net of SDXL's class, and honest statistics.

Data, network and training are those of the demo (sdxl_fixes/demo.py), which for seed 0 repeats the first runs here. A caption says dark,
middle or bright, and as with real captions that is not all: the brightness of the photographs under one caption spreads by 0.3 around what
it says. So a model that sees the brightness in its input learns to read it there.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sdxl_fixes import NoiseSchedule, Objective, demo
from sdxl_fixes.files import replacing
from sdxl_fixes.validation import Validation

DOCS = Path(__file__).resolve().parent.parent / "docs" / "evidence"
RESULTS = Path(__file__).resolve().parent / "results"
CANVAS, SPREAD, ASKED = demo.CANVAS, demo.SPREAD, tuple(demo.CAPTIONS.values())
STOCK = NoiseSchedule.sdxl()
SEEDS = (0, 1, 2, 3, 4)
SETTINGS = demo.Settings()
BASE_STEPS, BATCH, SAMPLES = SETTINGS.steps, SETTINGS.batch, SETTINGS.samples


# ---------------------------------------------------------------- training and generating


def photos(seed: int) -> demo.Photos:
    """The crops of a seed."""
    return demo.load_photos(replace(SETTINGS, seed=seed))


def base(seed: int, work: Path, prediction_type: str = "epsilon") -> Any:
    """A U-Net trained from scratch as SDXL was, on the stock schedule; kept in ``work``."""
    from safetensors.torch import load_file, save_file

    unet = demo.build_unet(replace(SETTINGS, seed=seed))
    path = work / f"{prediction_type}-{seed}.safetensors"
    if path.exists():
        unet.load_state_dict(load_file(path))
        return unet
    rates = demo.rates(SETTINGS.learning_rate, BASE_STEPS, 50, 0.3)
    for _ in demo.train(unet, Objective(STOCK, prediction_type), photos(seed), demo.embed_captions(0), seed, rates):
        pass
    work.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        save_file(unet.state_dict(), file)
    return unet


def generate(unet: Any, scheduler: Any, seed: int, network: Any = None) -> torch.Tensor:
    """[captions, SAMPLES, 64, 64] latents in 25 steps, from noise that depends on the seed alone."""
    return demo.sample(unet, scheduler, demo.embed_captions(0), seed, SAMPLES, 25, lambda work, name: iter(work), network)


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


def held_out(photos: demo.Photos, objective: Objective, unet: Any, count: int = 24) -> dict[str, float]:
    """Validation loss on exposures that were not trained on (of the same crops), at ten timesteps."""
    captions = demo.embed_captions(0)
    latents, caption = photos.draw(count, torch.Generator().manual_seed(10**6))

    def predict(noisy: torch.Tensor, t: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        return unet(noisy, t, **captions.conditioning(caption[image])).sample  # type: ignore[no-any-return]

    return Validation(objective)(predict, latents, [unet], batch_size=24)


def adapt(
    job: Job, work: Path, from_type: str, objective: Objective, steps: int, at: Sequence[int], sampler: str = "dpmpp_2m"
) -> tuple[Any, list[dict[str, Any]]]:
    """Finetune the stock checkpoint of ``from_type`` for another objective, as the demo does. Returns the network and the measurements
    after the steps ``at`` (0: before training)."""
    unet, crops = base(job.seed, work, from_type).eval(), photos(job.seed)
    curve: list[dict[str, Any]] = []

    def measure(step: int) -> None:
        unet.eval()
        pictures = generate(unet, objective.schedule.scheduler(sampler, objective.prediction_type), job.seed)
        loss = held_out(crops, objective, unet)
        curve.append({"step": step, **brightness(pictures), "loss": loss["loss_unweighted"], "terminal": loss["loss_unweighted/t999"]})
        unet.train()

    if 0 in at:
        measure(0)
    rates = demo.rates(SETTINGS.finetuning_rate, steps, 20, 0.5)
    for step, _ in enumerate(demo.train(unet, objective, crops, demo.embed_captions(0), job.seed + 100, rates), 1):
        if step in at:
            measure(step)
    return unet.eval(), curve


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
