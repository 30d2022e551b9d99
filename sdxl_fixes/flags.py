"""Command-line flags and what they mean, once for every trainer. Names and meanings are kohya's wherever
kohya has the flag."""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, TypeVar

from sdxl_fixes.names import HUBER_KINDS, HUBER_SCHEDULES, LOSS_TYPES
from sdxl_fixes.schedule import TERMINAL_SIGMA_METHODS, NoiseSchedule
from sdxl_fixes.weighting import Debiased, MinSNR, SoftMinSNR, Weighting

if TYPE_CHECKING:  # they import torch, which a command line that is only read does without
    from sdxl_fixes.loss import Loss, ScheduledHuber
    from sdxl_fixes.noise import InputPerturbation, OffsetNoise
    from sdxl_fixes.objective import Objective
    from sdxl_fixes.timesteps import TimestepSampler

T = TypeVar("T")


class FlagError(ValueError):
    """A flag's value is wrong, or two flags contradict each other; the message is one sentence for the
    user."""


SCHEDULE_FLAGS: dict[str, dict[str, Any]] = {
    "zero_terminal_snr": dict(
        action="store_true", help="train the last timestep on pure noise (arXiv:2305.08891)"
    ),
    "terminal_sigma": dict(
        type=float,
        help="end the noise schedule at this sigma instead of SDXL's 14.6 (inf: zero terminal SNR)",
    ),
    "terminal_sigma_method": dict(
        choices=TERMINAL_SIGMA_METHODS,
        help="how --terminal_sigma is reached: rescale moves mostly the end (default), beta_end the whole "
        "schedule, "
        "tail only timesteps from --terminal_sigma_start, last only timestep 999",
    ),
    "terminal_sigma_start": dict(
        type=int, help="first timestep that --terminal_sigma_method tail may move (default 750)"
    ),
}
LOSS_FLAGS: dict[str, dict[str, Any]] = {
    "loss_type": dict(choices=LOSS_TYPES, default="l2", help="loss of the residual"),
    "huber_schedule": dict(
        choices=HUBER_SCHEDULES, default="snr", help="how Huber's delta follows the noise level"
    ),
    "huber_c": dict(type=float, default=0.1, help="Huber's delta at its smallest"),
    "huber_scale": dict(type=float, default=1.0, help="multiplies Huber's delta, in every schedule"),
    "huber_l2_gradient": dict(
        choices=("sample", "batch"),
        help="give huber and smooth_l1 the gradient norm of l2, so that l2's learning rate still works",
    ),
}
WEIGHTING_FLAGS: dict[str, dict[str, Any]] = {
    "min_snr_gamma": dict(type=float, help="min-SNR weighting (arXiv:2303.09556); 5 is the paper's"),
    "min_snr_floor": dict(
        action="store_true",
        help="keep the weight of the terminal steps, which min-SNR with v-prediction sets to 0 at SNR 0",
    ),
    "soft_min_snr_gamma": dict(type=float, help="min-SNR without the corner"),
    "debiased_estimation_loss": dict(action="store_true", help="weight by 1/sqrt(SNR) (arXiv:2310.08442)"),
}
NOISE_FLAGS: dict[str, dict[str, Any]] = {
    "ip_noise_gamma": dict(
        type=float, help="input perturbation strength (arXiv:2301.11706); 0.1 is the paper's"
    ),
    "ip_noise_gamma_random_strength": dict(
        action="store_true", help="draw the strength from 0 to --ip_noise_gamma for every sample"
    ),
    "noise_offset": dict(type=float, help="offset noise strength"),
}
TIMESTEP_FLAGS: dict[str, dict[str, Any]] = {
    "stratified_timesteps": dict(
        action="store_true",
        help="spread the timesteps of an optimizer step evenly over batch, accumulation and processes",
    ),
    "terminal_timestep_share": dict(
        type=float,
        help="draw this share of the timesteps above SDXL's last sigma, 14.6, weighted so that "
        "the expected loss is unchanged",
    ),
}
VALIDATION_FLAGS: dict[str, dict[str, Any]] = {
    "stable_loss_steps": dict(
        type=int,
        help="every so many optimizer steps, log the loss on the same images, noise and "
        "timesteps: one that can be compared",
    ),
    "stable_loss_images": dict(
        type=int, help="how many images --stable_loss_steps takes, over all processes (default 16)"
    ),
}
FLAGS = {
    **SCHEDULE_FLAGS,
    **LOSS_FLAGS,
    **WEIGHTING_FLAGS,
    **NOISE_FLAGS,
    **TIMESTEP_FLAGS,
    **VALIDATION_FLAGS,
}


def add_flags(parser: argparse.ArgumentParser, names: tuple[str, ...] = tuple(FLAGS)) -> None:
    """Add the flags ``names`` to ``parser``, except those that it has already (which keep their own help and
    defaults)."""
    group = parser.add_argument_group("sdxl-fixes")
    for name in names:
        if f"--{name}" not in parser._option_string_actions:
            group.add_argument(f"--{name}", **FLAGS[name])


def declared(parser: argparse.ArgumentParser, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What ``parser`` says of those of the flags ``names`` that it has, in the form of FLAGS; those that take
    a kind of value which :func:`read_values` does not know are left out."""
    known = {
        action.dest: action
        for action in parser._actions
        if action.nargs in (None, 0) and action.type in (None, *_EXPECTED)
    }
    return {
        name: dict(
            action="store_true" if known[name].nargs == 0 else None,
            type=known[name].type,
            choices=known[name].choices,
        )
        for name in names
        if name in known
    }


def read_values(args: argparse.Namespace, flags: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The values that ``args`` has of ``flags`` (declared as in FLAGS; None is none), as the command line
    would have read them: they may come from a TOML file, which argparse does not check. Raises FlagError for
    a value that the command line would not take."""
    given = {name: getattr(args, name, None) for name in flags if not _off(getattr(args, name, None))}
    return {name: _read(name, value, flags[name]) for name, value in given.items()}


def _off(value: Any) -> bool:
    """Not given, or false: also for a number, as trainers' own ``if`` takes it."""
    return value is None or value is False


_EXPECTED: dict[Any, str] = {
    bool: "true or false, without quotes",
    int: "a whole number",
    float: "a number",
    str: "text in quotes",
}


def _read(name: str, value: Any, flag: Mapping[str, Any]) -> Any:
    kind, choices = (
        bool if flag.get("action") == "store_true" else flag.get("type") or str,
        flag.get("choices"),
    )
    read = _of_kind(kind, value)
    if read is None or (choices is not None and read not in choices):
        named = (
            None if choices is None else ", ".join(str(choice) for choice in choices if choice is not None)
        )
        expected = f"one of {named}" if named else _EXPECTED[kind]
        raise FlagError(f"--{name}: expected {expected}, got {value!r}: correct it, or leave the flag out")
    return read


def _of_kind(kind: Any, value: Any) -> Any:
    """``value``, or what its text says; None if that is not of ``kind``. A number stays as it is, except that
    900.0 is a whole one."""
    if kind is bool or isinstance(value, bool):
        # 1 and 0 are the same, and trainers take them
        return bool(value) if kind is bool and value in (True, False) else None
    if isinstance(value, str):
        try:
            return kind(value)
        except ValueError:
            return None
    if isinstance(value, Real) and kind is int:
        return round(value) if value % 1 == 0 else None
    return value if isinstance(value, Real) and kind is float else None


@dataclass(frozen=True)
class Settings:
    """The flags' values, checked. Raises FlagError, in one sentence, for a value or a combination that makes
    no sense."""

    zero_terminal_snr: bool = False
    terminal_sigma: float | None = None
    terminal_sigma_method: str | None = None
    terminal_sigma_start: int | None = None
    loss_type: str = "l2"
    huber_schedule: str = "snr"
    huber_c: float = 0.1
    huber_scale: float = 1.0
    huber_l2_gradient: str | None = None
    min_snr_gamma: float | None = None
    min_snr_floor: bool = False
    soft_min_snr_gamma: float | None = None
    debiased_estimation_loss: bool = False
    ip_noise_gamma: float | None = None
    ip_noise_gamma_random_strength: bool = False
    noise_offset: float | None = None
    stratified_timesteps: bool = False
    terminal_timestep_share: float | None = None
    stable_loss_steps: int | None = None
    stable_loss_images: int | None = None

    def __post_init__(self) -> None:
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
        for name in ("stable_loss_steps", "stable_loss_images"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise FlagError(f"--{name} {value}: expected 1 or more, or leave it out")
        if self.stable_loss_images and not self.stable_loss_steps:
            raise FlagError(
                "--stable_loss_images needs --stable_loss_steps: give the optimizer steps "
                "between two losses, or leave it out"
            )
        for check in (
            self.schedule,
            self.loss,
            self.weightings,
            self.perturbation,
            self.offset,
            self.timesteps,
        ):
            check()  # raises for a value of its own; what it makes is kept

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Settings:
        """Settings from parsed arguments; flags that ``args`` lacks keep their defaults, as do those given as
        None."""
        return cls(**read_values(args, FLAGS))

    @property
    def changes_schedule(self) -> bool:
        """Whether training leaves SDXL's own schedule."""
        return self.zero_terminal_snr or self.terminal_sigma is not None

    def schedule(self, base: NoiseSchedule | None = None) -> NoiseSchedule:
        """The schedule that the flags make of ``base`` (None: SDXL's own)."""
        return self._schedule if base is None else self._changed(base)

    @functools.cached_property
    def _schedule(self) -> NoiseSchedule:
        return self._changed(NoiseSchedule.sdxl())

    def _changed(self, start: NoiseSchedule) -> NoiseSchedule:
        sigma = self.terminal_sigma
        if sigma is None:
            return start.zero_terminal_snr() if self.zero_terminal_snr else start
        method = self.terminal_sigma_method or "rescale"
        name = f"--terminal_sigma {sigma:g}" + (
            f" --terminal_sigma_method {method}" if self.terminal_sigma_method else ""
        )
        return _checked(name, lambda: start.with_terminal_sigma(sigma, method, self.terminal_sigma_start))

    def loss(self) -> Loss | ScheduledHuber:
        """The loss that the flags describe."""
        return self._loss

    @functools.cached_property
    def _loss(self) -> Loss | ScheduledHuber:
        from sdxl_fixes.loss import Loss, ScheduledHuber

        if self.loss_type not in HUBER_KINDS:
            return _checked("--loss_type", lambda: Loss(self.loss_type))
        return _checked(
            f"--loss_type {self.loss_type}",
            lambda: ScheduledHuber(
                self.loss_type, self.huber_schedule, self.huber_c, self.huber_scale, self.huber_l2_gradient
            ),
        )

    def weighting(self) -> Weighting | None:
        """The weighting that the flags describe. Raises FlagError for more than one."""
        found = self.weightings()
        if len(found) > 1:
            raise FlagError(
                f"{' and '.join(found)} are different weightings of the same loss: give one of them"
            )
        return next(iter(found.values()), None)

    def weightings(self) -> dict[str, Weighting]:
        """Every weighting that a flag asks for, by flag."""
        return dict(self._weightings)

    @functools.cached_property
    def _weightings(self) -> dict[str, Weighting]:
        gamma, soft_gamma, found = self.min_snr_gamma, self.soft_min_snr_gamma, dict[str, Weighting]()
        if gamma:
            found["--min_snr_gamma"] = _checked("--min_snr_gamma", lambda: MinSNR(gamma, self.min_snr_floor))
        if soft_gamma:
            found["--soft_min_snr_gamma"] = _checked("--soft_min_snr_gamma", lambda: SoftMinSNR(soft_gamma))
        if self.debiased_estimation_loss:
            found["--debiased_estimation_loss"] = Debiased()
        return found

    def perturbation(self) -> InputPerturbation | None:
        """Input perturbation, if asked for."""
        from sdxl_fixes.noise import InputPerturbation

        gamma = self.ip_noise_gamma
        return (
            None
            if not gamma
            else _checked(
                "--ip_noise_gamma", lambda: InputPerturbation(gamma, self.ip_noise_gamma_random_strength)
            )
        )

    def offset(self) -> OffsetNoise | None:
        """Offset noise, if asked for."""
        from sdxl_fixes.noise import OffsetNoise

        strength = self.noise_offset
        return None if not strength else _checked("--noise_offset", lambda: OffsetNoise(strength))

    def timesteps(self, schedule: NoiseSchedule | None = None, **options: Any) -> TimestepSampler | None:
        """The timestep sampler, if one was asked for, of ``schedule`` (None: the one that the flags make of
        SDXL's own); ``options`` are TimestepSampler's (range, seed, ranks, accumulation)."""
        from sdxl_fixes.timesteps import TimestepSampler

        if not (self.stratified_timesteps or self.terminal_timestep_share):
            return None
        share, table = self.terminal_timestep_share or 0.0, self.schedule() if schedule is None else schedule
        name = "--terminal_timestep_share" if share else "--stratified_timesteps"
        return _checked(
            name,
            lambda: TimestepSampler(
                table, terminal_share=share, stratified=self.stratified_timesteps, **options
            ),
        )

    def objective(self, prediction_type: str = "epsilon", **options: Any) -> Objective:
        """All of it, for a training loop of your own; ``options`` as for :meth:`timesteps`."""
        from sdxl_fixes.objective import Objective

        parts = (self.loss(), self.weighting(), self.perturbation(), self.offset(), self.timesteps(**options))
        return Objective(self.schedule(), prediction_type, *parts)


def _checked(flag: str, make: Callable[[], T]) -> T:
    try:
        return make()
    except FlagError:
        raise
    except ValueError as error:
        raise FlagError(f"{flag}: {error}") from error
