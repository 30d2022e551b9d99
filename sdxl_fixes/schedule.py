"""The noise schedule: one float64 table of betas from which everything else is read.

Noise, targets, loss weights, Huber's delta, previews and saved files all ask the same :class:`NoiseSchedule`; nothing else in this
package computes a sigma or an SNR.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

RECORD_FORMAT = "sdxl_fixes.schedule"
RECORD_VERSION = 1
TERMINAL_SIGMA_METHODS = ("rescale", "beta_end", "tail", "last")
# where a diffusers config keeps what its own keys cannot say; private keys pass through every diffusers class unread and without a warning
EXACT_KEY = "_sdxl_fixes"
# diffusers' name of each beta schedule that we know -> the maker of the same betas
DIFFUSERS_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


@dataclass(frozen=True, eq=False, repr=False)
class NoiseSchedule:
    """A discrete variance-preserving noise schedule, x_t = sqrt(alphas_cumprod[t]) x_0 + sqrt(1 - alphas_cumprod[t]) noise.

    ``betas`` (float64, shape [T]) is the whole state; every other table is derived from it and has the same shape. The last
    beta may be 1: then the last timestep is pure noise (SNR 0, sigma infinite). ``recipe`` tells how the table was made, in the
    order of the steps. Instances are immutable, hashable, and equal when their betas are equal bit for bit.

    Raises ValueError for betas that are not one-dimensional, finite, in (0, 1) (1 for the last), i.e. for sigmas that do not rise.
    """

    betas: Array
    recipe: tuple[Mapping[str, Any], ...] = field(default=())

    def __post_init__(self) -> None:
        betas = np.array(self.betas, dtype=np.float64)  # a copy: nobody else may hold a writable view
        if betas.ndim != 1 or len(betas) < 2:
            raise ValueError(f"betas must be one row of at least 2 numbers, got shape {betas.shape}")
        if not np.isfinite(betas).all():
            raise ValueError(f"betas must be finite, but betas[{int(np.argmin(np.isfinite(betas)))}] is not")
        wrong = ~((betas > 0) & (betas < 1))
        wrong[-1] = not 0 < betas[-1] <= 1
        if wrong.any():
            t = int(np.argmax(wrong))
            raise ValueError(
                f"the noise level must rise at every timestep: betas must lie in (0, 1) (the last may be 1), but betas[{t}] = {betas[t]:g}"
            )
        table = np.cumprod(1 - betas)
        if not (np.diff(table, prepend=1.0) < 0).all():
            t = int(np.argmin(np.diff(table, prepend=1.0) < 0))
            raise ValueError(
                f"the noise level must rise at every timestep, but at timestep {t} betas = {betas[t]:g} does not raise it in float64"
            )
        betas.setflags(write=False)
        object.__setattr__(self, "betas", betas)
        steps = tuple(MappingProxyType(dict(step)) for step in self.recipe) or (MappingProxyType({"make": "betas"}),)
        object.__setattr__(self, "recipe", steps)
        law = self._law()
        if law is not None and not np.array_equal(betas, _LAWS[law["make"]](law["beta_start"], law["beta_end"], len(betas))):
            raise ValueError(f"the recipe says {_describe(law)}, but the betas are others")

    def __reduce__(self) -> tuple[Any, ...]:
        return NoiseSchedule, (self.betas.copy(), tuple(dict(step) for step in self.recipe))

    # ---------------------------------------------------------------- makers

    @classmethod
    def sdxl(cls) -> NoiseSchedule:
        """Stable Diffusion's and SDXL's own schedule: scaled_linear 0.00085 to 0.012, 1000 timesteps, terminal sigma 14.6146."""
        return cls.scaled_linear()

    @classmethod
    def scaled_linear(cls, beta_start: float = 0.00085, beta_end: float = 0.012, num_timesteps: int = 1000) -> NoiseSchedule:
        """Betas whose square roots rise linearly (latent diffusion, arXiv:2112.10752)."""
        return cls._from_law("scaled_linear", beta_start, beta_end, num_timesteps)

    @classmethod
    def linear(cls, beta_start: float = 0.0001, beta_end: float = 0.02, num_timesteps: int = 1000) -> NoiseSchedule:
        """Betas that rise linearly (DDPM, arXiv:2006.11239)."""
        return cls._from_law("linear", beta_start, beta_end, num_timesteps)

    @classmethod
    def cosine(cls, s: float = 0.008, max_beta: float = 0.999, num_timesteps: int = 1000) -> NoiseSchedule:
        """alphas_cumprod falls as a squared cosine, betas capped at ``max_beta`` (arXiv:2102.09672 eq. 17)."""
        if not (s >= 0 and 0 < max_beta < 1):
            raise ValueError(f"cosine needs s >= 0 and max_beta in (0, 1), got s={s:g}, max_beta={max_beta:g}")
        u = np.arange(num_timesteps + 1) / num_timesteps
        alpha_bar = np.cos((u + s) / (1 + s) * math.pi / 2) ** 2
        step = {"make": "cosine", "s": float(s), "max_beta": float(max_beta), "num_timesteps": int(num_timesteps)}
        return cls(np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], max_beta), (step,))

    @classmethod
    def flow(cls, shift: float = 1.0, num_timesteps: int = 1000) -> NoiseSchedule:
        """Rectified flow's noise levels, in variance-preserving form: sigma/(1 + sigma) = s, with
        s = shift u / (1 + (shift - 1) u) and u = (t + 1)/T (arXiv:2403.03206 eq. 23). The last timestep is pure noise."""
        if not (math.isfinite(shift) and shift > 0):
            raise ValueError(f"shift must be a positive number, got {shift}")
        u = np.arange(1, num_timesteps + 1) / num_timesteps
        with np.errstate(divide="ignore"):
            sigmas = shift * u / (1 - u)  # s/(1 - s)
        return cls.from_sigmas(sigmas)._renamed({"make": "flow", "shift": float(shift), "num_timesteps": int(num_timesteps)})

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
        schedule = cls(_betas(table), ({"make": "alphas_cumprod"},))
        return schedule._checked_end(math.sqrt((1 - table[-1]) / table[-1]) if table[-1] > 0 else math.inf)

    @classmethod
    def from_sigmas(cls, sigmas: npt.ArrayLike) -> NoiseSchedule:
        """A schedule from rising sigmas = sqrt((1 - alphas_cumprod)/alphas_cumprod), shape [T]; the last may be infinite."""
        table = _as_table("sigmas", sigmas, last_may_be_inf=True)
        _check_steps("sigmas", table, falling=False)
        if not table[0] > 0:
            raise ValueError(f"sigmas must be positive, but sigmas[0] = {table[0]:g}")
        with np.errstate(over="ignore"):
            schedule = cls(_betas(1 / (1 + table**2)), ({"make": "sigmas"},))
        return schedule._checked_end(float(table[-1]))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """The schedule that a diffusers scheduler config describes (the dict of a scheduler_config.json or ``scheduler.config``).

        Reads trained_betas, else beta_schedule with beta_start and beta_end; then rescale_betas_zero_snr, which always means a
        true SNR of 0 here (several diffusers classes put sigma 4096 in its place, or ignore it). So does zero_terminal_snr under
        EXACT_KEY, beside trained_betas that end at a finite stand-in.
        Raises ValueError for a config without betas, an unknown beta_schedule, or trained_betas of another length.
        """
        trained, num_timesteps = config.get("trained_betas"), config.get("num_train_timesteps", 1000)
        if trained is not None:
            if len(trained) != num_timesteps:
                raise ValueError(
                    f"the scheduler config has {len(trained)} trained_betas but num_train_timesteps is {num_timesteps}: they must be equal"
                )
            zero_snr = (config.get(EXACT_KEY) or {}).get("zero_terminal_snr")
            schedule = cls.from_betas([*trained[:-1], 1.0] if zero_snr else trained)
        elif "beta_schedule" not in config:
            raise ValueError("the scheduler config has neither trained_betas nor beta_schedule, so it describes no noise schedule")
        elif config["beta_schedule"] == "squaredcos_cap_v2":
            schedule = cls.cosine(num_timesteps=num_timesteps)
        elif config["beta_schedule"] in ("linear", "scaled_linear"):
            ends = (config.get("beta_start", 0.0001), config.get("beta_end", 0.02))  # diffusers' own defaults
            schedule = cls._from_law(config["beta_schedule"], *ends, num_timesteps)
        else:
            raise ValueError(
                f"unknown beta_schedule {config['beta_schedule']!r} in the scheduler config: expected one of {DIFFUSERS_BETA_SCHEDULES}"
            )
        return schedule.zero_terminal_snr() if config.get("rescale_betas_zero_snr") else schedule

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> NoiseSchedule:
        """The schedule of a diffusers scheduler instance: its config's, checked against the tables that the instance really uses.

        Raises ValueError when they disagree (a class that ignores rescale_betas_zero_snr, betas overwritten after construction).
        """
        schedule = cls.from_config(scheduler.config)
        for name in ("alphas_cumprod", "betas"):
            if getattr(scheduler, name, None) is None:
                continue
            actual, expected = _as_array(getattr(scheduler, name)), getattr(schedule, name)
            if len(actual) == len(expected):
                same = np.isclose(actual, expected, rtol=1e-3, atol=1e-9)
                if schedule.residual_signal == 0:  # a finite stand-in is meant: diffusers' 2**-24, ours
                    same[-1] |= name == "betas" or 0 <= actual[-1] < 1e-6
                if same.all():
                    continue
            raise ValueError(
                f"{type(scheduler).__name__}'s {name} ({len(actual)}, last {actual[-1]:.6g}) is not what its config says "
                f"({len(expected)}, last {expected[-1]:.6g}): use NoiseSchedule.from_alphas_cumprod(scheduler.alphas_cumprod) if the "
                "tensor is right, NoiseSchedule.from_config(scheduler.config) if the config is"
            )
        return schedule

    # ---------------------------------------------------------------- changes

    def zero_terminal_snr(self) -> NoiseSchedule:
        """Shift and scale sqrt(alphas_cumprod) so that the last is exactly 0 and the first unchanged (arXiv:2305.08891 Alg. 1). A
        schedule that ends there already is returned as it is."""
        return self if self.residual_signal == 0 else self._rescaled(0.0, {"change": "zero_terminal_snr"})

    def with_terminal_sigma(self, sigma: float, method: str = "rescale", start: int | None = None) -> NoiseSchedule:
        """The same schedule, ending at another sigma. ``method`` says what else may move:

        - ``rescale``: Lin's rescale (arXiv:2305.08891 Alg. 1) aimed at ``sigma`` instead of infinity; moves the end most.
        - ``beta_end``: the schedule's own law with beta_end solved for; one number, obeyed by every sampler; moves the middle too, so
          that a trained model has more to learn anew (docs/evidence/leak.md). Needs a linear or scaled_linear schedule, a finite sigma.
        - ``tail``: nothing below timestep ``start`` (default: three quarters of T) moves; above it the same shift of
          sqrt(alphas_cumprod) fades in as a square, so that sigma stays smooth and rising.
        - ``last``: the last timestep only.

        ``sigma`` may be infinite except for ``beta_end``. Raises ValueError if the sigma cannot be reached.
        """
        if method not in TERMINAL_SIGMA_METHODS:
            raise ValueError(f"unknown terminal sigma method {method!r}: expected one of {', '.join(TERMINAL_SIGMA_METHODS)}")
        if math.isnan(sigma) or sigma <= self.sigmas[0]:
            raise ValueError(f"terminal sigma must be above the schedule's first sigma, {self.sigmas[0]:.4g}, got {sigma:g}")
        if start is not None and method != "tail":
            raise ValueError(f"start belongs to method 'tail', not to {method!r}: leave it out")
        if method == "beta_end":
            return self._with_beta_end_for(sigma)
        signal = 1 / math.hypot(1, sigma)  # 0 for infinity
        step = {"change": "terminal_sigma", "sigma": _number(sigma), "method": method}
        if method == "rescale":
            return self._rescaled(signal, step)._checked_end(sigma)
        last = len(self) - 1
        start = last - 1 if method == "last" else (min(3 * len(self) // 4, last - 1) if start is None else int(start))
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
        return NoiseSchedule(betas, (*self.recipe, step | ({"start": start} if method == "tail" else {})))._checked_end(sigma)

    def for_resolution(self, width: int, height: int, base: int = 512, method: str = "rescale") -> NoiseSchedule:
        """The terminal sigma for a canvas of width x height pixels: it doubles with every doubling of the canvas's length, from this
        schedule's own at base x base (arXiv:2409.15997 section 2: 14.6 made for 512 becomes 29 at 1024). Infinite stays infinite."""
        if not (width > 0 and height > 0 and base > 0):
            raise ValueError(f"width, height and base must be positive pixel counts, got {width}, {height}, {base}")
        if math.isinf(self.terminal_sigma):
            return self
        return self.with_terminal_sigma(self.terminal_sigma * math.sqrt(width * height) / base, method)

    # ---------------------------------------------------------------- tables, float64, shape [T]

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

    def levels(self, flow: bool = False) -> tuple[Array, Array, Array]:
        """What multiplies the image, what multiplies the noise, and the timestep that the network is told: x = alpha x_0 + sigma noise.

        With ``flow`` (rectified flow's form) the same noise levels as alpha = 1 - s, sigma = s, told T s (arXiv:2209.03003).
        """
        alpha, sigma = self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod
        if not flow:
            return alpha, sigma, _frozen(np.arange(len(self), dtype=np.float64))
        s = sigma / (alpha + sigma)
        return _frozen(alpha / (alpha + sigma)), _frozen(s), _frozen(len(self) * s)

    @property
    def terminal_sigma(self) -> float:
        """Sigma of the last timestep."""
        return float(self.sigmas[-1])

    @property
    def residual_signal(self) -> float:
        """Share of the image still visible at the last timestep, sqrt(alphas_cumprod[-1]): 0.068 for SDXL."""
        return float(self.sqrt_alphas_cumprod[-1])

    def __len__(self) -> int:
        return len(self.betas)

    # ---------------------------------------------------------------- records

    def to_record(self) -> dict[str, Any]:
        """All of the schedule as plain JSON values; ``from_record`` gives the equal schedule back, bit for bit."""
        return {
            "format": RECORD_FORMAT,
            "version": RECORD_VERSION,
            "recipe": [dict(step) for step in self.recipe],
            "terminal_sigma": _number(self.terminal_sigma),
            "betas": self.betas.tolist(),
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> NoiseSchedule:
        """Inverse of :meth:`to_record`. Raises ValueError for another format or a newer version."""
        if not isinstance(record, Mapping) or record.get("format") != RECORD_FORMAT:
            raise ValueError(f'not a schedule record: expected an object with "format": "{RECORD_FORMAT}"')
        if record.get("version") != RECORD_VERSION:
            raise ValueError(f"schedule record version {record.get('version')!r} is not {RECORD_VERSION}: update sdxl-fixes to read it")
        betas, recipe = record.get("betas"), record.get("recipe")
        if not isinstance(betas, list) or not all(isinstance(beta, float | int) for beta in betas):
            raise ValueError("the schedule record's betas must be a list of numbers")
        if not isinstance(recipe, list) or not all(isinstance(step, Mapping) and ({"make", "change"} & set(step)) for step in recipe):
            raise ValueError('the schedule record\'s recipe must be a list of objects with "make" or "change"')
        return cls(_as_table("betas", betas), tuple(recipe))

    def to_json(self) -> str:
        """The record as strict JSON (an infinite sigma is the string "inf")."""
        return json.dumps(self.to_record(), allow_nan=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> NoiseSchedule:
        """Inverse of :meth:`to_json`."""
        return cls.from_record(json.loads(text))

    def to_config(self, prediction_type: str | None = None) -> dict[str, Any]:
        """This schedule as keywords of a diffusers scheduler config: ``SchedulerClass.from_config(scheduler.config, **these)``. (Merged
        into a copy of ``scheduler.config`` they would be lost: diffusers drops what its ``_use_default_values`` lists.)

        A linear or scaled_linear law is named (every diffusers class obeys it); any other table becomes trained_betas. Spacing is
        trailing, so that sampling starts at the terminal timestep. ``NoiseSchedule.from_config`` gives the equal schedule back.
        """
        config: dict[str, Any] = {"num_train_timesteps": len(self), "timestep_spacing": "trailing", "rescale_betas_zero_snr": False}
        law = self._law()
        if law is None:
            config |= {"trained_betas": self.betas.tolist()}
        else:
            config |= {"trained_betas": None, "beta_schedule": law["make"], "beta_start": law["beta_start"], "beta_end": law["beta_end"]}
        return config | ({} if prediction_type is None else {"prediction_type": prediction_type})

    def scheduler(self, name: str, prediction_type: str = "epsilon", timestep_spacing: str = "log_sigma", **options: Any) -> Any:
        """A diffusers scheduler that samples exactly this schedule: see :func:`sdxl_fixes.schedulers.scheduler`."""
        from sdxl_fixes import schedulers

        return schedulers.scheduler(self, name, prediction_type, timestep_spacing, **options)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NoiseSchedule) and np.array_equal(self.betas, other.betas)

    def __hash__(self) -> int:
        return hash(self.betas.tobytes())

    def __repr__(self) -> str:
        made = " ".join(_describe(step) for step in self.recipe)
        return f"<NoiseSchedule {made}: {len(self)} timesteps, sigma {self.sigmas[0]:.4g} to {self.terminal_sigma:.6g}>"

    # ---------------------------------------------------------------- helpers

    def _law(self) -> Mapping[str, Any] | None:
        """The recipe's only step if it is a law with beta_start and beta_end."""
        return self.recipe[0] if len(self.recipe) == 1 and self.recipe[0].get("make") in _LAWS else None

    @classmethod
    def _from_law(cls, make: str, beta_start: float, beta_end: float, num_timesteps: int) -> NoiseSchedule:
        if not (0 < beta_start <= beta_end < 1):
            raise ValueError(f"betas must satisfy 0 < beta_start <= beta_end < 1, got {beta_start:g} and {beta_end:g}")
        if num_timesteps < 2:
            raise ValueError(f"num_timesteps must be at least 2, got {num_timesteps}")
        step = {"make": make, "beta_start": float(beta_start), "beta_end": float(beta_end), "num_timesteps": int(num_timesteps)}
        return cls(_LAWS[make](beta_start, beta_end, num_timesteps), (step,))

    def _checked_end(self, sigma: float) -> NoiseSchedule:
        if sigma != self.terminal_sigma and not math.isclose(sigma, self.terminal_sigma, rel_tol=1e-6):
            raise ValueError(
                f"terminal sigma {sigma:g} is too large for a table of float64 betas: use infinity (zero terminal SNR) instead"
            )
        return self

    def _renamed(self, step: Mapping[str, Any]) -> NoiseSchedule:
        return NoiseSchedule(self.betas, (step,))

    def _rescaled(self, signal: float, step: Mapping[str, Any]) -> NoiseSchedule:
        first, last = self.sqrt_alphas_cumprod[0], self.residual_signal
        roots = signal + (self.sqrt_alphas_cumprod - last) * (first - signal) / (first - last)
        roots[0], roots[-1] = first, signal
        return NoiseSchedule(_betas(roots**2), (*self.recipe, step))

    def _with_beta_end_for(self, sigma: float) -> NoiseSchedule:
        law = self._law()
        if law is None:
            raise ValueError("method 'beta_end' needs an unchanged linear or scaled_linear schedule: use 'rescale', 'tail' or 'last'")
        if math.isinf(sigma):
            raise ValueError("no beta_end gives an infinite terminal sigma: use zero_terminal_snr(), or method 'rescale', 'tail' or 'last'")
        start = law["beta_start"]

        def reached(end: float) -> float:
            with np.errstate(divide="ignore", over="ignore"):
                left = np.cumprod(1 - _LAWS[law["make"]](start, end, len(self)))[-1]
                return float(np.sqrt((1 - left) / left))

        low, high = start, 1 - 1e-9
        if not reached(low) <= sigma <= reached(high):
            raise ValueError(
                f"no beta_end from {low:g} to 1 gives terminal sigma {sigma:g} (this law reaches {reached(low):.4g} to "
                f"{reached(high):.4g}): use method 'rescale', 'tail' or 'last'"
            )
        return NoiseSchedule._from_law(law["make"], start, _bisect(lambda end: reached(end) - sigma, low, high), len(self))


# beta_start, beta_end, T -> betas
_LAWS: dict[str, Callable[[float, float, int], Array]] = {
    "linear": lambda start, end, count: np.linspace(start, end, count),
    "scaled_linear": lambda start, end, count: np.linspace(math.sqrt(start), math.sqrt(end), count) ** 2,
}


def _as_array(values: Any) -> Array:
    """Numbers, arrays, or tensors of any dtype and device."""
    return np.array(values.detach().cpu().tolist() if hasattr(values, "detach") else values, dtype=np.float64)


def _as_table(name: str, values: npt.ArrayLike, last_may_be_inf: bool = False) -> Array:
    table = _as_array(values)
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
        raise ValueError(f"{name} must {way} at every timestep, but {name}[{t}] = {table[t]:g} and {name}[{t + 1}] = {table[t + 1]:g}")


def _betas(alphas_cumprod: Array) -> Array:
    betas: Array = 1 - alphas_cumprod / np.concatenate(([1.0], alphas_cumprod[:-1]))
    return betas


def _frozen(table: npt.NDArray[Any]) -> Array:
    table.setflags(write=False)
    return table


def _number(value: float) -> float | str:
    """JSON has no infinity."""
    return float(value) if math.isfinite(value) else "inf"


def _describe(step: Mapping[str, Any]) -> str:
    (_, name), *arguments = step.items()
    return f"{name}({', '.join(f'{key}={value}' for key, value in arguments)})"


def _bisect(function: Callable[[float], float], low: float, high: float) -> float:
    """The root of a rising function, to the last bit."""
    while True:
        middle = (low + high) / 2
        if middle in (low, high):
            return min(low, high, key=lambda x: abs(function(x)))
        low, high = (middle, high) if function(middle) < 0 else (low, middle)
