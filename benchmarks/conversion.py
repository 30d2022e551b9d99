"""Conversion with the frozen base as teacher: how many samples it takes to get back to the base's own error.

python benchmarks/conversion.py     a few minutes of one core; writes docs/evidence/conversion.md
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import digits
import lab
import numpy as np
import torch
from torch.func import functional_call, vmap

from sdxl_fixes import NoiseSchedule, Objective
from sdxl_fixes import prediction as predictions
from sdxl_fixes.teacher import Teacher

ZTSNR, FLOW = lab.STOCK.zero_terminal_snr(), NoiseSchedule.flow()
TARGETS = {
    "v": (ZTSNR, "v_prediction"),
    "flow": (FLOW, "flow_prediction"),
    "aligned": (FLOW, "flow_prediction"),
}
SHARES = {"data": 0.0, "half": 0.5, "whole": 1.0, "wrong class": 1.0}
WIDTH, BATCH, RATE, STEPS, FEW = 64, 16, 3e-4, 1024, 120
BASE_BATCH, BASE_STEPS = 64, 1500
AT = (0, *(round(8 * 2 ** (k / 2)) for k in range(15)))
SIGMAS, HELD_OUT = np.geomspace(0.03, 14.6, 9), 200
VARIANTS = (
    *(f"v: all: {way}" for way in ("data", "half", "whole", "wrong class")),
    *(f"v: few: {way}" for way in ("data", "whole")),
    *(f"flow: all: {way}" for way in ("data", "whole")),
    *(f"aligned: all: {way}" for way in ("data", "whole")),
)
State = dict[str, torch.Tensor]


def aligned(x: torch.Tensor, told: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The sample [B, ...] of rectified flow in variance-preserving scale and the base's timestep [B], in the
    place of 1000 s (Diff2Flow, arXiv:2506.02221); noise that the base does not know is told its last."""
    s = (told / len(FLOW)).double()
    ratio = (s / (1 - s)).numpy().clip(lab.STOCK.sigmas[0], lab.STOCK.terminal_sigma)
    return x / torch.hypot(s, 1 - s).float().reshape(-1, 1, 1, 1), torch.from_numpy(
        lab.STOCK.levels_at(ratio)[2]
    ).float()


def base(data: digits.Digits, seed: int) -> digits.Network:
    """Trained from scratch for epsilon on the stock schedule."""

    def batch(generator: torch.Generator) -> tuple[torch.Tensor, tuple[Any, ...]]:
        index = torch.randint(digits.TRAINED, (BASE_BATCH,), generator=generator)
        return data.images[index], (data.classes[index],)

    torch.manual_seed(seed)
    objective = Objective(lab.STOCK, "epsilon")
    made = digits.train_network(digits.Network(WIDTH), objective, batch, seed, BASE_STEPS)
    return made.eval().requires_grad_(False)  # type: ignore[no-any-return]


class Together:
    """One network a variant, all of the same shape and run at once."""

    def __init__(self, network: digits.Network) -> None:
        self.network = network

    def start(self) -> State:
        """Every variant's weights: the network's."""
        return {
            name: value.detach().expand(len(VARIANTS), *value.shape).clone()
            for name, value in self.network.named_parameters()
        }

    def __call__(self, state: State, x: torch.Tensor, t: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Predictions of samples [variants, B, 1, 8, 8] at timesteps and with classes [variants, B]."""

        def one(weights: State, *given: torch.Tensor) -> torch.Tensor:
            return functional_call(self.network, weights, given)  # type: ignore[no-any-return]

        return vmap(one)(state, x, t, label)  # type: ignore[no-any-return]


def given(variant: str, x: torch.Tensor, told: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the variant's network is given of a sample and timestep."""
    return aligned(x, told) if variant.startswith("aligned") else (x, told.float())


@functools.cache
def held_out(sigma: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The digits that are not trained on, their classes, and the noise that they get at ``sigma``."""
    data = digits.Digits(0)
    seed = 0 if math.isinf(sigma) else round(1e4 * sigma)
    noise = torch.randn(HELD_OUT, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return data.held_out[:HELD_OUT], data.held_out_classes[:HELD_OUT], noise


def noised(
    sampling: tuple[NoiseSchedule, str], sigma: float
) -> tuple[torch.Tensor, torch.Tensor, tuple[float, float]]:
    """The held-out digits at ``sigma`` as a network for ``sampling`` gets them, its timesteps, the levels."""
    schedule, prediction_type = sampling
    alpha, noise_level, t = (
        float(x) for x in schedule.levels_at(sigma, prediction_type == "flow_prediction")
    )
    x0, _, noise = held_out(sigma)
    noisy = predictions.add_noise(x0, noise, alpha, noise_level)
    return noisy, torch.full((len(x0),), t, dtype=torch.float64), (alpha, noise_level)


def error(
    output: torch.Tensor, kind: str, noisy: torch.Tensor, levels: tuple[float, float], sigma: float
) -> float:
    """Mean squared error of the image that the ``output`` means."""
    guess, _ = predictions.x0_and_noise(output, kind, noisy, *levels)
    return float((guess - held_out(sigma)[0]).square().mean())


@torch.no_grad()
def errors(together: Together, state: State) -> list[list[float]]:
    """Of every variant, at each of SIGMAS and at infinity."""
    found: list[list[float]] = [[] for _ in VARIANTS]
    for sigma in (*SIGMAS, math.inf):
        samples = [noised(TARGETS[variant.split(":")[0]], sigma) for variant in VARIANTS]
        inputs = [given(v, noisy, t) for v, (noisy, t, _) in zip(VARIANTS, samples, strict=True)]
        x, t = (torch.stack(column).float() for column in zip(*inputs, strict=True))
        label = held_out(sigma)[1].expand(len(VARIANTS), -1)
        for k, output in enumerate(together(state, x, t, label)):
            kind = TARGETS[VARIANTS[k].split(":")[0]][1]
            found[k].append(error(output, kind, samples[k][0], samples[k][2], sigma))
    return found


@torch.no_grad()
def own_errors(network: digits.Network) -> list[float]:
    """The base's, at each of SIGMAS."""
    found = []
    for sigma in SIGMAS:
        noisy, t, levels = noised((lab.STOCK, "epsilon"), sigma)
        output = network(noisy, t.float(), held_out(sigma)[1])
        found.append(error(output, "epsilon", noisy, levels, sigma))
    return found


def work(job: lab.Job, folder: Path) -> dict[str, Any]:
    data = digits.Digits(job.seed)
    teaching = base(data, job.seed)
    together, few = Together(teaching), np.random.default_rng(job.seed + 10).permutation(digits.TRAINED)[:FEW]
    objectives = {name: Objective(*sampling) for name, sampling in TARGETS.items()}
    teachers = {
        v: Teacher(lab.STOCK, "epsilon", *TARGETS[v.split(":")[0]], SHARES[v.split(": ")[2]])
        for v in VARIANTS
        if SHARES[v.split(": ")[2]]
    }
    state = {name: value.requires_grad_() for name, value in together.start().items()}
    average = together.start()
    optimizer = torch.optim.AdamW(state.values(), lr=RATE)
    generator = torch.Generator().manual_seed(job.seed + 100)
    curve = [errors(together, average)]
    for step in range(STEPS):
        chosen = torch.randint(digits.TRAINED, (BATCH,), generator=generator)
        scarce = torch.from_numpy(few)[chosen % FEW]
        index = torch.randint(len(lab.STOCK), (BATCH,), generator=generator)
        noise = torch.randn(BATCH, 1, 8, 8, generator=generator)
        rows = []
        for variant in VARIANTS:
            target, amount, way = variant.split(": ")
            these = scarce if amount == "few" else chosen
            latents, classes = data.images[these], data.classes[these]
            drawn = objectives[target].draw(latents, index=index, noise=noise)
            goal = drawn.target
            if teacher := teachers.get(variant):
                asked = (classes + 1) % digits.CLASSES if way == "wrong class" else classes
                sample, told = teacher.sample(latents, noise, index)
                with torch.no_grad():
                    goal = teacher.mix(
                        teacher.answer(sample, teaching(sample, told, asked), index), goal, index
                    )
            rows.append((*given(variant, drawn.noisy, drawn.timesteps), classes, goal))
        x, t, classes, goal = (torch.stack(column) for column in zip(*rows, strict=True))
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 20)
        # each variant's loss reaches its own weights alone
        (together(state, x, t, classes) - goal).square().flatten(1).mean(1).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, value in average.items():
                value.lerp_(state[name], 1 - min(0.99, (1 + step) / (10 + step)))
        if step + 1 in AT:
            curve.append(errors(together, average))
    return {"own": own_errors(teaching), "curve": curve}


def ratios(result: dict[str, Any], variant: str) -> np.ndarray:
    """The variant's error over the base's own, [measurements, SIGMAS]."""
    curve = np.array([step[VARIANTS.index(variant)] for step in result["curve"]])
    return curve[:, : len(SIGMAS)] / np.array(result["own"])  # type: ignore[no-any-return]


def reached(values: np.ndarray, goal: float) -> float:
    """Samples until the falling ``values`` [measurements] meet ``goal``, between two measurements by their
    logarithms; NaN where they do not."""
    below = np.flatnonzero(values <= goal)
    if not len(below) or not below[0]:
        return math.nan
    k = below[0]
    share = np.log(values[k - 1] / goal) / np.log(values[k - 1] / values[k])
    return float(BATCH * (AT[k - 1] + share * (AT[k] - AT[k - 1])))


def mean(values: np.ndarray) -> np.ndarray:
    """Geometric mean over the levels."""
    return np.exp(np.log(values).mean(1))  # type: ignore[no-any-return]


def worst(values: np.ndarray) -> np.ndarray:
    """The largest over the levels."""
    return values.max(1)  # type: ignore[no-any-return]


# what is measured of the ratios -> the goal
GOALS = {mean: 1.0, worst: 1.25}


def _samples(counts: list[float]) -> str:
    missing = sum(map(math.isnan, counts))
    return f"{len(counts) - missing} of {len(counts)} runs" if missing else lab.show(counts, 0)


def _over(counts: list[float], alone: list[float]) -> str:
    """Geometric mean of the paired ratios and its interval; bold where that excludes 1."""
    logs = [math.log(a / b) for a, b in zip(counts, alone, strict=True)]
    if any(map(math.isnan, logs)):
        return ""
    middle, half = lab.interval(logs)
    words = f"{math.exp(middle):.2f} ({math.exp(middle - half):.2f} to {math.exp(middle + half):.2f})"
    return f"**{words}**" if abs(middle) > half else words


def _row(results: list[dict[str, Any]], variant: str) -> str:
    target, amount, way = variant.split(": ")
    cells = [target, amount, "1, wrong class" if way == "wrong class" else f"{SHARES[way]:g}"]
    for measure, goal in GOALS.items():
        counts, alone = (
            [reached(measure(ratios(r, v)), goal) for r in results]
            for v in (variant, f"{target}: {amount}: data")
        )
        cells += [_samples(counts), "" if way == "data" else _over(counts, alone)]
    cells += [lab.show([float(measure(ratios(r, variant))[-1]) for r in results]) for measure in GOALS]
    noise = [r["curve"][-1][VARIANTS.index(variant)][-1] for r in results]
    return f"| {' | '.join([*cells, lab.show(noise, 3)])} |"


def page(found: dict[str, list[Any]]) -> list[str]:
    results = found["conversion"]
    own = [lab.show([r["own"][k] for r in results], 3) for k in range(len(SIGMAS))]
    return [
        "# Conversion with the frozen base as teacher, measured",
        "",
        f"Generated by `benchmarks/conversion.py`; {lab.about('conversion')}.",
        f"scikit-learn's digits; a network of {WIDTH} channels that predicts epsilon on SDXL's schedule is",
        "made one that predicts v at zero terminal SNR, or rectified flow (told 1000 s; aligned: given the",
        f"base's scale and timestep), in {STEPS} steps of {BATCH} at one learning rate, {RATE:g}.",
        "Every row of",
        "a seed has the same draws.",
        "The share is `--keep_base`'s: of the target, the base's own prediction where sigma is at most 14.6,",
        f"0 is data alone. few: {FEW} images in place of {digits.TRAINED}. wrong class: the base is",
        "asked for",
        "another digit than the student, which must do harm.",
        "",
        f"Measured is the squared error of the predicted image on {HELD_OUT} held-out digits at",
        f"{len(SIGMAS)} sigmas from {SIGMAS[0]:g} to {SIGMAS[-1]:g}, each over the base's own.",
        "Samples: until",
        "the geometric mean of these ratios is 1 (the base's own error, the goal), and until the",
        "worst of them",
        "is 1.25. Over: of the same seed's with data alone, geometric mean and its interval, bold where that",
        "excludes 1. At the end: mean and worst ratio, and the error where the sample is all noise,",
        "which the",
        "base does not know.",
        "",
        f"## The base: {BASE_STEPS} steps of {BASE_BATCH}",
        "",
        f"| sigma | {' | '.join(f'{sigma:.2g}' for sigma in SIGMAS)} |",
        "|---|" + "---|" * len(SIGMAS),
        f"| its own error | {' | '.join(own)} |",
        "",
        "The digits' variance is 1: at the last sigmas this base is worse than the mean of all",
        "digits. It was",
        "trained shortly, and an error of epsilon counts sigma times in the image.",
        "",
        "## The conversions",
        "",
        "| target | images | share | samples to its own error | over | samples to 1.25 at the worst | over "
        "| mean at the end | worst | all noise |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(_row(results, variant) for variant in VARIANTS),
    ]


KEYS = ["conversion"]

if __name__ == "__main__":
    lab.experiment("conversion", __doc__, work, KEYS, page)
