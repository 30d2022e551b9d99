"""The loss of one training step, computed here and nowhere else: for :class:`sdxl_fixes.Objective` and for
every trainer.

    loss[b, i] = rho(r[b, i]; delta_t) m[b, i] g[b] w_t u_t
    r = prediction - target, t the timestep of sample b

    rho  l2, l1 or Huber with the delta of the timestep        m  the mask, 1 without one
    g    ScheduledHuber.l2_gradient's factor, else 1           w  the SNR weight (arXiv:2303.09556 and others)
    u    the importance weight of a timestep sampler that does not draw uniformly

and the step's loss is the mean over all elements. Weights belong to timesteps, so every part of a batch is
weighted, the prior half of a DreamBooth batch included.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch

from sdxl_fixes.errors import FixError
from sdxl_fixes.loss import Loss, LossFunction
from sdxl_fixes.schedule import NoiseSchedule
from sdxl_fixes.tensors import Table, append_dims
from sdxl_fixes.weighting import Weighting

REDUCTIONS = ("mean", "sum", "sample", "none")


class StepLoss:
    """Everything that makes a step's loss of a prediction, its tables looked up once.

    schedule, prediction_type  what is trained
    loss                       Loss or ScheduledHuber; None: l2
    weighting                  by SNR, or None
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        prediction_type: str,
        loss: LossFunction | None = None,
        weighting: Weighting | None = None,
    ) -> None:
        self.function: LossFunction = Loss("l2") if loss is None else loss
        delta = self.function.delta(schedule)
        self._delta = None if delta is None else Table(delta)
        self._weight = None if weighting is None else Table(weighting.table(schedule, prediction_type))

    def weights(self, timesteps: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor | None:
        """w u of each sample, float32, [B]; None where all are 1. ``timesteps`` [B] are rows of the
        schedule's tables, ``importance`` [B] is u."""
        weight = None if self._weight is None else self._weight(timesteps)
        parts = [part for part in (weight, importance) if part is not None]
        return functools.reduce(torch.mul, parts) if parts else None

    def delta(self, timesteps: torch.Tensor, ndim: int = 1) -> torch.Tensor | None:
        """Huber's delta of each sample, float32, [B, 1, ...] with ``ndim`` dimensions; None for a loss that
        has none."""
        return None if self._delta is None else self._delta(timesteps, ndim)

    def __call__(
        self,
        prediction: torch.Tensor,
        target: torch.Tensor,
        timesteps: torch.Tensor,
        mask: torch.Tensor | None = None,
        importance: torch.Tensor | None = None,
        later: torch.Tensor | None = None,
        values: torch.Tensor | None = None,
        reduction: str = "mean",
    ) -> torch.Tensor:
        """The loss of ``prediction`` [B, ...] for ``target`` [B, ...].

        mask        broadcasts against the prediction, multiplies each element's loss, which is then averaged
                    over all elements
        importance  [B], from the timestep sampler, None for 1
        later       [B], weights of the trainer's own that it will apply to the result: l2_gradient="batch"
                    must know them
        values      a trainer's own loss of each element [B, ...] in place of rho
        reduction   mean or sum over all elements, sample: means of the samples [B], none: [B, ...]
        """
        if reduction not in REDUCTIONS:
            raise ValueError(f"unknown reduction {reduction!r}: expected one of {', '.join(REDUCTIONS)}")
        weights = self.weights(timesteps, importance)
        if values is None:
            known = [part for part in (weights, later) if part is not None]
            together = functools.reduce(torch.mul, known) if known else None
            delta = self.delta(timesteps, prediction.ndim)
            values = self.function(prediction, target, delta, mask, together)
        elif mask is not None:
            values = values * mask
        if weights is not None:
            values = values * append_dims(weights, values.ndim)
        if reduction == "none":
            return values
        return (
            values.flatten(1).mean(1)
            if reduction == "sample"
            else values.sum()
            if reduction == "sum"
            else values.mean()
        )


@dataclass
class StepState:
    """What the patches of a trainer hand on to each other within one training step."""

    timesteps: torch.Tensor | None = None  # [B], of the latents that were noised
    noised: bool = False  # whether that was in training, and no loss was computed since
    counted: int = 0  # samples of which a loss was computed since
    sampled: bool = False  # whether the run's sampler drew them
    size: tuple[int, int] | None = None  # height and width of the latents that the timesteps are drawn for
    later: torch.Tensor | None = None  # [B], weights that the trainer applies itself
    # prediction, target, the trainer's own loss of them
    residual: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None = None
    loss: torch.Tensor | None = None  # what was returned for them
    # --keep_base: what the base is asked (samples [B, ...], timesteps [B]), and its target [B, ...]
    asked: tuple[torch.Tensor, torch.Tensor] | None = None
    answer: torch.Tensor | None = None
    reached: set[str] = field(default_factory=set)  # marks of the work that was done

    def of(self, part: torch.Tensor, whole: torch.Tensor | None = None) -> torch.Tensor:
        """The timesteps of ``part`` [b, ...], or what of ``whole`` [B, ...] belongs to it: of the batch,
        or of one of the halves that it was split into (DreamBooth's instance and prior half). Raises FixError
        where that cannot be told."""
        if self.timesteps is None:
            raise FixError(
                "a loss was computed before any latents were noised: give --fixes "
                "all,-loss,-weighting,-timesteps"
            )
        whole = self.timesteps if whole is None else whole
        if len(part) == len(self.timesteps):
            return whole
        half = _split(part)
        if half is None or 2 * len(part) != len(self.timesteps):
            raise FixError(
                f"the loss is of {len(part)} samples and {len(self.timesteps)} were noised, so their "
                "timesteps are not known: "
                "give --fixes all,-loss,-weighting,-timesteps"
            )
        return whole.chunk(2)[half]


def _split(part: torch.Tensor) -> int | None:
    """Which output of a split ``part`` is, by its history (a cast in between does not matter); None if it was
    not split."""
    node, number = part.grad_fn, part.output_nr
    while node is not None:
        if "Split" in node.name() or "Chunk" in node.name():
            return number
        if len(node.next_functions) != 1:
            return None
        node, number = node.next_functions[0]
    return None
