"""What the experiments on digits share: scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, a small
network, a two-sample distance.

Digits are quick enough to train hundreds of models and generate thousands of samples from each, so that a
distance between distributions can be estimated. They say nothing about brightness: an 8 x 8 canvas hardly
leaks.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from photo_settings import DemoSettings
from photos import load_photos
from torch import nn

from sdxl_fixes import NoiseSchedule, Objective

SIDE, CLASSES = 8, 10
TRAINED = 1200  # images that are trained on; the other 597 are what generated ones are compared with
STEPS, BATCH, WIDTH = 800, 128, 192


class Digits:
    """Images [N, 1, 8, 8] of mean 0 and standard deviation 1, and their classes [N], in two parts."""

    def __init__(self, seed: int, outliers: float = 0.0) -> None:
        from sklearn.datasets import load_digits

        data = load_digits()
        order = np.random.default_rng(0).permutation(len(data.images))  # the same parts for every seed
        pixels = torch.from_numpy(data.images[order]).float()[:, None]
        images, classes = (pixels - pixels.mean()) / pixels.std(), torch.from_numpy(data.target[order])
        self.images, self.classes = images[:TRAINED].clone(), classes[:TRAINED]
        self.clean, self.held_out, self.held_out_classes = (
            images[:TRAINED],
            images[TRAINED:],
            classes[TRAINED:],
        )
        self.pictures = photographs()
        draw = np.random.default_rng(seed)
        bad = torch.from_numpy(draw.permutation(TRAINED)[: round(outliers * TRAINED)])
        self.images[bad] = self.pictures[torch.from_numpy(draw.integers(len(self.pictures), size=len(bad)))]


@functools.cache
def photographs() -> torch.Tensor:
    """[512, 1, 8, 8]: crops of real photographs, of mean 0 and standard deviation 1, to be taken for digits
    by mistake."""
    pixels = nn.functional.avg_pool2d(torch.sigmoid(load_photos(DemoSettings()).logits)[:, None], 8)
    return (pixels - pixels.mean()) / pixels.std()


class Network(nn.Module):
    """Four residual blocks on 64 pixels, told the timestep and the class."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(SIDE**2, width), nn.Linear(width, SIDE**2)
        self.time = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(CLASSES, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width)
            )
            for _ in range(4)
        )

    def forward(self, x: torch.Tensor, t: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(32) / 32)
        condition = self.time(torch.cat((angles.sin(), angles.cos()), 1)) + self.label(label)
        hidden = self.enter(x.flatten(1))
        for block in self.blocks:
            hidden = hidden + block(hidden + condition)
        return self.leave(hidden).reshape(x.shape)


def train(objective: Objective, digits: Digits, seed: int, steps: int = STEPS) -> Network:
    """A network trained on ``digits``. Everything but the objective depends on the seed alone."""

    def batch(generator: torch.Generator) -> tuple[torch.Tensor, tuple[Any, ...]]:
        index = torch.randint(TRAINED, (BATCH,), generator=generator)
        return digits.images[index], (digits.classes[index],)

    torch.manual_seed(seed)
    return train_network(Network(), objective, batch, seed, steps)


def train_network(
    network: Any,
    objective: Objective,
    batch: Callable[[torch.Generator], Any],
    seed: int,
    steps: int,
    rate: float = 1e-3,
) -> Any:
    """AdamW, ``rate`` with a cosine to 0; ``batch`` draws images and what else the network is given. Returns
    the average of the weights (decay 0.995)."""
    average = torch.optim.swa_utils.AveragedModel(
        network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995)
    )
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    # so that all but xi is always the same
    drawn, noised, perturbed = (torch.Generator().manual_seed(seed + 10**5 * n) for n in range(3))
    for _ in range(steps):
        images, condition = batch(drawn)
        noise = torch.randn(images.shape, generator=noised)
        index = objective.timesteps.draw(len(images), generator=noised)
        step = objective.draw(images, generator=perturbed, index=index, noise=noise)
        objective.loss(network(step.noisy, step.timesteps, *condition), step).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        cosine.step()
        optimizer.zero_grad()
        average.update_parameters(network)
    return average.module.eval()


def generate(
    network: Any,
    schedule: NoiseSchedule,
    prediction_type: str,
    sampler: str,
    steps: int,
    seed: int,
    count: int = 1000,
) -> Any:
    """``count`` digits [count, 1, 8, 8], as many of each class."""
    return sample(network, schedule, prediction_type, sampler, steps, seed, (torch.arange(count) % CLASSES,))


@torch.no_grad()
def sample(
    network: Any,
    schedule: NoiseSchedule,
    prediction_type: str,
    sampler: str,
    steps: int,
    seed: int,
    condition: tuple[torch.Tensor, ...],
) -> torch.Tensor:
    """A digit [B, 1, 8, 8] for each row of the ``condition``."""
    scheduler = schedule.scheduler(sampler, prediction_type, "log_sigma")
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(seed + 1000)
    count = len(condition[0])
    x = torch.randn(count, 1, SIDE, SIDE, generator=generator) * scheduler.init_noise_sigma
    extra = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for t in scheduler.timesteps:
        output = network(
            scheduler.scale_model_input(x, t), torch.as_tensor(t).float().expand(count), *condition
        )
        x = scheduler.step(output, t, x, **extra).prev_sample
    return x


def distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """The energy distance, 2 E|X - Y| - E|X - X'| - E|Y - Y'| over independent pairs: 0 if and only if the
    distributions are equal (Szekely and Rizzo 2013). This estimate has no bias, so it may come out below
    0."""
    a, b = first.flatten(1).double(), second.flatten(1).double()
    within = [torch.cdist(x, x).sum() / (len(x) * (len(x) - 1)) for x in (a, b)]
    return float(2 * torch.cdist(a, b).mean() - within[0] - within[1])


def outlier_share(generated: torch.Tensor, digits: Digits) -> float:
    """Share of generated samples whose nearest neighbour is a photograph and not a clean digit."""
    x, clean, bad = (t.flatten(1).double() for t in (generated, digits.clean, digits.pictures))
    return float((torch.cdist(x, bad).amin(1) < torch.cdist(x, clean).amin(1)).double().mean())


def agreement(generated: torch.Tensor, digits: Digits) -> float:
    """Share of generated samples whose nearest clean digit is of the class that was asked."""
    return float(agrees(generated, digits, torch.arange(len(generated)) % CLASSES).double().mean())


def agrees(generated: torch.Tensor, digits: Digits, asked: torch.Tensor) -> torch.Tensor:
    """Whether the nearest clean digit of each sample is of the class ``asked``: bool, [B]."""
    nearest = torch.cdist(generated.flatten(1), digits.clean.flatten(1)).argmin(1)
    return digits.classes[nearest] == asked


def detail(generated: torch.Tensor, digits: Digits) -> float:
    """Energy of the differences between neighbouring pixels, over that of held-out digits; below 1 is
    blurred."""

    def energy(x: torch.Tensor) -> float:
        return float(x.diff(dim=2).square().mean() + x.diff(dim=3).square().mean())

    return energy(generated) / energy(digits.held_out)


def reference() -> dict[str, float]:
    """What the measures say of real digits: those that are trained on, against those that are not."""
    data = Digits(0)
    nearest = torch.cdist(data.held_out.flatten(1), data.clean.flatten(1)).argmin(1)
    agreement = float((data.classes[nearest] == data.held_out_classes).double().mean())
    return {
        "distance": distance(data.clean, data.held_out),
        "agreement": agreement,
        "detail": detail(data.clean, data),
        "outliers": 0.0,
    }
