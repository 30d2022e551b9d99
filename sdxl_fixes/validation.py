"""A loss that two checkpoints can be compared by: the same images, the same noise, the same timesteps, every
time.

A training loss jumps with every draw of a timestep. Here each image meets the whole range of timesteps, each
time with noise of its own that depends on nothing but the seed, the image's number and the timestep: not on
the batch size, the number of processes, or on what was drawn before; and the training's random numbers are
left as they were. Called on images that are not trained on it is a validation loss; on a few that are, a
stable training loss.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from sdxl_fixes.loss import ScheduledHuber, l2
from sdxl_fixes.names import check_seed
from sdxl_fixes.objective import Objective
from sdxl_fixes.trainers.step import StepLoss


@contextlib.contextmanager
def evaluating(models: Iterable[torch.nn.Module]) -> Iterator[None]:
    """``models`` are in evaluation mode within; after it every part is as it was, also the parts that FSDP2
    gathers for a call and lets go in the backward pass, which does not come here: their parameters would be
    others than the optimizer's."""
    # parts may differ from the whole
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode
            if callable(reshard := getattr(module, "reshard", None)):
                reshard()


class Validation:
    """Loss of a network on fixed images, noise and timesteps.

    objective  what is trained: its schedule, prediction type, loss and weights (its perturbation and timestep
               sampler are not used, nor Huber's l2_gradient="batch", a factor that depends on the batch)
    points     timesteps per image, evenly over the range, the last one among them
    seed       of the noise
    """

    def __init__(self, objective: Objective, points: int = 10, seed: int = 0) -> None:
        steps = len(objective.schedule)
        if not 1 <= points <= steps:
            raise ValueError(f"points must lie in 1..{steps}, the trained timesteps, got {points}")
        self.objective, self.seed = copy(objective), check_seed(seed)
        loss = objective.loss_function
        if isinstance(loss, ScheduledHuber) and loss.l2_gradient == "batch":
            alone = replace(loss, l2_gradient=None)
            self.objective.step_loss = StepLoss(
                objective.schedule, objective.prediction_type, alone, objective.weighting
            )
        self.timesteps: list[int] = (
            np.round(steps * np.arange(1, points + 1) / points).astype(int) - 1
        ).tolist()

    def __call__(
        self,
        predict: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
        latents: torch.Tensor,
        models: Iterable[torch.nn.Module] = (),
        batch_size: int = 8,
        accelerator: Any = None,
    ) -> dict[str, float]:
        """``predict(noisy, timesteps, image)`` is the network with its conditioning: for samples of ``image``
        (int64, [B], rows of ``latents`` [N, C, H, W]) it returns predictions [B, C, H, W]. ``models`` are in
        evaluation mode meanwhile.

        Returns "loss" (as trained, without the sampler's importance weights), "loss_unweighted" (mean squared
        error) and the latter at each timestep, "loss_unweighted/t999". With an accelerate ``accelerator``
        every process takes its share and all return the same numbers, for ``accelerator.log(numbers, step)``.
        """
        share = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
        sums = self.sums(predict, latents, models, batch_size, share=share)
        return self.means(sums if accelerator is None else accelerator.reduce(sums, "sum"), len(latents))

    @torch.no_grad()
    def sums(
        self,
        predict: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
        latents: torch.Tensor,
        models: Iterable[torch.nn.Module] = (),
        batch_size: int = 8,
        numbers: Sequence[int] | None = None,
        share: tuple[int, int] = (0, 1),
    ) -> torch.Tensor:
        """The losses summed over images, float32, [2, points]: as trained, and squared errors. Sums of images
        of several shapes, or of several processes, may be added, and :meth:`means` made of them. ``numbers``
        tell the images' noise (None: their places); ``share`` (k, n) does every n-th evaluation from the
        k-th. All shares call ``predict`` equally often: a network that is dealt out to processes (FSDP,
        ZeRO-3) waits for all of them in every call."""
        numbers = range(len(latents)) if numbers is None else numbers
        whole = [(image, t) for t in self.timesteps for image in range(len(latents))]
        work = whole[share[0] :: share[1]]
        calls = -(-len(whole[:: share[1]]) // batch_size)  # of the first share; others have one image less
        sums = torch.zeros(2, len(self.timesteps), device=latents.device)
        devices = [latents.device] if latents.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), evaluating(models):
            # one copy for all batches; where in the sums, image, timestep
            mine = work + whole[:1] if len(work) <= (calls - 1) * batch_size else work
            table = torch.tensor(
                [(self.timesteps.index(t), image, t) for image, t in mine], dtype=torch.int64
            ).reshape(-1, 3)
            table = table.T.contiguous().to(latents.device)
            for start in range(0, len(mine), batch_size):
                chunk = slice(start, start + batch_size)
                noise = torch.stack(
                    [self.noise(numbers[image], t, latents.shape[1:]) for image, t in mine[chunk]]
                )
                if devices:  # from pinned memory a copy does not wait
                    noise = noise.pin_memory().to(latents.device, non_blocking=True)
                where, images, timesteps = table[:, chunk]
                losses = self._losses(predict, latents, images, timesteps, noise)
                if start < len(work):  # else it is only for the others' sake
                    sums.index_add_(1, where, losses)
        return sums

    def means(self, sums: torch.Tensor, images: int) -> dict[str, float]:
        """The numbers of :meth:`__call__`, of the sums over ``images``."""
        weighted, plain = (sums / max(1, images)).tolist()
        found = {"loss": float(np.mean(weighted)), "loss_unweighted": float(np.mean(plain))}
        return found | {
            f"loss_unweighted/t{t}": value for t, value in zip(self.timesteps, plain, strict=True)
        }

    def _losses(
        self,
        predict: Any,
        latents: torch.Tensor,
        images: torch.Tensor,
        timesteps: torch.Tensor,
        noise: torch.Tensor,
    ) -> torch.Tensor:
        """[2, B]: as trained, and squared error."""
        step = self.objective.draw(latents[images], training=False, index=timesteps, noise=noise)
        prediction = predict(step.noisy, step.timesteps, images)
        plain = l2(prediction.float() - step.target.float()).flatten(1).mean(1)
        trained = self.objective.loss(prediction, replace(step, importance=None), reduction="none")
        return torch.stack((trained, plain))

    def noise(self, image: int, timestep: int, shape: tuple[int, ...] | torch.Size) -> torch.Tensor:
        """The noise of one image, by its number, at one timestep: float32 on the CPU."""
        seed = int(np.random.SeedSequence([self.seed, image, timestep]).generate_state(1, np.uint64)[0]) >> 1
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
