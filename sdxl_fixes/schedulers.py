"""Generation: diffusers' schedulers, made to sample exactly the schedule that was trained.

Each class is a drop-in for diffusers' class of the same name, and chooses when an instance is made. What
plain diffusers follows exactly (a named beta schedule with its own timestep spacings; of DDIM's, leading) is
an instance of diffusers' own class. Everything else is an instance of ours: our spacings (``first_order``,
``log_sigma``), trained_betas, rescale_betas_zero_snr, a terminal sigma above 4096, flow_prediction. There

- latents stay at the scale of the training samples, x = alpha x0 + sigma noise, also in Euler and Heun, where
  diffusers divides by alpha: nothing is infinite at SNR 0, and nothing overflows in half precision;
  arithmetic is float32;
- a step goes from one trained timestep to the next one of the list, whatever the number of steps;
- the terminal step at SNR 0 is taken as it is: the sample is the noise, and v_prediction says what image it
  hides.

With h = log((alpha'/sigma')(sigma/alpha)) from one timestep to the next and D the predicted image, every step
below is x' = (sigma'/sigma) x + alpha' (1 - exp(-h)) D and higher terms (arXiv:2211.01095 eq. 9); h is
infinite from SNR 0 and to the clean image.

Saved configs name diffusers' classes and hold what those can follow; loaded by ours they give the exact
schedule back.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

import diffusers
import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

from sdxl_fixes import prediction
from sdxl_fixes.checkpoint import STAND_IN_SIGMA, TIMESTEP_CLASSES, sampling_of_config, scheduler_config
from sdxl_fixes.errors import shown
from sdxl_fixes.schedule import EXACT_KEY, Array, NoiseSchedule
from sdxl_fixes.spacing import OURS, Timesteps, timesteps
from sdxl_fixes.tensors import Table, append_dims

Fixed = TypeVar("Fixed")
Level = tuple[float, float]  # what multiplies the image, what multiplies the noise

CLEAN: Level = (1.0, 0.0)
EPSILON = (
    "epsilon prediction cannot be sampled from SNR 0, where the sample is all noise and says nothing about "
    "the image: "
    "use a model trained with v_prediction, or a schedule with a finite terminal sigma"
)


class _Exact:
    """What the drop-in classes share: the choice of the class, the schedule, and the plan of steps."""

    config: Mapping[str, Any]
    timesteps: torch.Tensor
    noise_schedule: NoiseSchedule  # what the config describes
    _timesteps_dtype = torch.int64  # diffusers'
    # until set_timesteps
    _levels: Sequence[Level] = (CLEAN,)
    _told: Sequence[float] = ()

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """An instance of diffusers' own class where that follows the schedule exactly, else of ours."""
        stock = cls.__bases__[-1]
        defaults = _settings(stock)
        config = {**defaults, **dict(zip(defaults, args, strict=False)), **kwargs}
        return stock(*args, **kwargs) if _stock_follows(cls.__name__, config) else super().__new__(cls)

    def __reduce__(self) -> tuple[Any, ...]:
        # by our name: __module__ is diffusers', below
        return _blank, (type(self).__name__,), self.__dict__

    @classmethod
    def extract_init_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> tuple[Any, ...]:
        """As diffusers', but what only we know reaches the constructor, too. A spacing or betas given to
        from_config as keywords replace the exact ones of the config."""
        init, unused, hidden = super().extract_init_dict(config_dict, **kwargs)  # type: ignore[misc]
        replaced = {"timestep_spacing": "timestep_spacing", "zero_terminal_snr": "trained_betas"}
        known = (hidden.pop(EXACT_KEY, None) or {}).items()
        kept = {key: value for key, value in known if replaced.get(key) not in kwargs}
        return (init | {EXACT_KEY: kept} if kept else init), unused, hidden

    def register_to_config(self, **kwargs: Any) -> None:
        """As diffusers', except that a spacing which stock classes do not know is kept beside one that they
        do. Reads the schedule anew."""
        if kwargs.get("timestep_spacing") in OURS:
            kept = {**(kwargs.get(EXACT_KEY) or {}), "timestep_spacing": kwargs["timestep_spacing"]}
            kwargs |= {"timestep_spacing": "trailing", EXACT_KEY: kept}
        super().register_to_config(**kwargs)  # type: ignore[misc]
        self.noise_schedule = NoiseSchedule.from_config(self.config)
        alpha, sigma, told = self.noise_schedule.levels(self._flow)
        self._tables = [Table(table) for table in (alpha, sigma, (told[1:] + told[:-1]) / 2)]

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the initial noise."""
        return math.hypot(*self._levels[0])

    @init_noise_sigma.setter
    def init_noise_sigma(self, value: Any) -> None:
        """diffusers' constructors write 1; the first timestep decides."""

    def scale_model_input(self, sample: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The sample, which is what the network expects already."""
        return sample

    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """As diffusers', at any trained timestep (shape [B]; of rectified flow at any at all), with or
        without set_timesteps."""
        ndim, timesteps = original_samples.ndim, timesteps.to(original_samples.device).float()
        if self._flow:
            s = append_dims(timesteps / len(self.noise_schedule), ndim)
            level = 1 - s, s
        else:
            alpha, sigma, middles = self._tables
            index = torch.searchsorted(middles.on(timesteps.device), timesteps)
            level = alpha(index, ndim), sigma(index, ndim)
        return prediction.add_noise(original_samples, noise, *level).to(original_samples.dtype)

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None, timesteps: Any = None
    ) -> None:
        """Plan ``num_inference_steps`` steps, or steps at the ``timesteps`` that are given, falling, in the
        numbers that the network is told (those of ``self.timesteps``): trained ones; of rectified flow any
        between the first and the last that are trained. Raises ValueError for others, and for settings that
        overrule the schedule or that end in NaN."""
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("set_timesteps needs num_inference_steps or timesteps, and not both")
        _check_form(self, self.noise_schedule)
        told = self.noise_schedule.levels(self._flow)[2]
        t = self._checked(timesteps) if num_inference_steps is None else told[self._rows(num_inference_steps)]
        self.num_inference_steps = len(t)
        t = self._order(t)
        levels = [self._level(one) for one in t]
        to_first = self._option("final_sigmas_type") == "sigma_min"  # not to the clean image
        self._levels = [*levels, self._level(told[0]) if to_first else CLEAN]
        # of flow s, of others the noise-to-signal ratio
        ratios = [
            sigma if self._flow else sigma / alpha if alpha else math.inf for alpha, sigma in self._levels
        ]
        self.sigmas = torch.tensor(ratios, dtype=torch.float32)
        listed = torch.from_numpy(t).to(torch.float32 if self._flow else self._timesteps_dtype)
        self._told, self.timesteps = listed.tolist(), listed.to(device)
        self._reset()

    @property
    def _flow(self) -> bool:
        return bool(self.config["prediction_type"] == "flow_prediction")

    def _option(self, name: str) -> Any:
        """A setting of this class; None for what it only carries along from another's config."""
        return self.config.get(name) if name in _settings(type(self)) else None

    def _spacing(self) -> str:
        for name in ("use_beta_sigmas", "use_lu_lambdas", "sigma_min", "sigma_max"):
            if self._option(name):
                raise ValueError(
                    f"{name} does not go with {self.noise_schedule!r}: use "
                    "timestep_spacing='log_sigma' or use_karras_sigmas"
                )
        if self._option("timestep_type") == "continuous":
            raise ValueError("timestep_type 'continuous' is for models trained on log sigma: use 'discrete'")
        if self._option("use_karras_sigmas"):
            return "karras"
        spacing = (self.config.get(EXACT_KEY) or {}).get("timestep_spacing") or self.config[
            "timestep_spacing"
        ]
        return "log_sigma" if self._option("use_exponential_sigmas") else str(spacing)

    def _rows(self, steps: int) -> Timesteps:
        return timesteps(self.noise_schedule, steps, self._spacing(), self._option("steps_offset") or 0)

    def _checked(self, given: Any) -> Array:
        told = self.noise_schedule.levels(self._flow)[2]
        t = self._unordered(np.array(given.tolist() if hasattr(given, "tolist") else given, dtype=np.float64))
        right = t.ndim == 1 and len(t) > 0 and bool((np.diff(t) < 0).all())
        # flow's are no round numbers, and may be given as float32 or the error below shows them
        most = min(told[-1] * (1 + 1e-5), len(told)) if self._flow else told[-1]
        right = right and bool(t[0] <= most and t[-1] >= told[0] * (1 - 1e-5))
        if not right or not (self._flow or (t == np.round(t)).all()):
            kind = "numbers" if self._flow else "whole numbers"
            raise ValueError(
                f"timesteps must be {kind} that fall from at most {told[-1]:g} to at least {told[0]:g}, "
                f"got {shown(given)}"
            )
        return t

    def _order(self, t: Array) -> Array:
        """The timesteps in the order in which the network is asked."""
        return t

    def _unordered(self, t: Array) -> Array:
        """Timesteps that were given, also in that order."""
        return t

    def _level(self, timestep: Any) -> Level:
        """Of any trained timestep; of rectified flow of any at all."""
        alpha, sigma, told = self.noise_schedule.levels(self._flow)
        t, row = float(timestep), int(np.searchsorted((told[1:] + told[:-1]) / 2, float(timestep)))
        if self._flow and not math.isclose(t, told[row], rel_tol=1e-7):  # float32's
            return 1 - t / len(told), t / len(told)
        return float(alpha[row]), float(sigma[row])

    def _reset(self) -> None:
        self._step_index: int | None = None
        self._begin_index: int | None = None

    def _advance(self, timestep: Any) -> tuple[Level, Level]:
        """The levels that this step goes from and to; its place in the list is then passed."""
        if self._step_index is None:
            self._step_index = self._find(timestep) if self._begin_index is None else self._begin_index
        self._step_index += 1
        return self._levels[self._step_index - 1], self._levels[self._step_index]

    def _around(self, timestep: Any) -> tuple[Level, Level]:
        """The level of any trained timestep, and that of the next one of the list."""
        if not self._told:
            self.set_timesteps(len(self.noise_schedule))
        t = self._value(timestep)
        later = (level for at, level in zip(self._told, self._levels, strict=False) if at < t)
        return self._level(t), next(later, self._levels[-1])

    def _value(self, timestep: Any) -> float:
        """A timestep as a number. One that is an element of ``self.timesteps``, which is what a pipeline
        passes, is known by its place, so that no device is waited for."""
        listed = self.timesteps
        if isinstance(timestep, torch.Tensor) and isinstance(listed, torch.Tensor) and not timestep.ndim:
            mine = timestep.untyped_storage().data_ptr() == listed.untyped_storage().data_ptr()
            place = int(timestep.storage_offset()) - int(listed.storage_offset())
            if mine and timestep.dtype == listed.dtype and 0 <= place < len(self._told):
                return self._told[place]
        return float(timestep)

    def _find(self, timestep: Any) -> int:
        if not self._told:
            # as diffusers' classes without set_timesteps: every trained timestep
            self.set_timesteps(len(self.noise_schedule))
        value = self._value(timestep)
        if value not in self._told:
            raise ValueError(
                f"timestep {value:g} is not one of the {len(self._told)} of set_timesteps: "
                "pass scheduler.timesteps in turn"
            )
        return len(self._told) - 1 - self._told[::-1].index(value)

    def _predicted(
        self, model_output: torch.Tensor, sample: torch.Tensor, level: tuple[float, float]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The image and the noise, float32."""
        kind = self.config["prediction_type"]
        x0, noise = prediction.x0_and_noise(
            model_output, "sample" if kind == "original_sample" else kind, sample, *level
        )
        if self._option("thresholding"):
            x0 = self._threshold_sample(x0)  # type: ignore[attr-defined]
        elif self._option("clip_sample"):
            x0 = x0.clamp(-self.config["clip_sample_range"], self.config["clip_sample_range"])
        return x0, noise

    def _first_order(
        self,
        level: Level,
        after: Level,
        x0: torch.Tensor,
        noise: torch.Tensor,
        eta: float = 0.0,
        generator: Any = None,
        fresh: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """DDIM's step (arXiv:2010.02502 eq. 12), which is Euler's; with eta 1 DDPM's and Euler
        ancestral's."""
        alpha_next, sigma_next = after
        stays = _stays(level, after)
        new = eta * sigma_next * math.sqrt(1 - stays**2)
        x: torch.Tensor = alpha_next * x0 + math.sqrt(sigma_next**2 - new**2) * noise
        if new > 0:
            fresh = (
                randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
                if fresh is None
                else fresh
            )
            x = x + new * fresh
        return x


# diffusers' classes that raise NotImplementedError at the first step of a model that predicts the image
_NO_SAMPLE = ("EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler")


def _settings(cls: Any) -> dict[str, Any]:
    """A scheduler class's own settings and their defaults."""
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    return {one.name: one.default for one in parameters if one.kind is not one.VAR_KEYWORD}


def _stock_follows(name: str, config: Mapping[str, Any]) -> bool:
    """Whether diffusers' class of that name samples exactly the schedule of its whole ``config``. Where
    nobody can (epsilon at SNR 0), it does as well as it can, with a warning."""
    told = (config.get(key) for key in (EXACT_KEY, "rescale_betas_zero_snr"))
    asked = any(told) or config["trained_betas"] is not None or config["timestep_spacing"] in OURS
    try:
        schedule = NoiseSchedule.from_config(config)
    except ValueError:
        if config.get(EXACT_KEY) or config["timestep_spacing"] in OURS:
            raise
        return True  # only diffusers knows it
    sigma_space = name not in TIMESTEP_CLASSES
    if sigma_space and schedule.zero_terminal and config["prediction_type"] == "epsilon":
        warnings.warn(
            f"{name}: {EPSILON}; going on as diffusers does, as if sigma ended at 4096", stacklevel=4
        )
        return True
    if asked:
        return False
    if config.get("use_flow_sigmas"):
        return True  # at timesteps of its own
    if name == "DDIMScheduler" and config["timestep_spacing"] != "leading":
        return False  # it goes to t - T // steps, whatever the next timestep of the list
    if name in _NO_SAMPLE and config["prediction_type"] == "sample":
        return False
    return schedule.terminal_sigma <= STAND_IN_SIGMA and config["prediction_type"] != "flow_prediction"


def _check_form(made: Any, schedule: NoiseSchedule) -> None:
    """Raise ValueError for settings of an instance, diffusers' or ours, by which it takes no step, or one to
    NaN: forms that divide by the signal at SNR 0, or by the noise at the clean image."""
    name, config, refused = type(made).__name__, made.config, list[tuple[str, str, Any]]()
    if name == "DDPMScheduler" and isinstance(made, _Exact):
        if not config["variance_type"].startswith("fixed_small"):
            refused.append(("variance_type", f"does not go with {schedule!r}", "fixed_small"))
    if name == "DPMSolverMultistepScheduler" and schedule.zero_terminal:
        if not config["algorithm_type"].endswith("++"):
            refused.append(("algorithm_type", "divides by the signal, 0 at SNR 0", "dpmsolver++"))
    clean = config.get("final_sigmas_type", "zero") == "zero"
    if name == "UniPCMultistepScheduler" and (clean or schedule.zero_terminal):
        where = "at the clean image" if clean else "at SNR 0"
        for key, right in (("solver_type", "bh2"), ("predict_x0", True)):
            if config[key] != right:
                refused.append((key, f"divides by 0 {where}", right))
        if clean and not config["lower_order_final"] and config["solver_order"] > 1:
            refused.append(("lower_order_final", f"divides by 0 {where}", True))
    for key, why, right in refused:
        raise ValueError(f"{name}'s {key} {config[key]!r} {why}: use {right!r}")


def _blank(name: str) -> Any:
    """An instance of ours without a state, for copy and pickle."""
    return object.__new__(CLASSES[name])


def _stays(level: Level, after: Level) -> float:
    """exp(-h), the share of the noise-to-signal ratio that a step leaves."""
    return level[0] * after[1] / (after[0] * level[1])


def _result(x: torch.Tensor, x0: torch.Tensor, sample: torch.Tensor, return_dict: bool) -> Any:
    x, x0 = x.to(sample.dtype), x0.to(sample.dtype)
    return DDIMSchedulerOutput(prev_sample=x, pred_original_sample=x0) if return_dict else (x, x0)


class DDPMScheduler(_Exact, diffusers.DDPMScheduler):  # type: ignore[misc]
    """diffusers' DDPMScheduler; the variance is fixed_small's."""

    def step(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        generator: Any = None,
        return_dict: bool = True,
    ) -> Any:
        (alpha, sigma), after = self._around(timestep)
        x0, _ = self._predicted(model_output, sample, (alpha, sigma))
        x = self._first_order(
            (alpha, sigma), after, x0, (sample.float() - alpha * x0) / sigma, 1.0, generator
        )
        return _result(x, x0, sample, return_dict)


class DDIMScheduler(_Exact, diffusers.DDIMScheduler):  # type: ignore[misc]
    """diffusers' DDIMScheduler, except that a step goes to the next timestep of the list, and the last one to
    the clean image whatever set_alpha_to_one says."""

    def step(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Any = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        (alpha, sigma), after = self._around(timestep)
        x0, noise = self._predicted(model_output, sample, (alpha, sigma))
        if use_clipped_model_output:
            noise = (sample.float() - alpha * x0) / sigma
        x = self._first_order((alpha, sigma), after, x0, noise, eta, generator, variance_noise)
        return _result(x, x0, sample, return_dict)


class EulerDiscreteScheduler(_Exact, diffusers.EulerDiscreteScheduler):  # type: ignore[misc]
    """diffusers' EulerDiscreteScheduler, without churn."""

    _timesteps_dtype = torch.float32

    def step(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        s_noise: float = 1.0,
        generator: Any = None,
        return_dict: bool = True,
    ) -> Any:
        if s_churn:
            raise ValueError(
                f"s_churn {s_churn:g} does not go with {self.noise_schedule!r}: use euler_a "
                "for noise at every step"
            )
        level, after = self._advance(timestep)
        x0, noise = self._predicted(model_output, sample, level)
        return _result(self._first_order(level, after, x0, noise), x0, sample, return_dict)


class EulerAncestralDiscreteScheduler(_Exact, diffusers.EulerAncestralDiscreteScheduler):  # type: ignore[misc]
    """diffusers' EulerAncestralDiscreteScheduler."""

    _timesteps_dtype = torch.float32

    def step(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        generator: Any = None,
        return_dict: bool = True,
    ) -> Any:
        level, after = self._advance(timestep)
        x0, noise = self._predicted(model_output, sample, level)
        return _result(self._first_order(level, after, x0, noise, 1.0, generator), x0, sample, return_dict)


class HeunDiscreteScheduler(_Exact, diffusers.HeunDiscreteScheduler):  # type: ignore[misc]
    """diffusers' HeunDiscreteScheduler, except that the second evaluation corrects the predicted image as
    linear in log SNR (the exponential form, arXiv:2211.01095 eq. 10) instead of the slope in sigma, which
    explodes where sigmas lie far apart.

    From SNR 0 log SNR is infinitely far, and the predicted image is linear in r = alpha/sigma instead, of
    which every smooth one is a power series: the step's integral of exp(log r - log r') (r/r') over log r is
    1/2."""

    _timesteps_dtype = torch.float32

    def set_timesteps(  # type: ignore[override]
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        num_train_timesteps: int | None = None,
        timesteps: Any = None,
    ) -> None:
        """As of the others; ``num_train_timesteps``, which diffusers' constructor passes, is the config's."""
        super().set_timesteps(num_inference_steps, device, timesteps)

    def _order(self, t: Array) -> Array:
        # each is first the end of a step, then the beginning of the next
        return np.concatenate((t[:1], np.repeat(t[1:], 2)))

    def _unordered(self, t: Array) -> Array:
        twice = len(t) % 2 == 1 and np.array_equal(t[1::2], t[2::2])
        return np.concatenate((t[:1], t[1::2])) if twice else t

    def _reset(self) -> None:
        super()._reset()
        # predicted image, sample and level of the first, between the two evaluations
        self._first: tuple[torch.Tensor, torch.Tensor, Level] | None = None

    @property
    def state_in_first_order(self) -> bool:
        """Whether the next step is the first of the two."""
        return self._first is None

    def step(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        return_dict: bool = True,
    ) -> Any:
        level, after = self._advance(timestep)
        x0, noise = self._predicted(model_output, sample, level)
        if self._first is None:
            if after is not self._levels[-1]:
                self._first = x0, sample.float(), level
            return _result(self._first_order(level, after, x0, noise), x0, sample, return_dict)
        (before, x, start), self._first = self._first, None
        stays = _stays(start, level)
        second = 1 - (1 - stays) / -math.log(stays) if stays > 0 else 0.5
        x = level[1] / start[1] * x + level[0] * ((1 - stays) * before + second * (x0 - before))
        return _result(x, x0, sample, return_dict)


class _Multistep(_Exact):
    """Of the solvers that diffusers writes in alpha and sigma already: ours are the timesteps, float32, and
    the step from SNR 0."""

    def _reset(self) -> None:
        super()._reset()
        self.model_outputs = [None] * self.config["solver_order"]
        self.lower_order_nums = 0

    def _sigma_to_alpha_sigma_t(self, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # right at 0 and infinity
        return (1 - sigma, sigma) if self._flow else ((1 + sigma**2) ** -0.5, (1 + sigma**-2) ** -0.5)

    def _in_float32(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        return_dict: bool,
        **options: Any,
    ) -> Any:
        at = self._step_index if self._step_index is not None else self._begin_index
        at = self._find(timestep) if at is None else at
        self._step_index = at  # else diffusers looks it up on the device
        taken = super().step(  # type: ignore[misc]
            model_output.float(), timestep, sample.float(), return_dict=False, **options
        )
        if self._levels[at][0] == 0:
            self.lower_order_nums = 0  # nothing can be extrapolated from infinitely far away
        x = taken[0].to(sample.dtype)
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)


class DPMSolverMultistepScheduler(_Multistep, diffusers.DPMSolverMultistepScheduler):  # type: ignore[misc]
    """diffusers' DPMSolverMultistepScheduler: DPM++ 2M and, with algorithm_type sde-dpmsolver++, DPM++ 2M
    SDE."""

    def step(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        generator: Any = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        # older releases know none
        given = {} if variance_noise is None else {"variance_noise": variance_noise}
        return self._in_float32(model_output, timestep, sample, return_dict, generator=generator, **given)


class UniPCMultistepScheduler(_Multistep, diffusers.UniPCMultistepScheduler):  # type: ignore[misc]
    """diffusers' UniPCMultistepScheduler."""

    def step(
        self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, return_dict: bool = True
    ) -> Any:
        return self._in_float32(model_output, timestep, sample, return_dict)

    def _reset(self) -> None:
        super()._reset()
        self.timestep_list = [None] * self.config["solver_order"]
        self.last_sample = None


# name -> class, its own settings
SAMPLERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddpm": (DDPMScheduler, {}),
    "ddim": (DDIMScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler_a": (EulerAncestralDiscreteScheduler, {}),
    "dpmpp_2m": (DPMSolverMultistepScheduler, {}),
    "dpmpp_2m_sde": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": (UniPCMultistepScheduler, {}),
    "heun": (HeunDiscreteScheduler, {}),
}
CLASSES = {cls.__name__: cls for cls, _ in SAMPLERS.values()}
_FIRST_ORDER = {SAMPLERS[name][0] for name in ("ddpm", "ddim", "euler", "euler_a")}
for _drop_in in CLASSES.values():
    # pipelines write a scheduler's module and class into model_index.json, and a folder must load without us
    _drop_in.__module__ = _drop_in.__bases__[-1].__module__


def scheduler(
    schedule: NoiseSchedule,
    name: str,
    prediction_type: str = "epsilon",
    timestep_spacing: str | None = None,
    **options: Any,
) -> SchedulerMixin:
    """A scheduler for diffusers' pipelines that samples exactly ``schedule``.

    ``name`` is one of ddpm, ddim, euler, euler_a, dpmpp_2m, dpmpp_2m_sde, unipc, heun. ``timestep_spacing``
    is first_order (the default of the first four), log_sigma (of the others), or one of diffusers' (trailing,
    linspace, leading); ``options`` are more settings of diffusers' class (``use_karras_sigmas=True``,
    ``solver_order=3``). Raises ValueError for an unknown name, setting or prediction type, for settings that
    end in NaN, and for epsilon at SNR 0.
    """
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}: expected one of {', '.join(SAMPLERS)}")
    cls, settings = SAMPLERS[name]
    known = _settings(cls)
    for option in options:
        if option not in known:
            raise ValueError(f"{cls.__name__} has no setting {option!r}: expected some of {', '.join(known)}")
    return _made(cls, schedule, prediction_type, timestep_spacing, None, settings | options)


def fix_scheduler(
    fixed: Fixed,
    schedule: NoiseSchedule | None = None,
    prediction_type: str | None = None,
    timestep_spacing: str | None = None,
    **options: Any,
) -> Fixed:
    """``fixed``, a scheduler of diffusers or a pipeline that has one, made to sample its own schedule
    exactly.

    A pipeline gets the new scheduler and is returned; a scheduler stays as it is, and a new one of the same
    name and settings is returned, without those that overrule the schedule or the image (Karras' sigmas,
    sigma_max, clip_sample, ...). ``schedule`` and ``prediction_type`` are for a config that does not say
    what was trained: a model trained with v-prediction and zero terminal SNR that was loaded as epsilon.
    ``options`` are more settings of the class, of those, too. Raises ValueError for a class without a
    drop-in, and as :func:`scheduler`.
    """
    pipe: Any = fixed
    theirs = getattr(pipe, "scheduler", pipe)
    name = type(theirs).__name__
    if name not in CLASSES:
        raise ValueError(
            f"there is no drop-in for {name}: take another, for example pipe.scheduler = "
            "schedule.scheduler('euler', ...)"
        )
    config = dict(theirs.config) | ({"prediction_type": prediction_type} if prediction_type else {})
    trained = sampling_of_config(config).schedule if schedule is None else schedule
    ours = _made(CLASSES[name], trained, config["prediction_type"], timestep_spacing, theirs.config, options)
    if theirs is pipe:
        return cast(Fixed, ours)
    pipe.scheduler = ours
    return fixed


def _made(
    cls: Any,
    schedule: NoiseSchedule,
    prediction_type: str,
    spacing: str | None,
    base: Mapping[str, Any] | None,
    options: Mapping[str, Any],
) -> Any:
    if prediction.check_prediction_type(prediction_type) == "epsilon" and schedule.zero_terminal:
        raise ValueError(EPSILON)
    spacing = spacing or ("first_order" if cls in _FIRST_ORDER else "log_sigma")
    made = cls.from_config(
        {**config_for(cls, schedule, prediction_type, base), **options}, timestep_spacing=spacing
    )
    _check_form(made, schedule)
    if isinstance(made, _Exact):
        made._rows(1)  # refuse now what set_timesteps would
    return made


def config_for(
    cls: Any, schedule: NoiseSchedule, prediction_type: str, base: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """:func:`sdxl_fixes.checkpoint.scheduler_config` of the class ``cls``, diffusers' or ours, of the release
    that is installed."""
    return scheduler_config(cls.__name__, schedule, prediction_type, base, _settings(cls))
