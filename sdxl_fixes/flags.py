"""The flags of a training and what they mean, once for every trainer. Names and meanings are kohya's wherever
kohya has the flag."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from sdxl_fixes.checkpoint import Sampling
from sdxl_fixes.command_line import Flag, flag, flags_of, read_values
from sdxl_fixes.densities import Beta, Density, Laplace, LogitNormal, Mode
from sdxl_fixes.errors import FlagError
from sdxl_fixes.names import (
    DENSITIES,
    FLOW,
    HUBER_C,
    HUBER_KINDS,
    HUBER_SCALE,
    HUBER_SCHEDULE,
    HUBER_SCHEDULES,
    LOSS_TYPES,
    PREDICTION_TYPES,
)
from sdxl_fixes.schedule import TERMINAL_SIGMA_METHODS, NoiseSchedule
from sdxl_fixes.weighting import Debiased, FlowMatching, MinSNR, SoftMinSNR, Weighting

if TYPE_CHECKING:  # they import torch, which a command line that is only read does without
    from sdxl_fixes.loss import Loss, ScheduledHuber
    from sdxl_fixes.noise import InputPerturbation, OffsetNoise
    from sdxl_fixes.objective import Objective
    from sdxl_fixes.timesteps import TimestepSampler

T = TypeVar("T")

STABLE_LOSS_IMAGES = 16  # where no flag says how many
# density -> its flags, in the order of its parameters
_SHAPED_BY: Mapping[str, tuple[Callable[..., Density], tuple[str, ...]]] = {
    "logit_normal": (LogitNormal, ("logit_mean", "logit_std")),
    "laplace": (Laplace, ("laplace_mean", "laplace_scale")),
    "mode": (Mode, ("mode_scale",)),
    "beta": (Beta, ("beta_alpha", "beta_beta")),
}


@dataclass(frozen=True)
class TrainingFlags:
    """The flags' values, checked, and what they describe, made once. Raises FlagError, in one sentence, for a
    value or a combination that makes no sense."""

    match_base: bool = flag(
        False,
        "train on the schedule and with the prediction type that the base model says: by its record, else "
        "markers, modelspec, scheduler config",
        group="base",
    )
    prediction_type: str | None = flag(
        None,
        "what the model is trained to predict; flow_prediction is rectified flow (arXiv:2209.03003)",
        choices=PREDICTION_TYPES,
        group="prediction",
        unset="as the base model",
    )
    flow_shift: float | None = flag(
        None,
        "of flow_prediction: timesteps are drawn at noise levels s = shift u/(1 + (shift - 1) u), u even in "
        "(0, 1]; 1 draws s evenly, more draws more noise (arXiv:2403.03206 eq. 23)",
        group="prediction",
        unset="1, or the base's",
    )
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
    flow_weighting: bool = flag(
        False,
        "weight v_prediction's (or epsilon's) loss so that its gradients are rectified flow's "
        "(arXiv:2209.03003)",
        group="weighting",
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
    timestep_density: str = flag(
        DENSITIES[0],
        "how often each noise level is drawn: logit_normal, mode (arXiv:2403.03206) and beta in s = "
        "sigma/(1 + sigma), laplace in log SNR (arXiv:2407.03297), uniform in the timestep",
        choices=DENSITIES,
        group="timesteps",
    )
    timestep_density_weighted: bool = flag(
        False,
        "weight the loss so that under --timestep_density its expectation stays that of uniform draws",
        group="timesteps",
    )
    timestep_uniform_share: float | None = flag(
        None,
        "draw this share uniformly instead of by --timestep_density: every timestep gets some, and no weight "
        "exceeds 1/share",
        group="timesteps",
    )
    logit_mean: float | None = flag(
        None,
        "mean of log sigma under --timestep_density logit_normal; positive draws more noise",
        group="timesteps",
        unset=0.0,
    )
    logit_std: float | None = flag(
        None, "its standard deviation under logit_normal", group="timesteps", unset=1.0
    )
    laplace_mean: float | None = flag(
        None,
        "mean of log SNR under --timestep_density laplace; positive draws less noise",
        group="timesteps",
        unset=0.0,
    )
    laplace_scale: float | None = flag(None, "its scale under laplace", group="timesteps", unset=0.5)
    mode_scale: float | None = flag(
        None,
        "scale of --timestep_density mode: positive draws more of the middle, 0 is uniform in s",
        group="timesteps",
        unset=1.29,
    )
    beta_alpha: float | None = flag(
        None,
        "alpha of --timestep_density beta; 1 and 1 are uniform in s, flow's own draws",
        group="timesteps",
        unset=1.0,
    )
    beta_beta: float | None = flag(None, "its beta", group="timesteps", unset=1.0)
    resolution_shift: int | None = flag(
        None,
        "side in pixels of the canvas whose noise stays; of other areas sigma grows as the side does "
        "(arXiv:2403.03206 eq. 23)",
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
    heldout_steps: int | None = flag(
        None,
        "every so many optimizer steps, log the loss on pictures that are never trained on, with fixed noise "
        "and timesteps",
        group="heldout",
    )
    heldout_dir: str | None = flag(
        None,
        "their folder: pictures with captions in .txt files of the same name, or a metadata.jsonl",
        group="heldout",
    )
    ema_decay: float | None = flag(
        None,
        "keep an exponential moving average of the trained weights in float32, saved beside every model; "
        "0.9999 is usual, less for short trainings",
        group="ema",
    )
    ema_evaluated: bool = flag(
        False, "the stable and the held-out loss are the average's, not the trained weights'", group="ema"
    )

    # what the flags describe, _of_sdxl what they make of SDXL's own
    _of_sdxl: Sampling = field(init=False, repr=False, compare=False)
    loss: Loss | ScheduledHuber = field(init=False, repr=False, compare=False)
    weightings: Mapping[str, Weighting] = field(init=False, repr=False, compare=False)  # by flag
    density: Density | None = field(init=False, repr=False, compare=False)
    perturbation: InputPerturbation | None = field(init=False, repr=False, compare=False)
    offset: OffsetNoise | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._check()
        made = {
            "_of_sdxl": self._sampling(Sampling(NoiseSchedule.sdxl(), "epsilon")),
            "loss": self._loss(),
            "weightings": self._weightings(),
            "density": self._density(),
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

    def sampling(self, base: Sampling | None = None) -> Sampling:
        """The schedule that is trained on and what is predicted, as far as the flags say it, else as ``base``
        (None: SDXL's own epsilon). Nothing else decides either. Raises FlagError where the flags make no
        sense of ``base``, and where ``match_base`` has to be obeyed and there is no base."""
        if self.match_base:
            if base is None:
                raise FlagError("--match_base needs a base model, and there is none here: leave it out")
            return base
        return self._of_sdxl if base is None else self._sampling(base)

    def schedule(self, base: NoiseSchedule | None = None) -> NoiseSchedule:
        """The schedule that the flags make of ``base`` (None: SDXL's own)."""
        return self.sampling().schedule if base is None else self._changed(base)

    @property
    def schedule_words(self) -> str:
        """The schedule's flags as they were given."""
        names = (*SCHEDULE_FLAGS, "flow_shift")
        given = {name: getattr(self, name) for name in names if getattr(self, name) not in (None, False)}
        return " ".join(f"--{name}" + ("" if value is True else f" {value}") for name, value in given.items())

    def agrees_with(self, schedule: NoiseSchedule) -> bool:
        """Whether ``schedule`` is what the flags describe, so far as they do: a terminal sigma alone may be
        reached in any way."""
        if self.flow_shift is not None:
            return schedule == NoiseSchedule.flow(self.flow_shift, len(schedule))
        if self.terminal_sigma_method is not None or self.terminal_sigma_start is not None:
            return schedule == self._of_sdxl.schedule
        sigma = math.inf if self.zero_terminal_snr else self.terminal_sigma
        return sigma is None or math.isclose(schedule.terminal_sigma, sigma, rel_tol=1e-5)

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
        asked = {
            "--terminal_timestep_share": self.terminal_timestep_share,
            f"--timestep_density {self.timestep_density}": self.density,
            "--resolution_shift": self.resolution_shift,
            "--stratified_timesteps": self.stratified_timesteps,
        }
        name = next((name for name, value in asked.items() if value), None)
        if name is None:
            return None
        from sdxl_fixes.timesteps import TimestepSampler

        options |= {
            "density": self.density,
            "weighted": self.timestep_density_weighted,
            "uniform_share": self.timestep_uniform_share or 0.0,
            "terminal_share": self.terminal_timestep_share or 0.0,
            "base": self.resolution_shift,
            "stratified": self.stratified_timesteps,
        }
        table = self.schedule() if schedule is None else schedule
        return _checked(name, lambda: TimestepSampler(table, **options))

    def objective(self, **options: Any) -> Objective:
        """All of it, for a training loop of your own; ``options`` as for :meth:`timesteps`."""
        from sdxl_fixes.objective import Objective

        trained = self.sampling()
        parts = (self.loss, self.weighting(), self.perturbation, self.offset, self.timesteps(**options))
        return Objective(trained.schedule, trained.prediction_type, *parts)

    def _check(self) -> None:
        if self.flow_shift is not None and self.prediction_type != FLOW:
            raise FlagError(
                f"--flow_shift {self.flow_shift:g} belongs to --prediction_type {FLOW}: give both, or neither"
            )
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
        for name in ("terminal_timestep_share", "timestep_uniform_share"):
            value = getattr(self, name)
            if not 0 <= (value or 0) < 1:
                raise FlagError(f"--{name} {value:g}: expected a share in [0, 1), or leave it out")
        if not 0 <= (self.keep_base or 0) <= 1:
            raise FlagError(f"--keep_base {self.keep_base:g}: expected a share in (0, 1], or leave it out")
        if self.keep_base and self.match_base:
            raise FlagError(
                "--keep_base converts the base model to something else, and --match_base trains on as it "
                "was: leave one of the two out"
            )
        self._check_density()
        for name in ("stable_loss_steps", "stable_loss_images", "heldout_steps", "resolution_shift"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise FlagError(f"--{name} {value}: expected 1 or more, or leave it out")
        if self.stable_loss_images and not self.stable_loss_steps:
            raise FlagError(
                "--stable_loss_images needs --stable_loss_steps: give the optimizer steps "
                "between two losses, or leave it out"
            )
        if self.heldout_dir and not self.heldout_steps:
            raise FlagError(
                "--heldout_dir needs --heldout_steps: give the optimizer steps between two losses, or leave "
                "it out"
            )
        if not 0 <= (self.ema_decay or 0) < 1:
            raise FlagError(
                f"--ema_decay {self.ema_decay:g}: expected a decay in (0, 1), 0.9999 or the like, or leave "
                "it out"
            )
        if self.ema_evaluated and not (self.ema_decay and (self.stable_loss_steps or self.heldout_steps)):
            raise FlagError(
                "--ema_evaluated needs --ema_decay, and --heldout_steps or --stable_loss_steps: give them, "
                "or leave it out"
            )

    def _sampling(self, base: Sampling) -> Sampling:
        predicts, was_flow = self.prediction_type or base.prediction_type, base.prediction_type == FLOW
        if predicts != FLOW:
            if was_flow:
                raise FlagError(
                    f"--prediction_type {predicts}: the base model is rectified flow, which has no schedule "
                    "that this could be trained on: leave it out, or take another base model"
                )
            return Sampling(self._changed(base.schedule), predicts)
        if self.zero_terminal_snr or self.terminal_sigma is not None:
            name = "zero_terminal_snr" if self.zero_terminal_snr else "terminal_sigma"
            raise FlagError(
                f"--{name} does not go with {FLOW}, whose schedule ends in pure noise already: leave it out"
            )
        if was_flow and self.flow_shift is None:
            return base
        shift = 1.0 if self.flow_shift is None else self.flow_shift
        schedule = _checked("--flow_shift", lambda: NoiseSchedule.flow(shift, len(base.schedule)))
        return Sampling(schedule, FLOW)

    def _check_density(self) -> None:
        if self.timestep_density == DENSITIES[0]:
            for name in ("timestep_density_weighted", "timestep_uniform_share"):
                if getattr(self, name):
                    raise FlagError(
                        f"--{name} needs --timestep_density {' or '.join(DENSITIES[1:])}: give one of "
                        "them, or leave it out"
                    )
        for density, (_, names) in _SHAPED_BY.items():
            for name in names if density != self.timestep_density else ():
                if getattr(self, name) is not None:
                    raise FlagError(
                        f"--{name} needs --timestep_density {density}: give both, or leave it out"
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
        if self.flow_weighting:
            if found:
                raise FlagError(
                    f"--flow_weighting and {next(iter(found))} are different weightings of the same loss: "
                    "give one of them"
                )
            found["--flow_weighting"] = FlowMatching()
        return found

    def _density(self) -> Density | None:
        if self.timestep_density == DENSITIES[0]:
            return None
        make, names = _SHAPED_BY[self.timestep_density]
        given = [FLAGS[name].unset if (v := getattr(self, name)) is None else v for name in names]
        return _checked(f"--timestep_density {self.timestep_density}", lambda: make(*given))

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
    """The flags of some groups: base, prediction, schedule, loss, weighting, noise, timesteps, keep,
    validation, heldout, ema."""
    return {name: stated for name, stated in FLAGS.items() if stated.group in groups}


SCHEDULE_FLAGS = grouped("schedule")


def _checked(name: str, make: Callable[[], T]) -> T:
    try:
        return make()
    except ValueError as error:
        raise FlagError(f"{name}: {error}") from error
