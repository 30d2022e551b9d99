"""The noise schedule: one float64 table of betas from which everything else is read.

Noise, targets, loss weights, Huber's delta, previews and saved files all ask the same :class:`NoiseSchedule`;
nothing else in this package computes a sigma or an SNR.
"""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sdxl_fixes.errors import shown as _shown

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

Array = npt.NDArray[np.float64]

RECORD_FORMAT = "sdxl_fixes.schedule"
RECORD_VERSION = 1
TERMINAL_SIGMA_METHODS = ("rescale", "beta_end", "tail", "last")
# where a diffusers config keeps what its own keys cannot say; private keys pass through every diffusers class
# unread and without a warning
EXACT_KEY = "_sdxl_fixes"
# diffusers' name of each beta schedule that we know -> the maker of the same betas
DIFFUSERS_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
MOST_TIMESTEPS = 1_000_000  # that a file may ask for
# what a recipe's first step is made with, by maker; the last three are tables that were given
_MAKES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("linear", "scaled_linear"), ("beta_start", "beta_end")),
    "cosine": ("s", "max_beta"),
    "flow": ("shift",),
    **dict.fromkeys(("betas", "alphas_cumprod", "sigmas"), ()),
}
_ANEW = "make the record anew, with sdxl-fixes stamp --force or NoiseSchedule.to_json"


@dataclass(frozen=True)
class Made:
    """How a schedule was made: a maker of NoiseSchedule and its numbers, none for a table that was given."""

    maker: str
    numbers: tuple[float, ...] = ()

    @classmethod
    def read(cls, step: Any) -> Made:
        """From a record. Raises ValueError for a maker that does not exist, or that lacks or mistakes
        anything."""
        maker = step.get("make") if isinstance(step, Mapping) else None
        if not isinstance(maker, str) or maker not in _MAKES:
            names = f'must be an object whose "make" is one of {", ".join(_MAKES)}'
            raise ValueError(f"step 1 of the recipe {names}, got {_shown(step)}")
        what = f"step 1 of the recipe, {maker},"
        _check_keys(what, step, ("make", *_MAKES[maker]))
        return cls(maker, tuple(_read_number(what, key, step[key]) for key in _MAKES[maker]))

    def to_record(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"make": self.maker, **self.options}

    @property
    def options(self) -> dict[str, float]:
        """The numbers by name."""
        return dict(zip(_MAKES[self.maker], self.numbers, strict=True))

    @property
    def is_law(self) -> bool:
        """Whether it is a law with beta_start and beta_end, which diffusers' configs can name."""
        return self.maker in _LAWS

    def again(self, num_timesteps: int) -> NoiseSchedule | None:
        """The schedule that it makes; None where a table was given."""
        if not _MAKES[self.maker]:
            return None
        make: Callable[..., NoiseSchedule] = getattr(NoiseSchedule, self.maker)
        return make(**self.options, num_timesteps=num_timesteps)

    def __str__(self) -> str:
        return f"{self.maker}({', '.join(f'{key}={value}' for key, value in self.options.items())})"


@dataclass(frozen=True)
class Changed:
    """A change of the end: see :meth:`NoiseSchedule.with_terminal_sigma` and
    :meth:`NoiseSchedule.zero_terminal_snr`, which rescales to an infinite sigma. ``start`` is tail's."""

    sigma: float
    method: str = "rescale"
    start: int | None = None

    @classmethod
    def read(cls, step: Any, place: int) -> Changed:
        """From a record. Raises ValueError for a change that does not exist, or that lacks or mistakes
        anything."""
        what, names = f"step {place} of the recipe", ("zero_terminal_snr", "terminal_sigma")
        change = step.get("change") if isinstance(step, Mapping) else None
        if change not in names:
            one = f'must be an object whose "change" is one of {", ".join(names)}'
            raise ValueError(f"{what} {one}, got {_shown(step)}")
        what = f"{what}, {change},"
        if change == "zero_terminal_snr":
            _check_keys(what, step, ("change",))
            return cls(math.inf)
        tail = step.get("method") == "tail"
        _check_keys(what, step, ("change", "sigma", "method", *(("start",) if tail else ())))
        sigma, method, start = step["sigma"], step["method"], step.get("start")
        methods = [name for name in TERMINAL_SIGMA_METHODS if name != "beta_end"]  # it makes another law
        if method not in methods:
            raise ValueError(f"{what} has method {_shown(method)}: expected one of {', '.join(methods)}")
        if tail and (not isinstance(start, int) or isinstance(start, bool)):
            raise ValueError(f"{what} has start {_shown(start)}: expected a timestep")
        sigma = math.inf if sigma == "inf" else _read_number(what, "sigma", sigma, ' or "inf"')
        return cls(sigma, method, start)

    def to_record(self) -> dict[str, Any]:
        """Plain JSON values."""
        if self._is_zero_terminal_snr:
            return {"change": "zero_terminal_snr"}
        start = {} if self.start is None else {"start": self.start}
        return {"change": "terminal_sigma", "sigma": _number(self.sigma), "method": self.method, **start}

    def again(self, schedule: NoiseSchedule) -> NoiseSchedule:
        """The changed schedule."""
        return schedule.with_terminal_sigma(self.sigma, self.method, self.start)

    @property
    def _is_zero_terminal_snr(self) -> bool:
        return self == Changed(math.inf)

    def __str__(self) -> str:
        (_, name), *options = self.to_record().items()
        return f"{name}({', '.join(f'{key}={value}' for key, value in options)})"


@dataclass(frozen=True, eq=False, repr=False)
class NoiseSchedule:
    """A discrete variance-preserving noise schedule, x_t = sqrt(alphas_cumprod[t])
    x_0 + sqrt(1 - alphas_cumprod[t]) noise.

    ``betas`` (float64, shape [T]) is the whole state; every other table is derived from it and has the same
    shape. The last beta may be 1: then the last timestep is pure noise (SNR 0, sigma infinite). ``made`` and
    ``changes`` tell how the table came about. Instances are immutable, hashable, and equal when their betas
    are equal bit for bit.

    Raises ValueError for betas that are not one-dimensional, finite, in (0, 1) (1 for the last), i.e. for
    sigmas that do not rise, and for a law that makes other betas.
    """

    betas: Array
    made: Made = Made("betas")
    changes: tuple[Changed, ...] = ()

    def __post_init__(self) -> None:
        betas = _as_array("betas", self.betas)  # a copy: nobody else may hold a writable view
        if betas.ndim != 1 or len(betas) < 2:
            raise ValueError(f"betas must be one row of at least 2 numbers, got shape {betas.shape}")
        if not np.isfinite(betas).all():
            raise ValueError(f"betas must be finite, but betas[{int(np.argmin(np.isfinite(betas)))}] is not")
        wrong = ~((betas > 0) & (betas < 1))
        wrong[-1] = not 0 < betas[-1] <= 1
        if wrong.any():
            t = int(np.argmax(wrong))
            raise ValueError(
                "the noise level must rise at every timestep: betas must lie in (0, 1) (the last may be "
                f"1), but betas[{t}] = {betas[t]:g}"
            )
        table = np.cumprod(1 - betas)
        if not (np.diff(table, prepend=1.0) < 0).all():
            t = int(np.argmin(np.diff(table, prepend=1.0) < 0))
            raise ValueError(
                f"the noise level must rise at every timestep, but at timestep {t} betas = {betas[t]:g} "
                "does not raise it in float64"
            )
        betas.setflags(write=False)
        object.__setattr__(self, "betas", betas)
        law = self._law()
        if law is not None:
            start, end = law.numbers
            if not np.array_equal(betas, _law_betas(law.maker, start, end, len(betas))):
                raise ValueError(f"the recipe says {law}, but the betas are others")

    def __reduce__(self) -> tuple[Any, ...]:
        return NoiseSchedule, (self.betas.copy(), self.made, self.changes)

    # ---------------------------------------------------------------- makers

    @classmethod
    def sdxl(cls) -> NoiseSchedule:
        """Stable Diffusion's and SDXL's own schedule: scaled_linear 0.00085 to 0.012, 1000 timesteps,
        terminal sigma 14.6146."""
        return _sdxl()

    @classmethod
    def scaled_linear(
        cls, beta_start: float = 0.00085, beta_end: float = 0.012, num_timesteps: int = 1000
    ) -> NoiseSchedule:
        """Betas whose square roots rise linearly (latent diffusion, arXiv:2112.10752)."""
        return cls._from_law("scaled_linear", beta_start, beta_end, num_timesteps)

    @classmethod
    def linear(
        cls, beta_start: float = 0.0001, beta_end: float = 0.02, num_timesteps: int = 1000
    ) -> NoiseSchedule:
        """Betas that rise linearly (DDPM, arXiv:2006.11239)."""
        return cls._from_law("linear", beta_start, beta_end, num_timesteps)

    @classmethod
    def cosine(cls, s: float = 0.008, max_beta: float = 0.999, num_timesteps: int = 1000) -> NoiseSchedule:
        """alphas_cumprod falls as a squared cosine, betas capped at ``max_beta`` (arXiv:2102.09672
        eq. 17)."""
        if not (s >= 0 and 0 < max_beta < 1):
            raise ValueError(
                f"cosine needs s >= 0 and max_beta in (0, 1), got s={s:g}, max_beta={max_beta:g}"
            )
        u = np.arange(num_timesteps + 1) / num_timesteps
        alpha_bar = np.cos((u + s) / (1 + s) * math.pi / 2) ** 2
        betas = np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], max_beta)
        return cls(betas, Made("cosine", (float(s), float(max_beta))))

    @classmethod
    def flow(cls, shift: float = 1.0, num_timesteps: int = 1000) -> NoiseSchedule:
        """Rectified flow's noise levels, in variance-preserving form: sigma/(1 + sigma) = s, with s = shift
        u / (1 + (shift - 1) u) and u = (t + 1)/T (arXiv:2403.03206 eq. 23). The last timestep is pure
        noise."""
        if not (math.isfinite(shift) and shift > 0):
            raise ValueError(f"shift must be a positive number, got {shift}")
        u = np.arange(1, num_timesteps + 1) / num_timesteps
        with np.errstate(divide="ignore", over="ignore"):
            sigmas = shift * u / (1 - u)  # s/(1 - s)
        return cls(cls.from_sigmas(sigmas).betas, Made("flow", (float(shift),)))

    @classmethod
    def from_betas(cls, betas: npt.ArrayLike) -> NoiseSchedule:
        """A schedule from any betas, shape [T]; the last may be 1."""
        return cls(_as_table("betas", betas))

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: npt.ArrayLike) -> NoiseSchedule:
        """A schedule from any falling alphas_cumprod in (0, 1), shape [T]; the last may be 0."""
        table = _as_table("alphas_cumprod", alphas_cumprod)
        _check_steps("alphas_cumprod", table, falling=True)
        if not (table[0] < 1 and table[-1] >= 0):
            raise ValueError(f"alphas_cumprod must lie in [0, 1), got {table[0]:g} ... {table[-1]:g}")
        schedule = cls(_betas(table), Made("alphas_cumprod"))
        return schedule._checked_end(math.sqrt((1 - table[-1]) / table[-1]) if table[-1] > 0 else math.inf)

    @classmethod
    def from_sigmas(cls, sigmas: npt.ArrayLike) -> NoiseSchedule:
        """A schedule from rising sigmas = sqrt((1 - alphas_cumprod)/alphas_cumprod), shape [T]; the last may
        be infinite."""
        table = _as_table("sigmas", sigmas, last_may_be_inf=True)
        _check_steps("sigmas", table, falling=False)
        if not table[0] > 0:
            raise ValueError(f"sigmas must be positive, but sigmas[0] = {table[0]:g}")
        with np.errstate(over="ignore"):
            schedule = cls(_betas(1 / (1 + table**2)), Made("sigmas"))
        return schedule._checked_end(float(table[-1]))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """The schedule that a diffusers scheduler config describes (the dict of a scheduler_config.json or
        ``scheduler.config``).

        Reads trained_betas, else beta_schedule with beta_start and beta_end; then rescale_betas_zero_snr,
        which always means a true SNR of 0 here (several diffusers classes put sigma 4096 in its place, or
        ignore it). So does zero_terminal_snr under EXACT_KEY, beside trained_betas that end at a finite
        stand-in. A config with use_flow_sigmas and no trained_betas describes rectified flow of its
        flow_shift: its class takes no step by the beta_schedule that diffusers writes beside them; one of a
        flow-matching class (FlowMatchEulerDiscreteScheduler) that of its shift. Raises ValueError for a
        config without betas, an unknown beta_schedule, trained_betas of another length, a shift that depends
        on the canvas (use_dynamic_shifting), and for any of these keys that holds another kind of value.
        """
        if not isinstance(config, Mapping):
            raise ValueError(f"a scheduler config is an object of settings, got {_shown(config)}")
        trained, num_timesteps = config.get("trained_betas"), _count_of(config)
        exact = config.get(EXACT_KEY) or {}
        if not isinstance(exact, Mapping):
            raise ValueError(f"the scheduler config's {EXACT_KEY} is {_shown(exact)}: expected an object")
        if trained is not None:
            betas = _as_table("trained_betas", trained)
            if len(betas) != num_timesteps:
                raise ValueError(
                    f"the scheduler config has {len(betas)} trained_betas but num_train_timesteps is "
                    f"{num_timesteps}: they must be equal"
                )
            if _flag_of(exact, "zero_terminal_snr"):
                betas[-1] = 1
            schedule = cls.from_betas(betas)
        elif is_flow(config):
            if _flag_of(config, "use_dynamic_shifting"):
                raise ValueError(
                    "the scheduler config has use_dynamic_shifting, so its noise schedule is another on "
                    "every canvas: expected one shift"
                )
            shift = "flow_shift" if config.get("use_flow_sigmas") else "shift"
            return cls.flow(_number_of(config, shift, 1.0), num_timesteps)
        elif "beta_schedule" not in config:
            raise ValueError(
                "the scheduler config has neither trained_betas nor beta_schedule, so it "
                "describes no noise schedule"
            )
        elif config["beta_schedule"] == "squaredcos_cap_v2":
            schedule = cls.cosine(num_timesteps=num_timesteps)
        elif config["beta_schedule"] in ("linear", "scaled_linear"):
            # diffusers' own defaults
            start, end = _number_of(config, "beta_start", 0.0001), _number_of(config, "beta_end", 0.02)
            schedule = cls._from_law(config["beta_schedule"], start, end, num_timesteps)
        else:
            raise ValueError(
                f"unknown beta_schedule {_shown(config['beta_schedule'])} in the scheduler config: "
                f"expected one of {DIFFUSERS_BETA_SCHEDULES}"
            )
        return schedule.zero_terminal_snr() if _flag_of(config, "rescale_betas_zero_snr") else schedule

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> NoiseSchedule:
        """The schedule of a diffusers scheduler instance: its config's, checked against the tables that the
        instance really uses. A drop-in of ours uses its ``noise_schedule``.

        Raises ValueError when they disagree (a class that ignores rescale_betas_zero_snr, betas overwritten
        after construction, an end that float32 betas cannot hold to 1 % of sigma, a shift that was set).
        """
        exact = getattr(scheduler, "noise_schedule", None)
        if isinstance(exact, cls):
            return exact
        schedule = cls.from_config(scheduler.config)
        # the instance has tables of the beta_schedule, and uses none
        if schedule.made.maker == "flow":
            return schedule._of_shift(scheduler)
        for name in ("alphas_cumprod", "betas"):
            if getattr(scheduler, name, None) is None:
                continue
            actual, expected = _as_array(name, getattr(scheduler, name)), getattr(schedule, name)
            if len(actual) == len(expected):
                same = np.isclose(actual, expected, rtol=1e-3, atol=1e-9)
                if name == "alphas_cumprod":  # 2 % is 1 % of a large sigma
                    same &= np.isclose(actual, expected, rtol=0.02, atol=0)
                if schedule.zero_terminal:  # a finite stand-in is meant: diffusers' 2**-24, ours
                    same[-1] |= name == "betas" or 0 <= actual[-1] < 1e-6
                if same.all():
                    continue
            raise ValueError(
                f"{type(scheduler).__name__}'s {name} ({len(actual)}, last {actual[-1]:.6g}) is not what "
                "its config says "
                f"({len(expected)}, last {expected[-1]:.6g}): use "
                "NoiseSchedule.from_alphas_cumprod(scheduler.alphas_cumprod) if the "
                "tensor is right, NoiseSchedule.from_config(scheduler.config) if the config is"
            )
        return schedule

    # ---------------------------------------------------------------- changes

    def zero_terminal_snr(self) -> NoiseSchedule:
        """Shift and scale sqrt(alphas_cumprod) so that the last is exactly 0 and the first unchanged
        (arXiv:2305.08891 Alg. 1). A schedule that ends there already is returned as it is."""
        return self if self.zero_terminal else self._at_zero_snr

    @cached_property
    def _at_zero_snr(self) -> NoiseSchedule:
        return self._rescaled(0.0, Changed(math.inf))

    def with_terminal_sigma(
        self, sigma: float, method: str = "rescale", start: int | None = None
    ) -> NoiseSchedule:
        """The same schedule, ending at another sigma. ``method`` says what else may move:

        - ``rescale``: Lin's rescale (arXiv:2305.08891 Alg. 1) aimed at ``sigma`` instead of infinity; moves
          the end most.
        - ``beta_end``: the schedule's own law with beta_end solved for; one number, obeyed by every sampler;
          moves the middle too, so that a trained model has more to learn anew (docs/evidence/leak.md). Needs
          a linear or scaled_linear schedule, a finite sigma.
        - ``tail``: nothing below timestep ``start`` (default: three quarters of T) moves; above it the same
          shift of sqrt(alphas_cumprod) fades in as a square, so that sigma stays smooth and rising.
        - ``last``: the last timestep only.

        ``sigma`` may be infinite except for ``beta_end``. Raises ValueError if the sigma cannot be reached.
        """
        if method not in TERMINAL_SIGMA_METHODS:
            raise ValueError(
                f"unknown terminal sigma method {method!r}: expected one of "
                f"{', '.join(TERMINAL_SIGMA_METHODS)}"
            )
        if math.isnan(sigma) or sigma <= self.sigmas[0]:
            raise ValueError(
                "terminal sigma must be above the schedule's first sigma, "
                f"{self.sigmas[0]:.4g}, got {sigma:g}"
            )
        if start is not None and method != "tail":
            raise ValueError(f"start belongs to method 'tail', not to {method!r}: leave it out")
        if method == "beta_end":
            return self._with_beta_end_for(sigma)
        signal = 1 / math.hypot(1, sigma)  # 0 for infinity
        if method == "rescale":
            return self._rescaled(signal, Changed(float(sigma)))._checked_end(sigma)
        last = len(self) - 1
        start = (
            last - 1
            if method == "last"
            else (min(3 * len(self) // 4, last - 1) if start is None else int(start))
        )
        if not 0 <= start < last:
            raise ValueError(f"start must be a timestep in 0..{last - 1}, got {start}")
        fade = np.clip((np.arange(len(self)) - start) / (last - start), 0, 1) ** 2
        roots = self.sqrt_alphas_cumprod - fade * (self.residual_signal - signal)
        roots[-1] = signal
        betas = _betas(roots**2)
        betas[: start + 1] = self.betas[: start + 1]  # untouched to the last bit
        if not (betas > 0).all():
            raise ValueError(
                f"terminal sigma {sigma:g} by {method!r} would make sigma fall again before the end "
                f"(this schedule ends at {self.terminal_sigma:.4g}): use a larger sigma or method 'rescale'"
            )
        change = Changed(float(sigma), method, start if method == "tail" else None)
        return NoiseSchedule(betas, self.made, (*self.changes, change))._checked_end(sigma)

    def for_resolution(
        self, width: int, height: int, base: int = 512, method: str = "rescale"
    ) -> NoiseSchedule:
        """The terminal sigma for a canvas of width x height pixels: it doubles with every doubling of the
        canvas's length, from this schedule's own at base x base (arXiv:2409.15997 section 2: 14.6 made for
        512 becomes 29 at 1024). Infinite stays infinite."""
        if not (width > 0 and height > 0 and base > 0):
            raise ValueError(
                f"width, height and base must be positive pixel counts, got {width}, {height}, {base}"
            )
        if self.zero_terminal:
            return self
        return self.with_terminal_sigma(self.terminal_sigma * math.sqrt(width * height) / base, method)

    # ---------------------------------------------------------------- tables, float64, shape [T]

    @cached_property
    def alphas(self) -> Array:
        """Share of the signal's power that each timestep leaves."""
        return _frozen(1 - self.betas)

    @cached_property
    def alphas_cumprod(self) -> Array:
        """Share of the signal's power left at each timestep."""
        return _frozen(np.cumprod(1 - self.betas))

    @cached_property
    def sqrt_alphas_cumprod(self) -> Array:
        """alpha: what multiplies the image."""
        return _frozen(np.sqrt(self.alphas_cumprod))

    @cached_property
    def sqrt_one_minus_alphas_cumprod(self) -> Array:
        """What multiplies the noise."""
        return _frozen(np.sqrt(1 - self.alphas_cumprod))

    @cached_property
    def sigmas(self) -> Array:
        """Noise-to-signal ratio sqrt((1 - alphas_cumprod)/alphas_cumprod); infinite at SNR 0."""
        with np.errstate(divide="ignore", over="ignore"):
            sigmas: Array = np.sqrt((1 - self.alphas_cumprod) / self.alphas_cumprod)
        return _frozen(sigmas)

    @cached_property
    def snr(self) -> Array:
        """Signal-to-noise ratio of power, alphas_cumprod/(1 - alphas_cumprod)."""
        return _frozen(self.alphas_cumprod / (1 - self.alphas_cumprod))

    @cached_property
    def log_snr(self) -> Array:
        """Natural logarithm of the SNR; minus infinity at SNR 0."""
        with np.errstate(divide="ignore"):
            log_snr: Array = np.log(self.snr)
        return _frozen(log_snr)

    @cached_property
    def log_sigmas(self) -> Array:
        """Natural logarithm of the sigmas; infinite at SNR 0."""
        return _frozen(-self.log_snr / 2)

    def above(self, sigma: float) -> npt.NDArray[np.bool_]:
        """Which timesteps have a larger sigma, by more than rounding."""
        larger: npt.NDArray[np.bool_] = self.sigmas > sigma * (1 + 1e-9)
        return larger

    def levels(self, flow: bool = False) -> tuple[Array, Array, Array]:
        """What multiplies the image, what multiplies the noise, and the timestep that the network is told:
        x = alpha x_0 + sigma noise.

        With ``flow`` (rectified flow's form) the same noise levels as alpha = 1 - s, sigma = s, told T s
        (arXiv:2209.03003).
        """
        alpha, sigma = self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod
        if not flow:
            return alpha, sigma, _frozen(np.arange(len(self), dtype=np.float64))
        s = sigma / (alpha + sigma)
        return _frozen(alpha / (alpha + sigma)), _frozen(s), _frozen(len(self) * s)

    def levels_at(self, sigmas: npt.ArrayLike, flow: bool = False) -> tuple[Array, Array, Array]:
        """:meth:`levels` at any ratios sigma/alpha (shape [N], infinity among them), whether or not a row has
        them, float64: the timestep between two rows is linear in log sigma, up to an infinite sigma in
        1/sigma. Ratios outside the table have timestep NaN."""
        ratio = np.asarray(sigmas, dtype=np.float64)
        rows, finite = np.arange(len(self), dtype=np.float64), np.isfinite(self.sigmas)
        with np.errstate(divide="ignore"):
            told: Array = np.interp(np.log(ratio), self.log_sigmas[finite], rows[finite])
            inverse = 1 / ratio
        if self.zero_terminal:
            told = told + np.maximum(0.0, 1 - self.sigmas[-2] * inverse)
        alpha, sigma = 1 / np.hypot(1, ratio), 1 / np.hypot(1, inverse)
        if flow:
            alpha, sigma = 1 / (1 + ratio), 1 / (1 + inverse)
            told = len(self) * sigma
        # but for rounding
        inside = (ratio >= self.sigmas[0] * (1 - 1e-9)) & (ratio <= self.terminal_sigma * (1 + 1e-9))
        return alpha, sigma, np.where(inside, told, np.nan)

    @property
    def terminal_sigma(self) -> float:
        """Sigma of the last timestep."""
        return float(self.sigmas[-1])

    @property
    def residual_signal(self) -> float:
        """Share of the image still visible at the last timestep, sqrt(alphas_cumprod[-1]): 0.068 for SDXL."""
        return float(self.sqrt_alphas_cumprod[-1])

    @property
    def zero_terminal(self) -> bool:
        """Whether nothing of the image is left at the last timestep (zero terminal SNR)."""
        return self.residual_signal == 0

    def __len__(self) -> int:
        return len(self.betas)

    # ---------------------------------------------------------------- records

    def to_record(self) -> dict[str, Any]:
        """All of the schedule as plain JSON values; ``from_record`` gives the equal schedule back, bit for
        bit."""
        return {
            "format": RECORD_FORMAT,
            "version": RECORD_VERSION,
            "recipe": [self.made.to_record(), *(change.to_record() for change in self.changes)],
            "terminal_sigma": _number(self.terminal_sigma),
            "betas": self.betas.tolist(),
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> NoiseSchedule:
        """Inverse of :meth:`to_record`. Raises ValueError, in one sentence, for another format, a newer
        version, a record that lacks or mistakes anything, and a recipe that makes other betas."""
        if not isinstance(record, Mapping) or record.get("format") != RECORD_FORMAT:
            raise ValueError(f'not a schedule record: expected an object with "format": "{RECORD_FORMAT}"')
        version = record.get("version")
        if isinstance(version, int) and version > RECORD_VERSION:
            known = f"{RECORD_VERSION}: update sdxl-fixes to read it"
            raise ValueError(f"schedule record version {_shown(version)} is not {known}")
        try:
            if version != RECORD_VERSION:
                raise ValueError(f"its version is {_shown(version)}, expected {RECORD_VERSION}")
            return cls._from_parts(record)
        except ValueError as error:
            raise ValueError(f"the schedule record is broken: {error}; {_ANEW}") from error

    @classmethod
    def _from_parts(cls, record: Mapping[str, Any]) -> NoiseSchedule:
        betas, recipe, end = (record.get(key) for key in ("betas", "recipe", "terminal_sigma"))
        if not isinstance(betas, list):
            raise ValueError(f"its betas must be a list of numbers, got {_shown(betas)}")
        if not all(map(_is_number, betas)):
            t = list(map(_is_number, betas)).index(False)
            raise ValueError(f"its betas must be a list of numbers, but betas[{t}] is {_shown(betas[t])}")
        if not isinstance(recipe, list) or not recipe:
            raise ValueError(f"its recipe must be a list of steps, at least one, got {_shown(recipe)}")
        made = Made.read(recipe[0])
        changes = tuple(Changed.read(step, place) for place, step in enumerate(recipe[1:], 2))
        schedule = cls(_as_table("betas", betas), made, changes)
        schedule._check_recipe()
        if not (end == "inf" or _is_number(end)):
            raise ValueError(f'its terminal_sigma is {_shown(end)}: expected a number or "inf"')
        if not _same_sigma(float(end or 0), schedule.terminal_sigma):
            raise ValueError(f"its terminal_sigma is {end}, its betas end at {schedule.terminal_sigma:.6g}")
        return schedule

    def to_json(self) -> str:
        """The record as strict JSON (an infinite sigma is the string "inf")."""
        return json.dumps(self.to_record(), allow_nan=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> NoiseSchedule:
        """Inverse of :meth:`to_json`. Raises ValueError for what is not JSON, and as :meth:`from_record`."""
        try:
            return cls.from_record(json.loads(text))
        except RecursionError as error:
            raise ValueError(f"not a schedule record: {error}") from error

    def to_config(self, prediction_type: str | None = None) -> dict[str, Any]:
        """This schedule as keywords of a diffusers scheduler config:
        ``SchedulerClass.from_config(scheduler.config, **these)``. (Merged into a copy of ``scheduler.config``
        they would be lost: diffusers drops what its ``_use_default_values`` lists.)

        A linear or scaled_linear law is named (every diffusers class obeys it); any other table becomes
        trained_betas. Spacing is trailing, so that sampling starts at the terminal timestep.
        ``NoiseSchedule.from_config`` gives the equal schedule back.
        """
        config: dict[str, Any] = {
            "num_train_timesteps": len(self),
            "timestep_spacing": "trailing",
            "rescale_betas_zero_snr": False,
        }
        law = self._law()
        if law is None:
            config |= {"trained_betas": self.betas.tolist()}
        else:
            config |= {"trained_betas": None, "beta_schedule": law.maker, **law.options}
        return config | ({} if prediction_type is None else {"prediction_type": prediction_type})

    def scheduler(
        self,
        name: str,
        prediction_type: str = "epsilon",
        timestep_spacing: str | None = None,
        **options: Any,
    ) -> SchedulerMixin:
        """A diffusers scheduler that samples exactly this schedule: see
        :func:`sdxl_fixes.schedulers.scheduler`."""
        from sdxl_fixes import schedulers

        return schedulers.scheduler(self, name, prediction_type, timestep_spacing, **options)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NoiseSchedule) and np.array_equal(self.betas, other.betas)

    def __hash__(self) -> int:
        return hash(self.betas.tobytes())

    def __repr__(self) -> str:
        sigmas = f"sigma {self.sigmas[0]:.4g} to {self.terminal_sigma:.6g}"
        return f"<NoiseSchedule {self._recipe()}: {len(self)} timesteps, {sigmas}>"

    # ---------------------------------------------------------------- helpers

    def _of_shift(self, scheduler: Any) -> NoiseSchedule:
        """Itself, unless ``scheduler`` (a flow-matching class's instance) was set to another shift."""
        told, used = self.made.options["shift"], getattr(scheduler, "shift", None)
        if _is_number(used) and used != told:
            raise ValueError(
                f"{type(scheduler).__name__} has shift {used}, and its config says {told}: use "
                f"NoiseSchedule.flow({used}) if the instance is right, NoiseSchedule.from_config("
                "scheduler.config) if the config is"
            )
        return self

    def _recipe(self) -> str:
        return " ".join(map(str, (self.made, *self.changes)))

    def _law(self) -> Made | None:
        """How it was made, if that is a law with beta_start and beta_end and nothing was changed since."""
        return self.made if self.made.is_law and not self.changes else None

    @classmethod
    def _from_law(cls, maker: str, beta_start: float, beta_end: float, num_timesteps: int) -> NoiseSchedule:
        betas = _law_betas(maker, beta_start, beta_end, num_timesteps)
        return cls(betas, Made(maker, (float(beta_start), float(beta_end))))

    def _check_recipe(self) -> None:
        """Raise ValueError unless the recipe makes these betas. Of a table that was given as such only the
        end can be told: where the last change moved it."""
        again, end = self.made.again(len(self)), self.terminal_sigma
        for change in self.changes:
            if not 0 <= (change.start or 0) < len(self) - 1:
                raise ValueError(f"its recipe says {change}: expected a start in 0..{len(self) - 2}")
            again, end = None if again is None else change.again(again), change.sigma
        # what the recipe makes may differ in the last bits: not every machine has the same cosine
        same = again is None or np.allclose(self.betas, again.betas, rtol=1e-6, atol=1e-12)
        if not (same and _same_sigma(end, self.terminal_sigma)):
            raise ValueError(f"its recipe says {self._recipe()}, but its betas are others")

    def _checked_end(self, sigma: float) -> NoiseSchedule:
        if not _same_sigma(sigma, self.terminal_sigma):
            raise ValueError(
                f"terminal sigma {sigma:g} is too large for a table of float64 betas: use infinity (zero "
                "terminal SNR) instead"
            )
        return self

    def _rescaled(self, signal: float, change: Changed) -> NoiseSchedule:
        first, last = self.sqrt_alphas_cumprod[0], self.residual_signal
        roots = signal + (self.sqrt_alphas_cumprod - last) * (first - signal) / (first - last)
        roots[0], roots[-1] = first, signal
        return NoiseSchedule(_betas(roots**2), self.made, (*self.changes, change))

    def _with_beta_end_for(self, sigma: float) -> NoiseSchedule:
        law = self._law()
        if law is None:
            raise ValueError(
                "method 'beta_end' needs an unchanged linear or scaled_linear schedule: use "
                "'rescale', 'tail' or 'last'"
            )
        if math.isinf(sigma):
            raise ValueError(
                "no beta_end gives an infinite terminal sigma: use zero_terminal_snr(), or "
                "method 'rescale', 'tail' or 'last'"
            )
        make, (start, _) = _LAWS[law.maker], law.numbers

        def reached(end: float) -> float:
            with np.errstate(divide="ignore", over="ignore"):
                left = np.cumprod(1 - make(start, end, len(self)))[-1]
                return float(np.sqrt((1 - left) / left))

        low, high = start, 1 - 1e-9
        if not reached(low) <= sigma <= reached(high):
            raise ValueError(
                f"no beta_end from {low:g} to 1 gives terminal sigma {sigma:g} (this law reaches "
                f"{reached(low):.4g} to "
                f"{reached(high):.4g}): use method 'rescale', 'tail' or 'last'"
            )
        return NoiseSchedule._from_law(
            law.maker, start, _bisect(lambda end: reached(end) - sigma, low, high), len(self)
        )


# beta_start, beta_end, T -> betas
_LAWS: dict[str, Callable[[float, float, int], Array]] = {
    "linear": lambda start, end, count: np.linspace(start, end, count),
    "scaled_linear": lambda start, end, count: np.linspace(math.sqrt(start), math.sqrt(end), count) ** 2,
}


def _law_betas(maker: str, beta_start: float, beta_end: float, num_timesteps: int) -> Array:
    if not (0 < beta_start <= beta_end < 1):
        got = f"{beta_start:g} and {beta_end:g}"
        raise ValueError(f"betas must satisfy 0 < beta_start <= beta_end < 1, got {got}")
    if num_timesteps < 2:
        raise ValueError(f"num_timesteps must be at least 2, got {num_timesteps}")
    return _LAWS[maker](beta_start, beta_end, num_timesteps)


def is_flow(config: Mapping[str, Any]) -> bool:
    """Whether a scheduler config is of rectified flow: use_flow_sigmas, or a flow-matching class."""
    betas = config.get("trained_betas") is not None or "beta_schedule" in config
    matching = str(config.get("_class_name")).startswith("FlowMatch") or ("shift" in config and not betas)
    return matching or _flag_of(config, "use_flow_sigmas")


def _check_keys(what: str, step: Mapping[str, Any], keys: tuple[str, ...]) -> None:
    if missing := [key for key in keys if key not in step]:
        raise ValueError(f"{what} lacks {missing[0]}: expected {', '.join(keys)}")
    if odd := [key for key in step if key not in keys]:
        raise ValueError(f"{what} has {_shown(odd[0])}: expected only {', '.join(keys)}")


def _read_number(what: str, key: str, value: Any, otherwise: str = "") -> float:
    if not _is_number(value):
        raise ValueError(f"{what} has {key} {_shown(value)}: expected a number{otherwise}")
    return float(value)


def _same_sigma(one: float, other: float) -> bool:
    """Whether two sigmas, infinite ones among them, are the same but for rounding."""
    return math.isclose(one, other, rel_tol=1e-6)


def _is_number(value: Any) -> bool:
    """Whether it is a finite number."""
    try:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def _count_of(config: Mapping[str, Any]) -> int:
    count = config.get("num_train_timesteps", 1000)
    if not isinstance(count, int) or isinstance(count, bool) or not 2 <= count <= MOST_TIMESTEPS:
        expected = f"expected a whole number in 2..{MOST_TIMESTEPS}"
        raise ValueError(f"the scheduler config's num_train_timesteps is {_shown(count)}: {expected}")
    return count


def _number_of(config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key, default)
    if not _is_number(value):
        raise ValueError(f"the scheduler config's {key} is {_shown(value)}: expected a number")
    return float(value)


def _flag_of(config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key)
    if not (value is None or isinstance(value, bool)):
        raise ValueError(f"the scheduler config's {key} is {_shown(value)}: expected true or false")
    return bool(value)


def _as_array(name: str, values: Any) -> Array:
    """A copy of numbers, arrays, or tensors of any dtype and device."""
    try:
        table = np.array(values.detach().cpu().tolist() if hasattr(values, "detach") else values)
        if table.dtype.kind not in "iuf":
            raise ValueError(f"it holds {table.dtype}")
        return table.astype(np.float64)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{name} must be one row of numbers, got {_shown(values)} ({error})") from error


def _as_table(name: str, values: npt.ArrayLike, last_may_be_inf: bool = False) -> Array:
    table = _as_array(name, values)
    if table.ndim != 1 or len(table) < 2:
        raise ValueError(f"{name} must be one row of at least 2 numbers, got shape {table.shape}")
    checked = table[:-1] if last_may_be_inf and table[-1] == math.inf else table
    if not np.isfinite(checked).all():
        raise ValueError(f"{name} must be finite, but {name}[{int(np.argmin(np.isfinite(checked)))}] is not")
    return table


def _check_steps(name: str, table: Array, falling: bool) -> None:
    wrong = (np.diff(table) >= 0) if falling else (np.diff(table) <= 0)
    if wrong.any():
        t = int(np.argmax(wrong))
        way = "fall" if falling else "rise"
        raise ValueError(
            f"{name} must {way} at every timestep, but {name}[{t}] = {table[t]:g} and "
            f"{name}[{t + 1}] = {table[t + 1]:g}"
        )


def _betas(alphas_cumprod: Array) -> Array:
    betas: Array = 1 - alphas_cumprod / np.concatenate(([1.0], alphas_cumprod[:-1]))
    return betas


def _frozen(table: npt.NDArray[Any]) -> Array:
    table.setflags(write=False)
    return table


def _number(value: float) -> float | str:
    """JSON has no infinity."""
    return float(value) if math.isfinite(value) else "inf"


def _bisect(function: Callable[[float], float], low: float, high: float) -> float:
    """The root of a rising function, to the last bit."""
    while True:
        middle = (low + high) / 2
        if middle in (low, high):
            return min(low, high, key=lambda x: abs(function(x)))
        low, high = (middle, high) if function(middle) < 0 else (low, middle)


@cache
def _sdxl() -> NoiseSchedule:
    return NoiseSchedule.scaled_linear()
