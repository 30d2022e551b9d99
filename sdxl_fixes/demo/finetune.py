"""Finetune tiny-sdxl as a user would, on SDXL's schedule and with the fixes, and sample it before and after.

The three finetunes see the same pictures, captions, noise and timesteps in the same order; all four networks
are sampled from the same noise.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from sdxl_fixes.demo.plan import Plan
from sdxl_fixes.demo.world import (
    CANVAS,
    CHANNELS,
    FOLD,
    OBJECTS,
    PLACES,
    World,
    load_tiny_sdxl,
    load_world,
    unfold,
)
from sdxl_fixes.objective import Objective
from sdxl_fixes.schedule import NoiseSchedule

Progress = Callable[[Iterable[Any], str], Iterator[Any]]
# what is painted in every place; the first four are the report's first
PAINTED = ("apple", "cat", "cake", "guitar", "pumpkin", "butterfly", "rocket", "fox")
WARM_UP = 50  # steps
# ancestral: this network hardly feels its input's scale, and a deterministic sampler leaves that as grain
SAMPLER = "euler_a"
EMPTY = 0.1  # the share of captions that are left out in training, as for guidance


@dataclass(frozen=True)
class Run:
    """One network: how it was trained last."""

    key: str
    label: str
    prediction_type: str
    schedule: NoiseSchedule
    trained: bool  # or as it came


@dataclass(frozen=True)
class Result:
    """One network's pictures, and how it came to them."""

    run: Run
    losses: list[float]  # one per step
    pictures: torch.Tensor  # [places, Plan.pictures, 3, CANVAS, CANVAS], RGB, -1 to 1
    seconds: float


def runs() -> list[Run]:
    """tiny-sdxl as it is; trained on as it was (more training is no cure); told v-prediction alone (nor is
    the prediction, it is the schedule); and with the fixes."""
    stock = NoiseSchedule.sdxl()
    return [
        Run("before", "SDXL's schedule", "epsilon", stock, False),
        Run("control", "SDXL's schedule, trained on", "epsilon", stock, True),
        Run("v_alone", "v-prediction alone", "v_prediction", stock, True),
        Run("fixed", "with the fixes", "v_prediction", stock.zero_terminal_snr(), True),
    ]


def compare(plan: Plan, progress: Progress, which: list[Run] | None = None) -> list[Result]:
    """Finetune and sample, on one thread: layers this small gain a tenth from a second one, and stand still
    where another program takes it."""
    world, results = load_world(), []
    with _one_thread():
        for run in runs() if which is None else which:
            start, unet = time.perf_counter(), load_tiny_sdxl()
            losses: list[float] = []
            if run.trained:
                work = progress(rates(plan), f"finetune {run.label}")
                unet, losses = finetune(unet, Objective(run.schedule, run.prediction_type), world, plan, work)
            scheduler = run.schedule.scheduler(SAMPLER, run.prediction_type)
            pictures = sample(unet, scheduler, world, plan, progress)
            results.append(Result(run, losses, pictures, time.perf_counter() - start))
    return results


def rates(plan: Plan) -> list[float]:
    """Learning rates: linear up in the first steps, linear down to 0 over the second half."""
    count, warm_up = plan.steps, min(WARM_UP, plan.steps)
    return [
        plan.learning_rate * min(1, (step + 1) / warm_up, (count - step) / (count / 2))
        for step in range(count)
    ]


def finetune(
    unet: Any, objective: Objective, world: World, plan: Plan, rates: Iterable[float]
) -> tuple[Any, list[float]]:
    """AdamW, a step for each learning rate. Returns the network of the averaged weights, and the losses."""
    optimizer = torch.optim.AdamW(unet.train().parameters(), lr=1.0, fused=True)
    generator = torch.Generator().manual_seed(plan.seed)
    averaged = copy.deepcopy(unet).eval()
    losses = []
    for number, rate in enumerate(rates, 1):
        latents, objects, places = world.draw(plan.batch, generator)
        step = objective.draw(latents, generator=generator)
        empty = torch.rand(plan.batch, generator=generator) < EMPTY
        conditioning = world.conditioning(objects, places, empty)
        loss = objective.loss(unet(step.noisy, step.timesteps, **conditioning).sample, step)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        average(averaged, unet, min(plan.average, (1 + number) / (10 + number)))
    return averaged, losses


@torch.no_grad()
def average(averaged: Any, unet: Any, decay: float) -> None:
    """Move the averaged weights a share 1 - ``decay`` of the way to the network's."""
    for mean, value in zip(averaged.parameters(), unet.parameters(), strict=True):
        mean.lerp_(value, 1 - decay)


@torch.no_grad()
def sample(unet: Any, scheduler: Any, world: World, plan: Plan, progress: Progress) -> torch.Tensor:
    """[places, Plan.pictures, 3, CANVAS, CANVAS] in RGB, -1 to 1, without guidance. The first noise is the
    same in every place, another for each picture of a place; all noise is the same for every network."""
    scheduler.set_timesteps(plan.sampling_steps)
    generator = torch.Generator().manual_seed(plan.seed + 1000)
    noise = torch.randn(plan.pictures, CHANNELS, CANVAS // FOLD, CANVAS // FOLD, generator=generator)
    x = noise.repeat(len(PLACES), 1, 1, 1) * scheduler.init_noise_sigma
    conditioning = world.conditioning(*painted(plan))
    for t in progress(scheduler.timesteps, "sample"):
        output = unet(scheduler.scale_model_input(x, t), t, **conditioning).sample
        x = scheduler.step(output, t, x, generator=generator).prev_sample
    return unfold(x).clamp(-1, 1).reshape(len(PLACES), plan.pictures, 3, CANVAS, CANVAS)


def painted(plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
    """Objects and places by number, [places * Plan.pictures] each: what is sampled, place by place."""
    things = [OBJECTS.index(PAINTED[number % len(PAINTED)]) for number in range(plan.pictures)]
    places = torch.arange(len(PLACES)).repeat_interleave(plan.pictures)
    return torch.tensor(things).repeat(len(PLACES)), places


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
