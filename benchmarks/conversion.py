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
from sdxl_fixes.weighting import Debiased

ZTSNR, FLOW = lab.STOCK.zero_terminal_snr(), NoiseSchedule.flow()
TARGETS = {
    "v": (ZTSNR, "v_prediction"),
    "flow": (FLOW, "flow_prediction"),
    "aligned": (FLOW, "flow_prediction"),
}
SHARES = {"data": 0.0, "half": 0.5, "whole": 1.0, "wrong class": 1.0}
WIDTH, BATCH, RATE, STEPS, FEW = 64, 16, 3e-4, 1024, 120
BASE_BATCH = 64
# how the base was trained: steps, weighting. Debiased weights give it in a short training what only a long
# one gives without: an idea of the image at large sigma, where an error of epsilon is sigma times as large
BASES = {"weak base": (1500, None), "strong base": (4000, Debiased())}
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


def base(data: digits.Digits, seed: int, how: str) -> digits.Network:
    """Trained from scratch for epsilon on the stock schedule, as BASES says."""

    def batch(generator: torch.Generator) -> tuple[torch.Tensor, tuple[Any, ...]]:
        index = torch.randint(digits.TRAINED, (BASE_BATCH,), generator=generator)
        return data.images[index], (data.classes[index],)

    torch.manual_seed(seed)
    steps, weighting = BASES[how]
    objective = Objective(lab.STOCK, "epsilon", weighting=weighting)
    made = digits.train_network(digits.Network(WIDTH), objective, batch, seed, steps)
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
    teaching = base(data, job.seed, job.key)
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


def page(found: dict[str, list[Any]]) -> list[str]:
    return ["TODO"]


KEYS = list(BASES)

if __name__ == "__main__":
    lab.experiment("conversion", __doc__, work, KEYS, page)
