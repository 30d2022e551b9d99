"""What the experiments share: real photographs of a known brightness, a tiny U-Net of SDXL's class, and
honest statistics.

Data, network and training are those of photos.py and photo_training.py. A caption says dark, middle or
bright, and as with real captions that is not all: the brightness of the photographs under one caption spreads
by 0.3 around what it says. So a model that sees the brightness in its input learns to read it there.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import multiprocessing
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import photo_training as demo
import style
import torch
from photo_settings import CAPTIONS, SPREAD, DemoSettings
from photos import Photos, embed_captions, load_photos, unfold

from sdxl_fixes import NoiseSchedule, Objective
from sdxl_fixes.atomic import replacing
from sdxl_fixes.validation import Validation

DOCS = Path(__file__).resolve().parent.parent / "docs" / "evidence"
RESULTS = Path(__file__).resolve().parent / "results"
ASKED = tuple(CAPTIONS.values())
STOCK = NoiseSchedule.sdxl()
SEEDS = (0, 1, 2, 3, 4)
SETTINGS = DemoSettings()
BASE_STEPS, BATCH, SAMPLES = SETTINGS.steps, SETTINGS.batch, SETTINGS.samples


# ---------------------------------------------------------------- training and generating


def photos(seed: int) -> Photos:
    """The crops of a seed."""
    return load_photos(replace(SETTINGS, seed=seed))


def base(seed: int, work: Path, prediction_type: str = "epsilon") -> Any:
    """A U-Net trained from scratch as SDXL was, on the stock schedule; kept in ``work``."""
    from safetensors.torch import load_file, save_file

    unet = demo.build_unet(replace(SETTINGS, seed=seed))
    path = (
        work
        / f"{prediction_type}-{seed}-{hashlib.sha256(repr(SETTINGS).encode()).hexdigest()[:8]}.safetensors"
    )
    if path.exists():
        unet.load_state_dict(load_file(path))
        return unet
    rates = demo.rates(SETTINGS.learning_rate, BASE_STEPS, 50, 0.3)
    for _ in demo.train(
        unet, Objective(STOCK, prediction_type), photos(seed), embed_captions(0), seed, rates
    ):
        pass
    work.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        save_file(unet.state_dict(), file)
    return unet


def generate(unet: Any, scheduler: Any, seed: int, network: Any = None) -> torch.Tensor:
    """[captions, SAMPLES, 64, 64] latents in 25 steps, from noise that depends on the seed alone."""
    return demo.sample(
        unet, scheduler, embed_captions(0), seed, SAMPLES, 25, lambda work, name: iter(work), network
    )


def brightness(pictures: torch.Tensor) -> dict[str, Any]:
    """Of generated pictures [captions, samples, 64, 64]: "got" per caption, how much of the asked difference
    is "kept" (1 is right), the "spread" of the brightness under one caption over the truth (1 is right), the
    "contrast" inside a picture."""
    means = pictures.double().mean((2, 3))
    got = means.mean(1).tolist()
    return {
        "got": got,
        "kept": (got[-1] - got[0]) / (ASKED[-1] - ASKED[0]),
        "miss": float(np.mean([abs(a - b) for a, b in zip(got, ASKED, strict=True)])),
        "spread": float(means.var(1).mean().sqrt()) / SPREAD,
        "contrast": float(pictures.double().flatten(2).std(2).mean()),
    }


def held_out_photos(photos: Photos) -> tuple[torch.Tensor, torch.Tensor]:
    """24 latents and their captions."""
    return photos.draw(24, torch.Generator().manual_seed(10**6))


def held_out(photos: Photos, objective: Objective, unet: Any) -> dict[str, float]:
    """Validation loss on exposures that were not trained on (of the same crops), at ten timesteps."""
    captions = embed_captions(0)
    latents, caption = held_out_photos(photos)

    def predict(noisy: torch.Tensor, t: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        return unet(noisy, t, **captions.conditioning(caption[image])).sample  # type: ignore[no-any-return]

    return Validation(objective)(predict, latents, [unet], batch_size=24)


def adapt(
    job: Job,
    work: Path,
    from_type: str,
    objective: Objective,
    steps: int,
    at: Sequence[int],
    sampler: str = "dpmpp_2m",
) -> tuple[Any, list[dict[str, Any]]]:
    """Finetune the stock checkpoint of ``from_type`` for another objective. Returns the network and
    the measurements after the steps ``at`` (0: before training)."""
    unet, crops = base(job.seed, work, from_type).train(), photos(job.seed)
    curve: list[dict[str, Any]] = []

    def measure(step: int) -> None:
        unet.eval()
        pictures = generate(unet, objective.schedule.scheduler(sampler, objective.prediction_type), job.seed)
        loss = held_out(crops, objective, unet)
        curve.append(
            {
                "step": step,
                **brightness(pictures),
                "loss": loss["loss_unweighted"],
                "terminal": loss["loss_unweighted/t999"],
            }
        )
        unet.train()

    if 0 in at:
        measure(0)
    rates = demo.rates(SETTINGS.finetuning_rate, steps, 20, 0.5)
    for step, _ in enumerate(demo.train(unet, objective, crops, embed_captions(0), job.seed + 100, rates), 1):
        if step in at:
            measure(step)
    return unet.eval(), curve


def sdxl_unet() -> Any:
    """The real SDXL's U-Net, of 2,567,463,684 parameters: to be made on the meta device."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def cached(name: str, make: Callable[[], Any]) -> Any:
    """What ``make`` returns, as JSON; computed once and kept beside the results."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        with replacing(path) as file:
            file.write_text(json.dumps(make(), indent=0) + "\n")
    return json.loads(path.read_text())


def reference() -> list[dict[str, Any]]:
    """Of the photographs themselves, for each seed: "contrast", and what predicting the mean of a caption's
    photographs would score as "terminal" error."""
    return list(cached("photographs", lambda: [_reference(photos(seed)) for seed in SEEDS]))


def _reference(crops: Photos) -> dict[str, Any]:
    latents, caption = crops.draw(3000, torch.Generator().manual_seed(10**6 + 1))
    means = torch.stack([latents[caption == number].mean(0) for number in range(len(ASKED))])
    shown, asked = held_out_photos(crops)
    return {
        "contrast": float(unfold(latents).flatten(1).std(1).mean()),
        "terminal": float((shown - means[asked]).square().mean()),
    }


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
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("evidence-work"),
        help="folder for the base checkpoints (default evidence-work)",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--only", nargs="+", help="these variants only")
    parser.add_argument(
        "--pages", action="store_true", help="write table and plot of the finished runs, run nothing"
    )
    return parser.parse_args()


def run(
    name: str,
    work: Callable[[Job, Path], dict[str, Any]],
    keys: Sequence[str],
    args: argparse.Namespace,
    bases: Sequence[str],
) -> None:
    """Run what is not in benchmarks/results/NAME.json yet. ``bases`` are the prediction types of the stock
    checkpoints that the runs start from. One process at a time: it writes the whole file after every run."""
    path = RESULTS / f"{name}.json"
    done: dict[str, Any] = (
        json.loads(path.read_text())
        if path.exists()
        else {"versions": _versions(), "settings": repr(SETTINGS)}
    )
    if done["settings"] != repr(SETTINGS):
        raise SystemExit(
            f"{path} was made with {done['settings']}, this is {SETTINGS!r}: move it away to start anew"
        )
    todo = [Job(key, seed) for seed in args.seeds for key in keys if args.only is None or key in args.only]
    todo = [job for job in todo if job.name not in done]
    if not todo:
        return
    RESULTS.mkdir(exist_ok=True)
    with multiprocessing.get_context("spawn").Pool(args.jobs, _one_thread) as pool:
        pool.starmap(
            _prepare,
            [(seed, args.work, kind) for seed in sorted({job.seed for job in todo}) for kind in bases],
        )
        for number, (job, result) in enumerate(pool.imap_unordered(_Timed(work, args.work), todo), 1):
            done[job.name] = result
            with replacing(path) as file:
                file.write_text(json.dumps(dict(sorted(done.items())), indent=0) + "\n")
            print(f"{number}/{len(todo)} {job.name}: {result['seconds']:.0f} s", flush=True)


def _prepare(seed: int, work: Path, prediction_type: str) -> None:
    base(seed, work, prediction_type)


def finished(name: str, keys: Sequence[str]) -> dict[str, list[Any]]:
    """The finished runs of an experiment: variant -> one result per seed, in the order of SEEDS; variants
    that lack one are left out."""
    path = RESULTS / f"{name}.json"
    done = json.loads(path.read_text()) if path.exists() else {}
    return {
        key: [done[f"{key}/{seed}"] for seed in SEEDS]
        for key in keys
        if all(f"{key}/{seed}" in done for seed in SEEDS)
    }


class _Timed:
    """Callable of a pool's worker: (job, its result with the seconds it took)."""

    def __init__(self, work: Callable[[Job, Path], dict[str, Any]], folder: Path) -> None:
        self.work, self.folder = work, folder

    def __call__(self, job: Job) -> tuple[Job, dict[str, Any]]:
        start = time.process_time()
        result = self.work(job, self.folder)
        return job, {**result, "seconds": round(time.process_time() - start, 1)}


def _one_thread() -> None:
    torch.set_num_threads(1)


# ---------------------------------------------------------------- statistics


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % confidence interval (Student's t over seeds)."""
    from scipy.stats import t

    if len(values) < 2:
        return float(np.mean(values)), math.nan
    return float(np.mean(values)), float(
        t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    )


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
    return f"mean and 95 % interval over training seeds {', '.join(map(str, SEEDS))} ({versions(name)})"


def versions(name: str) -> str:
    """What an experiment was run with, for its page."""
    return str(json.loads((RESULTS / f"{name}.json").read_text())["versions"])


def _versions() -> str:
    return ", ".join(
        f"{package} {metadata.version(package)}"
        for package in ("torch", "diffusers", "numpy", "scikit-image", "scikit-learn")
    )


def text(name: str, keys: Sequence[str], page: Callable[[dict[str, list[Any]]], list[str]]) -> str:
    """A page: a function of the recorded results alone."""
    found = finished(name, keys)
    seconds = sum(result["seconds"] for results in found.values() for result in results)
    lines = [
        *page(found),
        "",
        f"{sum(map(len, found.values()))} runs, {seconds / 60:.0f} minutes of one core.",
        "",
    ]
    return wrapped(lines)


def wrapped(lines: Sequence[str]) -> str:
    """A page of paragraphs, each of one or more lines, and of tables, headings and pictures as they are."""
    prose = [
        list(group)
        if table
        else [textwrap.fill(" ".join(group), 140, break_on_hyphens=False, break_long_words=False)]
        for table, group in itertools.groupby(lines, _stands)
    ]
    return "\n".join(itertools.chain.from_iterable(prose))


def _stands(line: str) -> bool:
    """Whether a line is a line of the page as it is, and no part of a paragraph."""
    return line == "" or line[0] in "#|-!"


def experiment(
    name: str,
    doc: str | None,
    work: Callable[[Job, Path], dict[str, Any]],
    keys: Sequence[str],
    page: Callable[[dict[str, list[Any]]], list[str]],
    plot: Callable[[dict[str, list[Any]]], Any] | None = None,
    bases: Sequence[str] = (),
    after: Sequence[str] = (),
) -> None:
    """The main of an experiment: runs what is missing, then writes docs/evidence/NAME.md and NAME.png.
    ``after`` names the experiments whose results its page shows, too."""
    args = arguments(doc or "")
    missing = [other for other in after if not (RESULTS / f"{other}.json").exists()]
    wrong = [key for key in args.only or () if key not in keys]
    if missing or wrong:
        raise SystemExit(
            f"run benchmarks/{missing[0]}.py first"
            if missing
            else f"--only {wrong[0]!r}: expected some of {', '.join(keys)}"
        )
    if not args.pages:
        run(name, work, keys, args, bases)
    DOCS.mkdir(parents=True, exist_ok=True)
    with replacing(DOCS / f"{name}.md") as file:
        file.write_text(text(name, keys, page), encoding="utf-8")
    if plot is not None:
        style.save(plot(finished(name, keys)), DOCS / f"{name}.png")
