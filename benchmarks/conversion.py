"""Conversion with the frozen base as teacher: how many samples it takes to get back to the base's own error.

python benchmarks/conversion.py     about 20 minutes of one core; writes docs/evidence/conversion.md
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import digits
import lab
import numpy as np
import torch
from torch import nn

from sdxl_fixes import NoiseSchedule, Objective
from sdxl_fixes import prediction as predictions
from sdxl_fixes.atomic import replacing
from sdxl_fixes.teacher import Teacher

ZTSNR, FLOW = lab.STOCK.zero_terminal_snr(), NoiseSchedule.flow()
TARGETS = {
    "v": (ZTSNR, "v_prediction"),
    "flow": (FLOW, "flow_prediction"),
    "aligned": (FLOW, "flow_prediction"),
}
SHARES = {"data": 0.0, "half": 0.5, "whole": 1.0, "wrong class": 1.0}
FEW = 120  # images, where they are few
STEPS, BATCH, RATE, BASE_STEPS = 2896, 16, 3e-4, 1600
AT = (0, *(round(8 * 2 ** (k / 2)) for k in range(18)))
SIGMAS = np.geomspace(0.03, 14.6, 12)


class Aligned(nn.Module):
    """A network of rectified flow that is given the sample in variance-preserving scale and told the base's
    timestep (Diff2Flow, arXiv:2506.02221), in the place of one that is told 1000 s."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor, told: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        s = (told / len(FLOW)).double()
        ratio = (s / (1 - s)).clamp(max=lab.STOCK.terminal_sigma).numpy()
        t = lab.STOCK.levels_at(ratio.clip(lab.STOCK.sigmas[0]))[2]
        scale = torch.hypot(s, 1 - s).float()[:, None, None, None]
        return self.network(x / scale, torch.from_numpy(t).float(), label)  # type: ignore[no-any-return]


def base(seed: int, folder: Path) -> digits.Network:
    """Trained from scratch for epsilon on the stock schedule; kept in ``folder``."""
    path = folder / f"digits-epsilon-{seed}-{BASE_STEPS}.pt"
    network = digits.Network()
    if not path.exists():
        made = digits.train(Objective(lab.STOCK, "epsilon"), digits.Digits(seed), seed, BASE_STEPS)
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            torch.save(made.state_dict(), file)
    network.load_state_dict(torch.load(path, weights_only=True))
    return network.eval().requires_grad_(False)


@torch.no_grad()
def errors(
    network: nn.Module, schedule: NoiseSchedule, prediction_type: str, sigmas: Sequence[float] = SIGMAS
) -> list[float]:
    """Mean squared error of the image that is predicted of noisy held-out digits, at each of ``sigmas``."""
    data = digits.Digits(0)
    x0, noise = data.held_out, torch.randn(data.held_out.shape, generator=torch.Generator().manual_seed(0))
    found = []
    for alpha, sigma, t in zip(
        *schedule.levels_at(sigmas, prediction_type == "flow_prediction"), strict=True
    ):
        noisy = predictions.add_noise(x0, noise, float(alpha), float(sigma))
        output = network(noisy, torch.full((len(x0),), float(t)), data.held_out_classes)
        guess, _ = predictions.x0_and_noise(output, prediction_type, noisy, float(alpha), float(sigma))
        found.append(float((guess - x0).square().mean()))
    return found


def work(job: lab.Job, folder: Path) -> dict[str, Any]:
    target, images, way = job.key.split(": ")
    (schedule, prediction_type), share = TARGETS[target], SHARES[way]
    data, teacher_network = digits.Digits(job.seed), base(job.seed, folder)
    own = errors(teacher_network, lab.STOCK, "epsilon")
    count = FEW if images == "few" else digits.TRAINED
    chosen = torch.from_numpy(np.random.default_rng(job.seed + 10).permutation(digits.TRAINED)[:count])
    objective = Objective(schedule, prediction_type)
    teacher = Teacher(lab.STOCK, "epsilon", schedule, prediction_type, share) if share else None

    student = copy.deepcopy(teacher_network).requires_grad_(True).train()
    network: nn.Module = Aligned(student) if target == "aligned" else student
    average = copy.deepcopy(network).eval()
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE)
    generator = torch.Generator().manual_seed(job.seed + 100)
    curve: list[list[float]] = []
    for step in range(STEPS + 1):
        if step in AT:
            curve.append(errors(average, schedule, prediction_type, (*SIGMAS, math.inf)))
        if step == STEPS:
            break
        index = chosen[torch.randint(count, (BATCH,), generator=generator)]
        latents, classes = data.images[index], data.classes[index]
        drawn = objective.draw(latents, generator=generator)
        goal = drawn.target
        if teacher is not None:
            asked = (classes + 1) % digits.CLASSES if way == "wrong class" else classes
            sample, told = teacher.sample(latents, drawn.noise, drawn.index)
            with torch.no_grad():
                answer = teacher.answer(sample, teacher_network(sample, told, asked), drawn.index)
            goal = teacher.mix(answer, goal, drawn.index)
        optimizer.param_groups[0]["lr"] = RATE * min(1, (step + 1) / 20)
        (network(drawn.noisy, drawn.timesteps.float(), classes) - goal).square().mean().backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(0.99, (1 + step) / (10 + step))
        with torch.no_grad():
            for kept, new in zip(average.parameters(), network.parameters(), strict=True):
                kept.lerp_(new, 1 - decay)
    return {"own": own, "curve": curve}


def page(found: dict[str, list[Any]]) -> list[str]:
    return ["TODO"]


KEYS = [
    *(f"v: all: {way}" for way in ("data", "half", "whole", "wrong class")),
    *(f"v: few: {way}" for way in ("data", "half", "whole")),
    *(f"flow: all: {way}" for way in ("data", "half", "whole")),
    *(f"aligned: all: {way}" for way in ("data", "whole")),
]

if __name__ == "__main__":
    lab.experiment("conversion", __doc__, work, KEYS, page)
