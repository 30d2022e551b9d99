"""The flags of a training and what they mean, once for every trainer. Names and meanings are kohya's wherever
kohya has the flag."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from sdxl_fixes.command_line import Flag, flag, flags_of, read_values
from sdxl_fixes.errors import FlagError
from sdxl_fixes.names import (
    HUBER_C,
    HUBER_KINDS,
    HUBER_SCALE,
    HUBER_SCHEDULE,
    HUBER_SCHEDULES,
    LOSS_TYPES,
)
from sdxl_fixes.schedule import TERMINAL_SIGMA_METHODS, NoiseSchedule
from sdxl_fixes.weighting import Debiased, MinSNR, SoftMinSNR, Weighting

if TYPE_CHECKING:  # they import torch, which a command line that is only read does without
    from sdxl_fixes.loss import Loss, ScheduledHuber
    from sdxl_fixes.noise import InputPerturbation, OffsetNoise
    from sdxl_fixes.objective import Objective
    from sdxl_fixes.timesteps import TimestepSampler

T = TypeVar("T")

STABLE_LOSS_IMAGES = 16  # where no flag says how many


@dataclass(frozen=True)
class TrainingFlags:
    """The flags' values, checked, and what they describe, made once. Raises FlagError, in one sentence, for a
    value or a combination that makes no sense."""

    zero_terminal_snr: bool = flag(
        False, "train the last timestep on pure noise (arXiv:2305.08891)", group="schedule"
    )
    terminal_sigma: float | None = flag(
        None,
        "end the noise schedule at this sigma instead of SDXL's 14.6 (inf: zero terminal SNR)",
        group="schedule",
    )
    terminal_sigma_method: str | None = flag(
        None,
        "how --terminal_sigma is reached: rescale moves mostly the end, beta_end the whole schedule, "
        "tail only timesteps from --terminal_sigma_start, last only timestep 999",
        choices=TERMINAL_SIGMA_METHODS,
        group="schedule",
        unset=TERMINAL_SIGMA_METHODS[0],
    )
    terminal_sigma_start: int | None = flag(
        None, "first timestep that --terminal_sigma_method tail may move", group="schedule", unset=750
    )
    loss_type: str = flag(LOSS_TYPES[0], "loss of the residual", choices=LOSS_TYPES, group="loss")
    huber_schedule: str = flag(
        HUBER_SCHEDULE,
        "how Huber's delta follows the noise level",
        choices=HUBER_SCHEDULES,
        group="loss",
    )
    huber_c: float = flag(HUBER_C, "Huber's delta at its smallest", group="loss")
    huber_scale: float = flag(HUBER_SCALE, "multiplies Huber's delta, in every schedule", group="loss")
    huber_l2_gradient: str | None = flag(
        None,
        "give huber and smooth_l1 the gradient norm of l2, so that l2's learning rate still works",
        choices=("sample", "batch"),
        group="loss",
    )
    min_snr_gamma: float | None = flag(
        None, "min-SNR weighting (arXiv:2303.09556); 5 is the paper's", group="weighting"
    )
    min_snr_floor: bool = flag(
        False,
        "keep the weight of the terminal steps, which min-SNR with v-prediction sets to 0 at SNR 0",
        group="weighting",
    )
    soft_min_snr_gamma: float | None = flag(None, "min-SNR without the corner", group="weighting")
    debiased_estimation_loss: bool = flag(
        False, "weight by 1/sqrt(SNR) (arXiv:2310.08442)", group="weighting"
    )
    ip_noise_gamma: float | None = flag(
        None, "input perturbation strength (arXiv:2301.11706); 0.1 is the paper's", group="noise"
    )
    ip_noise_gamma_random_strength: bool = flag(
        False, "draw the strength from 0 to --ip_noise_gamma for every sample", group="noise"
    )
    noise_offset: float | None = flag(None, "offset noise strength", group="noise")
    stratified_timesteps: bool = flag(
        False,
        "spread the timesteps of an optimizer step evenly over batch, accumulation and processes",
        group="timesteps",
    )
    terminal_timestep_share: float | None = flag(
        None,
        "draw this share of the timesteps above SDXL's last sigma, 14.6, weighted so that the expected loss "
        "is unchanged",
        group="timesteps",
    )
    keep_base: float | None = flag(
        None,
        "conversion that keeps what the base knows: this share of the target (1: all of it) is the frozen "
        "base's own prediction, in the new parameterisation, at every sigma that the base was trained on",
        group="keep",
    )
    stable_loss_steps: int | None = flag(
        None,
        "every so many optimizer steps, log the loss on the same images, noise and timesteps: one that can "
        "be compared",
        group="validation",
    )
    stable_loss_images: int | None = flag(
        None,
        "how many images --stable_loss_steps takes, over all processes",
        group="validation",
        unset=STABLE_LOSS_IMAGES,
    )

    # what the flags describe, _of_sdxl the schedule that they make of SDXL's own
    _of_sdxl: NoiseSchedule = field(init=False, repr=False, compare=False)
    loss: Loss | ScheduledHuber = field(init=False, repr=False, compare=False)
    weightings: Mapping[str, Weighting] = field(init=False, repr=False, compare=False)  # by flag
    perturbation: InputPerturbation | None = field(init=False, repr=False, compare=False)
    offset: OffsetNoise | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._check()
        made = {
            "_of_sdxl": self._changed(NoiseSchedule.sdxl()),
            "loss": self._loss(),
            "weightings": self._weightings(),
            "perturbation": self._perturbation(),
            "offset": self._offset(),
        }
        for name, part in made.items():
            object.__setattr__(self, name, part)  # frozen: only here

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> TrainingFlags:
        """The flags of parsed arguments; those that ``args`` lacks keep their defaults, as do those given as
        None."""
        return cls(**read_values(args, FLAGS))

    @property
    def changes_schedule(self) -> bool:
        """Whether training leaves SDXL's own schedule."""
        return self.zero_terminal_snr or self.terminal_sigma is not None

    def schedule(self, base: NoiseSchedule | None = None) -> NoiseSchedule:
        """The schedule that the flags make of ``base`` (None: SDXL's own)."""
        return self._of_sdxl if base is None else self._changed(base)

    def weighting(self) -> Weighting | None:
        """The weighting that the flags describe. Raises FlagError for more than one."""
        if len(self.weightings) > 1:
            raise FlagError(
                f"{' and '.join(self.weightings)} are different weightings of the same loss: give one of them"
            )
        return next(iter(self.weightings.values()), None)

    def timesteps(self, schedule: NoiseSchedule | None = None, **options: Any) -> TimestepSampler | None:
        """The timestep sampler, if one was asked for, of ``schedule`` (None: the one that the flags make of
        SDXL's own); ``options`` are TimestepSampler's (range, seed, ranks, accumulation)."""
        if not (self.stratified_timesteps or self.terminal_timestep_share):
            return None
        from sdxl_fixes.timesteps import TimestepSampler

        share, table = self.terminal_timestep_share or 0.0, self.schedule() if schedule is None else schedule
        name = "--terminal_timestep_share" if share else "--stratified_timesteps"
        stratified = self.stratified_timesteps
        return _checked(
            name, lambda: TimestepSampler(table, terminal_share=share, stratified=stratified, **options)
        )

    def objective(self, prediction_type: str = "epsilon", **options: Any) -> Objective:
        """All of it, for a training loop of your own; ``options`` as for :meth:`timesteps`."""
        from sdxl_fixes.objective import Objective

        parts = (self.loss, self.weighting(), self.perturbation, self.offset, self.timesteps(**options))
        return Objective(self.schedule(), prediction_type, *parts)

    def _check(self) -> None:
        if self.terminal_sigma is None:
            for name in ("terminal_sigma_method", "terminal_sigma_start"):
                if getattr(self, name) is not None:
                    raise FlagError(
                        f"--{name} needs --terminal_sigma: give the sigma to reach, or leave it out"
                    )
        elif self.zero_terminal_snr and self.terminal_sigma != math.inf:
            raise FlagError(
                "--zero_terminal_snr means an infinite terminal sigma, --terminal_sigma "
                f"{self.terminal_sigma:g} another: give one of them"
            )
        if self.huber_l2_gradient is not None and self.loss_type not in HUBER_KINDS:
            raise FlagError(
                "--huber_l2_gradient belongs to --loss_type huber or smooth_l1, not "
                f"{self.loss_type}: leave it out"
            )
        if self.min_snr_floor and not self.min_snr_gamma:
            raise FlagError(
                "--min_snr_floor needs --min_snr_gamma: give the gamma (5 is usual), or leave it out"
            )
        if not 0 <= (self.terminal_timestep_share or 0) < 1:
            raise FlagError(
                f"--terminal_timestep_share {self.terminal_timestep_share:g}: expected a share in [0, 1), or "
                "leave it out"
            )
        if not 0 <= (self.keep_base or 0) <= 1:
            raise FlagError(f"--keep_base {self.keep_base:g}: expected a share in (0, 1], or leave it out")
        for name in ("stable_loss_steps", "stable_loss_images"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise FlagError(f"--{name} {value}: expected 1 or more, or leave it out")
        if self.stable_loss_images and not self.stable_loss_steps:
            raise FlagError(
                "--stable_loss_images needs --stable_loss_steps: give the optimizer steps "
                "between two losses, or leave it out"
            )

    def _changed(self, start: NoiseSchedule) -> NoiseSchedule:
        sigma = self.terminal_sigma
        if sigma is None:
            return start.zero_terminal_snr() if self.zero_terminal_snr else start
        how: dict[str, Any] = {"method": self.terminal_sigma_method, "start": self.terminal_sigma_start}
        given = {name: value for name, value in how.items() if value is not None}
        words = f" --terminal_sigma_method {given['method']}" if "method" in given else ""
        return _checked(
            f"--terminal_sigma {sigma:g}{words}", lambda: start.with_terminal_sigma(sigma, **given)
        )

    def _loss(self) -> Loss | ScheduledHuber:
        from sdxl_fixes.loss import Loss, ScheduledHuber

        if self.loss_type not in HUBER_KINDS:
            return _checked("--loss_type", lambda: Loss(self.loss_type))
        huber = (
            self.loss_type,
            self.huber_schedule,
            self.huber_c,
            self.huber_scale,
            self.huber_l2_gradient,
        )
        return _checked(f"--loss_type {self.loss_type}", lambda: ScheduledHuber(*huber))

    def _weightings(self) -> dict[str, Weighting]:
        gamma, soft_gamma, found = self.min_snr_gamma, self.soft_min_snr_gamma, dict[str, Weighting]()
        if gamma:
            found["--min_snr_gamma"] = _checked("--min_snr_gamma", lambda: MinSNR(gamma, self.min_snr_floor))
        if soft_gamma:
            found["--soft_min_snr_gamma"] = _checked("--soft_min_snr_gamma", lambda: SoftMinSNR(soft_gamma))
        if self.debiased_estimation_loss:
            found["--debiased_estimation_loss"] = Debiased()
        return found

    def _perturbation(self) -> InputPerturbation | None:
        gamma, random = self.ip_noise_gamma, self.ip_noise_gamma_random_strength
        if not gamma:
            return None
        from sdxl_fixes.noise import InputPerturbation

        return _checked("--ip_noise_gamma", lambda: InputPerturbation(gamma, random))

    def _offset(self) -> OffsetNoise | None:
        strength = self.noise_offset
        if not strength:
            return None
        from sdxl_fixes.noise import OffsetNoise

        return _checked("--noise_offset", lambda: OffsetNoise(strength))


FLAGS: Mapping[str, Flag] = flags_of(TrainingFlags)


def grouped(*groups: str) -> dict[str, Flag]:
    """The flags of some groups: schedule, loss, weighting, noise, timesteps, keep, validation."""
    return {name: stated for name, stated in FLAGS.items() if stated.group in groups}


SCHEDULE_FLAGS = grouped("schedule")


def _checked(name: str, make: Callable[[], T]) -> T:
    try:
        return make()
    except ValueError as error:
        raise FlagError(f"{name}: {error}") from error
