"""One training step's worth of schedule, prediction, noise, loss and weights."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch

from sdxl_fixes import prediction as predictions
from sdxl_fixes.loss import LossFunction
from sdxl_fixes.noise import InputPerturbation, OffsetNoise
from sdxl_fixes.schedule import NoiseSchedule
from sdxl_fixes.tensors import Table
from sdxl_fixes.timesteps import TimestepSampler
from sdxl_fixes.trainers.step import StepLoss
from sdxl_fixes.weighting import Weighting

EPSILON_AT_ZERO_SNR = (
    "epsilon prediction with zero terminal SNR: at the last timestep the input is the noise itself, so the "
    "network learns to copy it and "
    "nothing about the image, and sampling from it divides by zero. Use v_prediction, or a finite "
    "terminal sigma"
)


@dataclass(frozen=True)
class Step:
    """What :meth:`Objective.draw` made: everything a training step needs."""

    noisy: torch.Tensor  # [B, C, H, W], the latents' dtype: the network's input
    timesteps: torch.Tensor  # [B]: what the network is told; int64 timesteps, for flow_prediction float T * s
    target: torch.Tensor  # [B, C, H, W], float32 (float64 for float64 latents)
    noise: torch.Tensor  # [B, C, H, W], of the target's dtype, unperturbed
    index: torch.Tensor  # [B], int64: row of the schedule's tables
    importance: torch.Tensor | None  # [B], float32: from the timestep sampler


class Objective:
    """Training objective over one noise schedule.

    schedule         the NoiseSchedule that noise, target, loss weights, Huber's delta and timestep sampling
                     all read
    prediction_type  epsilon, v_prediction, sample or flow_prediction
    loss             Loss("l2"), Loss("l1") or ScheduledHuber(...)
    weighting        MinSNR, SoftMinSNR, Debiased, or None
    perturbation     InputPerturbation or None; off where ``draw(..., training=False)``
    offset           OffsetNoise or None
    timesteps        TimestepSampler; None draws uniformly

    flow_prediction trains rectified flow: the input is (1 - s) x0 + s noise with s = sigma/(1 + sigma), and
    the network is told T s. Schedule arithmetic is float32 whatever the latents' dtype. On an accelerator no
    method waits for the device, except the first ``draw``, which checks once that the latents are finite (on
    the CPU every draw checks: it is free there).
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        prediction_type: str = "epsilon",
        loss: LossFunction | None = None,
        weighting: Weighting | None = None,
        perturbation: InputPerturbation | None = None,
        offset: OffsetNoise | None = None,
        timesteps: TimestepSampler | None = None,
    ) -> None:
        self.schedule = schedule
        self.prediction_type = predictions.check_prediction_type(prediction_type)
        self.weighting, self.perturbation, self.offset = weighting, perturbation, offset
        self.timesteps = TimestepSampler(schedule) if timesteps is None else timesteps
        if self.timesteps.schedule != schedule:
            raise ValueError(
                f"the timestep sampler was made for {self.timesteps.schedule!r}, the objective "
                f"for {schedule!r}: one schedule"
            )
        if prediction_type == "epsilon" and schedule.zero_terminal:
            warnings.warn(EPSILON_AT_ZERO_SNR, stacklevel=2)
        flow = prediction_type == "flow_prediction"
        alpha, sigma, told = schedule.levels(flow)
        self._alpha, self._sigma = Table(alpha), Table(sigma)
        self._conditioning = Table(told) if flow else None
        self.step_loss = StepLoss(schedule, prediction_type, loss, weighting)
        self._checked = False

    def draw(
        self,
        latents: torch.Tensor,
        training: bool = True,
        generator: torch.Generator | None = None,
        index: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
    ) -> Step:
        """Noise ``latents`` (x0, [B, C, H, W], scaled as the network expects). ``index`` fixes the timesteps
        ([B], int64), ``noise`` the noise ([B, C, H, W], to which no offset is added).

        ``training=False`` is for evaluation: no perturbation, and a stratified sampler does not advance.
        Random numbers are drawn in kohya's order (noise, offset, timesteps, perturbation), on the CPU the
        very same numbers. Stratified timesteps are drawn by numpy: under torch.compile draw outside the
        compiled function. Raises ValueError for latents that are not finite (see the class), of integers,
        or without a batch.
        """
        self._check_index(latents, index)
        self._check(latents)
        dtype = torch.promote_types(latents.dtype, torch.float32)
        size = (latents.shape[-2], latents.shape[-1])
        if noise is None:
            noise = torch.randn(latents.shape, dtype=dtype, device=latents.device, generator=generator)
            noise = noise if self.offset is None else self.offset(noise, generator)
        elif noise.shape != latents.shape:
            raise ValueError(
                f"noise has shape {tuple(noise.shape)}, the latents {tuple(latents.shape)}: "
                "they must be equal"
            )
        noise = noise.to(latents.device, dtype)
        if index is None:
            index = self.timesteps.draw(len(latents), latents.device, generator, training, size)
        seen = self.perturbation(noise, generator) if training and self.perturbation is not None else noise
        alpha, sigma = self._alpha(index, latents.ndim), self._sigma(index, latents.ndim)
        return Step(
            noisy=predictions.add_noise(latents, seen, alpha, sigma).to(latents.dtype),
            timesteps=index if self._conditioning is None else self._conditioning(index),
            target=predictions.target(self.prediction_type, latents, noise, alpha, sigma),
            noise=noise,
            index=index,
            importance=self.timesteps.weights(index, size),
        )

    @property
    def loss_function(self) -> LossFunction:
        """The loss of the residual."""
        return self.step_loss.function

    def loss(
        self, prediction: torch.Tensor, step: Step, mask: torch.Tensor | None = None, reduction: str = "mean"
    ) -> torch.Tensor:
        """The weighted loss of the network's ``prediction`` for ``step``: a scalar, or shape [B] with
        ``reduction="none"``.

        ``mask`` broadcasts against the prediction and multiplies the loss of each element (which is then
        averaged over all elements).
        """
        if reduction not in ("mean", "none"):
            raise ValueError(f"unknown reduction {reduction!r}: expected mean or none")
        if prediction.shape != step.target.shape:
            raise ValueError(
                f"prediction has shape {tuple(prediction.shape)}, the target "
                f"{tuple(step.target.shape)}: they must be equal"
            )
        reduction = "sample" if reduction == "none" else reduction
        return self.step_loss(prediction, step.target, step.index, mask, step.importance, reduction=reduction)

    def weights(self, step: Step) -> torch.Tensor | None:
        """What multiplies each sample's loss, the SNR weight times the importance weight: float32, [B]; None
        for 1."""
        return self.step_loss.weights(step.index, step.importance)

    def _check_index(self, latents: torch.Tensor, index: torch.Tensor | None) -> None:
        if index is None:
            return
        if index.shape != latents.shape[:1]:
            raise ValueError(
                f"index must hold one timestep per sample, shape {tuple(latents.shape[:1])}, "
                f"got {tuple(index.shape)}"
            )
        if index.device.type == "cpu" and not torch.compiler.is_compiling() and len(index):
            if not 0 <= int(index.min()) <= int(index.max()) < len(self.schedule):
                raise ValueError(
                    f"index must lie in 0..{len(self.schedule) - 1}, got {int(index.min())} to "
                    f"{int(index.max())}"
                )

    def _check(self, latents: torch.Tensor) -> None:
        if latents.ndim in (0, 1, 3) or not latents.is_floating_point():
            raise ValueError(
                f"latents must be floating point of shape [B, C, H, W], got {latents.dtype} of shape "
                f"{list(latents.shape)}: add the batch's dimension, and scale what the VAE encoded"
            )
        if torch.compiler.is_compiling() or (self._checked and latents.device.type != "cpu"):
            return
        if not bool(torch.isfinite(latents).all()):
            bad = int((~torch.isfinite(latents)).sum())
            raise ValueError(
                f"{bad} of {latents.numel()} latent values are not finite: re-encode these images with the "
                "VAE in float32 "
                "(SDXL's own VAE overflows in float16)"
            )
        self._checked = True
