"""Generation: diffusers' schedulers, made to sample exactly the schedule that was trained.

Each class is a drop-in for diffusers' class of the same name. What plain diffusers can follow exactly (a
named beta schedule with its own timestep spacings) runs diffusers' own code, bit for bit. Everything else
runs ours (``exact`` is then true): ``log_sigma`` spacing, trained_betas, rescale_betas_zero_snr, a terminal
sigma above 4096, flow_prediction. There

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

import functools
import inspect
import math
import warnings
from collections.abc import Mapping
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

from sdxl_fixes import prediction
from sdxl_fixes.checkpoint import STAND_IN_SIGMA, scheduler_config
from sdxl_fixes.schedule import EXACT_KEY, NoiseSchedule
from sdxl_fixes.spacing import Timesteps, timesteps
from sdxl_fixes.tensors import Table

CLEAN = (1.0, 0.0)
# diffusers' classes that are right at SNR 0, but for epsilon
FOLLOW_INFINITY = ("DDPMScheduler", "DDIMScheduler")
EPSILON = (
    "epsilon prediction cannot be sampled from SNR 0, where the sample is all noise and says nothing about "
    "the image: "
    "use a model trained with v_prediction, or a schedule with a finite terminal sigma"
)


class _Exact:
    """What the drop-in classes share: the schedule, the plan of steps, and the choice between diffusers' code
    and ours."""

    config: Mapping[str, Any]
    timesteps: torch.Tensor
    _stock: Any  # diffusers' class
    _timesteps_dtype = torch.int64  # diffusers'

    def __init_subclass__(cls) -> None:
        stock = next((base for base in cls.__mro__ if base.__module__.startswith("diffusers.")), None)
        if stock is None:
            return
        cls._stock = stock
        steps, step = inspect.signature(stock.set_timesteps), inspect.signature(stock.step)  # type: ignore[attr-defined]

        @functools.wraps(stock.set_timesteps)  # type: ignore[attr-defined]
        def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
            # HeunDiscreteScheduler.__init__ calls this before it has any
            if hasattr(self, "timesteps") and self.exact:
                self._plan(
                    **{k: v for k, v in steps.bind(self, *args, **kwargs).arguments.items() if k != "self"}
                )
            else:
                stock.set_timesteps(self, *args, **kwargs)  # type: ignore[attr-defined]

        @functools.wraps(stock.step)  # type: ignore[attr-defined]
        def take(self: Any, *args: Any, **kwargs: Any) -> Any:
            given = step.bind(self, *args, **kwargs).arguments
            if not self._takes(given["timestep"]):
                return stock.step(self, *args, **kwargs)  # type: ignore[attr-defined]
            del given["self"]
            return self._step(**given)

        cls.set_timesteps, cls.step = set_timesteps, take  # type: ignore[attr-defined]

    def register_to_config(self, **kwargs: Any) -> None:
        """As diffusers', except that log_sigma, which stock classes do not know, is kept beside a spacing
        that they do."""
        if kwargs.get("timestep_spacing") == "log_sigma":
            kwargs |= {"timestep_spacing": "trailing", EXACT_KEY: {"timestep_spacing": "log_sigma"}}
        super().register_to_config(**kwargs)  # type: ignore[misc]
        self.__module__ = self._stock.__module__  # pipelines write an instance's module into model_index.json

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As diffusers'; a spacing or betas given as keywords replace the exact ones of ``config``."""
        if isinstance(config, Mapping):
            replaced = {"timestep_spacing": "timestep_spacing", "zero_terminal_snr": "trained_betas"}
            kept = {
                key: value
                for key, value in (config.get(EXACT_KEY) or {}).items()
                if replaced.get(key) not in kwargs
            }
            if kwargs.get("timestep_spacing") == "log_sigma":
                kwargs["timestep_spacing"], kept["timestep_spacing"] = "trailing", "log_sigma"
            config = (
                {**config, EXACT_KEY: kept}
                if kept
                else {key: value for key, value in config.items() if key != EXACT_KEY}
            )
        return super().from_config(config, return_unused_kwargs, **kwargs)  # type: ignore[misc]

    @property
    def noise_schedule(self) -> NoiseSchedule:
        """The schedule that this scheduler's config describes."""
        return self._reading()[0] or NoiseSchedule.from_config(self.config)

    @property
    def exact(self) -> bool:
        """Whether our code takes the steps; else diffusers' own."""
        return self._reading()[1]

    def scale_model_input(self, sample: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As diffusers'; where ``exact``, the sample is what the network expects already."""
        if self.exact:
            return sample
        scaled: torch.Tensor = super().scale_model_input(sample, *args, **kwargs)  # type: ignore[misc]
        return scaled

    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """As diffusers'; where ``exact``, at any trained timestep (shape [B]), with or without
        set_timesteps."""
        if not self.exact:
            noisy: torch.Tensor = super().add_noise(original_samples, noise, timesteps)  # type: ignore[misc]
            return noisy
        alpha, sigma, told = self._reading()[2]
        timesteps = timesteps.to(original_samples.device)
        index = torch.searchsorted(told.on(timesteps.device), timesteps.float() - 1e-3).clamp(
            max=len(self.noise_schedule) - 1
        )
        ndim = original_samples.ndim
        return prediction.add_noise(original_samples, noise, alpha(index, ndim), sigma(index, ndim)).to(
            original_samples.dtype
        )

    # ---------------------------------------------------------------- ours

    def _reading(self) -> tuple[NoiseSchedule | None, bool, list[Table]]:
        config = self.config
        read = self.__dict__.get("_read")
        if read is None or read[0] is not config:
            read = self._read = (config, self._read_config(config))
        return read[1]

    def _read_config(self, config: Mapping[str, Any]) -> tuple[NoiseSchedule | None, bool, list[Table]]:
        asked = (
            config.get(EXACT_KEY)
            or config.get("trained_betas") is not None
            or config.get("rescale_betas_zero_snr")
        )
        try:
            schedule = NoiseSchedule.from_config(config)
        except ValueError:
            if asked:
                raise
            return None, False, []  # a beta schedule that only diffusers knows
        theirs = config.get("use_flow_sigmas")  # at timesteps of their own
        ours = asked or ((schedule.terminal_sigma > STAND_IN_SIGMA or self._flow) and not theirs)
        if (
            ours
            and schedule.zero_terminal
            and config["prediction_type"] == "epsilon"
            and self._stock.__name__ not in FOLLOW_INFINITY
        ):
            warnings.warn(
                f"{type(self).__name__}: {EPSILON}; going on as diffusers does, as if sigma ended at 4096",
                stacklevel=4,
            )
            ours = False
        return schedule, bool(ours), [Table(level) for level in schedule.levels(self._flow)]

    @property
    def _flow(self) -> bool:
        return bool(self.config["prediction_type"] == "flow_prediction")

    def _option(self, name: str) -> Any:
        """A setting of this class; None for what it only carries along from another's config."""
        return self.config.get(name) if name in inspect.signature(self._stock.__init__).parameters else None

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

    def _plan(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: Any = None,
        sigmas: Any = None,
        **others: Any,
    ) -> None:
        if sigmas is not None or others.get("mu") is not None:
            raise ValueError(
                "sigmas and mu are not for models trained on discrete timesteps: pass "
                "timesteps or num_inference_steps"
            )
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("set_timesteps needs num_inference_steps or timesteps, and not both")
        rows = (
            self._rows(num_inference_steps) if num_inference_steps is not None else self._checked(timesteps)
        )
        alpha, sigma, told = self.noise_schedule.levels(self._flow)
        rows = self._order(rows)
        end = (
            (float(alpha[0]), float(sigma[0])) if self._option("final_sigmas_type") == "sigma_min" else CLEAN
        )
        self._levels = [*zip(alpha[rows].tolist(), sigma[rows].tolist(), strict=True), end]
        ratios = sigma if self._flow else self.noise_schedule.sigmas
        self.sigmas = torch.from_numpy(np.append(ratios[rows], ratios[0] if end != CLEAN else 0.0)).float()
        self.timesteps = torch.from_numpy(told[rows]).to(
            device=device, dtype=torch.float32 if self._flow else self._timesteps_dtype
        )
        self._told = self.timesteps.tolist()
        self.num_inference_steps = len(set(rows.tolist()))
        if "init_noise_sigma" in self.__dict__:
            self.__dict__["init_noise_sigma"] = math.hypot(*self._levels[0])
        self._reset()

    def _rows(self, steps: int) -> Timesteps:
        return timesteps(self.noise_schedule, steps, self._spacing(), self._option("steps_offset") or 0)

    def _checked(self, given: Any) -> Timesteps:
        rows, last = np.asarray(given).astype(np.int64), len(self.noise_schedule) - 1
        if rows.ndim != 1 or not len(rows) or (np.diff(rows) >= 0).any() or rows[0] > last or rows[-1] < 0:
            raise ValueError(
                f"timesteps must be whole numbers that fall from at most {last} to at least 0, got {given}"
            )
        return rows

    def _order(self, rows: Timesteps) -> Timesteps:
        """The timesteps in the order in which the network is asked."""
        return rows

    def _reset(self) -> None:
        self._step_index: int | None = None
        self._begin_index: int | None = None

    def _takes(self, timestep: Any) -> bool:
        return self.exact

    def _advance(self, timestep: Any) -> int:
        """The position of this step in the list, which is then passed."""
        if self._step_index is None:
            self._step_index = self._find(timestep) if self._begin_index is None else self._begin_index
        self._step_index += 1
        return self._step_index - 1

    def _find(self, timestep: Any) -> int:
        if not hasattr(self, "_told"):
            # as diffusers' classes without set_timesteps: every trained timestep
            self._plan(len(self.noise_schedule))
        value = float(timestep)
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
        at: int,
        x0: torch.Tensor,
        noise: torch.Tensor,
        eta: float = 0.0,
        generator: Any = None,
        fresh: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """DDIM's step (arXiv:2010.02502 eq. 12), which is Euler's; with eta 1 DDPM's and Euler
        ancestral's."""
        (alpha, sigma), (alpha_next, sigma_next) = self._levels[at], self._levels[at + 1]
        stays = alpha * sigma_next / (alpha_next * sigma)  # exp(-h)
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


def _result(x: torch.Tensor, x0: torch.Tensor, sample: torch.Tensor, return_dict: bool) -> Any:
    x, x0 = x.to(sample.dtype), x0.to(sample.dtype)
    return DDIMSchedulerOutput(prev_sample=x, pred_original_sample=x0) if return_dict else (x, x0)


class DDPMScheduler(_Exact, diffusers.DDPMScheduler):  # type: ignore[misc]
    """diffusers' DDPMScheduler. Where ``exact``, the variance is fixed_small's."""

    def _step(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        generator: Any = None,
        return_dict: bool = True,
    ) -> Any:
        if not self.config["variance_type"].startswith("fixed_small"):
            raise ValueError(
                f"variance_type {self.config['variance_type']!r} does not go with "
                f"{self.noise_schedule!r}: use 'fixed_small'"
            )
        at = self._find(timestep)
        alpha, sigma = self._levels[at]
        x0, _ = self._predicted(model_output, sample, (alpha, sigma))
        x = self._first_order(at, x0, (sample.float() - alpha * x0) / sigma, 1.0, generator)
        return _result(x, x0, sample, return_dict)


class DDIMScheduler(_Exact, diffusers.DDIMScheduler):  # type: ignore[misc]
    """diffusers' DDIMScheduler, except that a step goes to the next timestep of the list. diffusers goes to
    t - T // steps, which is another one unless the spacing is leading or the number of steps divides T. Where
    ``exact``, the last step ends at the clean image whatever set_alpha_to_one says."""

    def _takes(self, timestep: Any) -> bool:
        if self.exact:
            return True
        told = self._listed()
        if int(timestep) not in told:
            return False
        at = told.index(int(timestep))
        theirs = int(timestep) - self.config["num_train_timesteps"] // self.num_inference_steps
        return at + 1 < len(told) and max(theirs, -1) != told[at + 1]

    def _listed(self) -> list[int]:
        """The timesteps, read from the device once."""
        read = self.__dict__.get("_list")
        if read is None or read[0] is not self.timesteps:
            read = self._list = (self.timesteps, self.timesteps.tolist())
        return read[1]

    def _step(
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
        if not self.exact:
            self._told = self._listed()
            alpha_table, sigma_table, _ = self.noise_schedule.levels()
            self._levels = [(float(alpha_table[t]), float(sigma_table[t])) for t in self._told] + [CLEAN]
        at = self._find(timestep)
        alpha, sigma = self._levels[at]
        x0, noise = self._predicted(model_output, sample, (alpha, sigma))
        if use_clipped_model_output:
            noise = (sample.float() - alpha * x0) / sigma
        return _result(
            self._first_order(at, x0, noise, eta, generator, variance_noise), x0, sample, return_dict
        )


class _SigmaSpace(_Exact):
    """Of the classes whose samples diffusers keeps divided by alpha."""

    _timesteps_dtype = torch.float32

    @property
    def init_noise_sigma(self) -> Any:
        """Standard deviation of the initial noise."""
        if not self.exact:
            return super().init_noise_sigma  # type: ignore[misc]
        return torch.tensor(math.hypot(*self._levels[0]) if hasattr(self, "_levels") else 1.0)


class EulerDiscreteScheduler(_SigmaSpace, diffusers.EulerDiscreteScheduler):  # type: ignore[misc]
    """diffusers' EulerDiscreteScheduler. Where ``exact``, without churn."""

    def _step(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        s_churn: float = 0.0,
        generator: Any = None,
        return_dict: bool = True,
        **churn: Any,
    ) -> Any:
        if s_churn:
            raise ValueError(
                f"s_churn {s_churn:g} does not go with {self.noise_schedule!r}: use euler_a "
                "for noise at every step"
            )
        at = self._advance(timestep)
        x0, noise = self._predicted(model_output, sample, self._levels[at])
        return _result(self._first_order(at, x0, noise), x0, sample, return_dict)


class EulerAncestralDiscreteScheduler(_SigmaSpace, diffusers.EulerAncestralDiscreteScheduler):  # type: ignore[misc]
    """diffusers' EulerAncestralDiscreteScheduler."""

    def _step(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        generator: Any = None,
        return_dict: bool = True,
    ) -> Any:
        at = self._advance(timestep)
        x0, noise = self._predicted(model_output, sample, self._levels[at])
        return _result(self._first_order(at, x0, noise, 1.0, generator), x0, sample, return_dict)


class HeunDiscreteScheduler(_SigmaSpace, diffusers.HeunDiscreteScheduler):  # type: ignore[misc]
    """diffusers' HeunDiscreteScheduler. Where ``exact``, the second evaluation corrects the predicted image
    as linear in log SNR (the exponential form, arXiv:2211.01095 eq. 10) instead of the slope in sigma, which
    explodes where sigmas lie far apart."""

    def _order(self, rows: Timesteps) -> Timesteps:
        # each is first the end of a step, then the beginning of the next
        return np.concatenate((rows[:1], np.repeat(rows[1:], 2)))

    def _reset(self) -> None:
        super()._reset()
        # predicted image and sample, between the two evaluations
        self._first: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def state_in_first_order(self) -> bool:
        """Whether the next step is the first of the two."""
        return self._first is None if self.exact else bool(super().state_in_first_order)

    def _step(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        return_dict: bool = True,
        generator: Any = None,
    ) -> Any:
        at = self._advance(timestep)
        x0, noise = self._predicted(model_output, sample, self._levels[at])
        if self._first is None:
            if at + 1 < len(self._told):
                self._first = x0, sample.float()
            return _result(self._first_order(at, x0, noise), x0, sample, return_dict)
        (before, x), self._first = self._first, None
        (alpha, sigma), (alpha_next, sigma_next) = self._levels[at - 1], self._levels[at]
        stays = alpha * sigma_next / (alpha_next * sigma)  # exp(-h)
        second = 1 - (1 - stays) / -math.log(stays) if stays > 0 else 1.0
        x = sigma_next / sigma * x + alpha_next * ((1 - stays) * before + second * (x0 - before))
        return _result(x, x0, sample, return_dict)


class _Multistep(_Exact):
    """Of the solvers that diffusers writes in alpha and sigma already: ours are the timesteps, float32, and
    the step from SNR 0."""

    def _reset(self) -> None:
        super()._reset()
        self.model_outputs = [None] * self.config["solver_order"]
        self.lower_order_nums = 0

    def _sigma_to_alpha_sigma_t(self, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.exact:
            levels: tuple[torch.Tensor, torch.Tensor] = super()._sigma_to_alpha_sigma_t(sigma)  # type: ignore[misc]
            return levels
        # right at 0 and infinity
        return (1 - sigma, sigma) if self._flow else ((1 + sigma**2) ** -0.5, (1 + sigma**-2) ** -0.5)

    def _step(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        return_dict: bool = True,
        **options: Any,
    ) -> Any:
        at = self._step_index if self._step_index is not None else self._begin_index
        at = self._find(timestep) if at is None else at
        if self._levels[at][0] == 0:
            self._check_form()
        x = self._stock.step(
            self, model_output.float(), timestep, sample.float(), return_dict=False, **options
        )[0].to(sample.dtype)
        if self._levels[at][0] == 0:
            self.lower_order_nums = 0  # nothing can be extrapolated from infinitely far away
        return diffusers.schedulers.scheduling_utils.SchedulerOutput(prev_sample=x) if return_dict else (x,)

    def _check_form(self) -> None:
        """Raise ValueError for a form of the solver that divides by the signal."""


class DPMSolverMultistepScheduler(_Multistep, diffusers.DPMSolverMultistepScheduler):  # type: ignore[misc]
    """diffusers' DPMSolverMultistepScheduler: DPM++ 2M and, with algorithm_type sde-dpmsolver++, DPM++ 2M
    SDE."""

    def _check_form(self) -> None:
        if not self.config["algorithm_type"].endswith("++"):
            raise ValueError(
                f"algorithm_type {self.config['algorithm_type']!r} divides by the signal, 0 at "
                "SNR 0: use dpmsolver++"
            )


class UniPCMultistepScheduler(_Multistep, diffusers.UniPCMultistepScheduler):  # type: ignore[misc]
    """diffusers' UniPCMultistepScheduler."""

    def _reset(self) -> None:
        super()._reset()
        self.timestep_list = [None] * self.config["solver_order"]
        self.last_sample = None

    def _check_form(self) -> None:
        if self.config["solver_type"] != "bh2" or not self.config["predict_x0"]:
            raise ValueError(
                "UniPC starts from SNR 0 only with solver_type 'bh2' and predict_x0: the other "
                "forms divide by 0 there"
            )


# name -> class, its own settings
SAMPLERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddpm": (DDPMScheduler, {"clip_sample": False}),
    "ddim": (DDIMScheduler, {"clip_sample": False}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler_a": (EulerAncestralDiscreteScheduler, {}),
    "dpmpp_2m": (DPMSolverMultistepScheduler, {}),
    "dpmpp_2m_sde": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": (UniPCMultistepScheduler, {}),
    "heun": (HeunDiscreteScheduler, {}),
}
CLASSES = {cls.__name__: cls for cls, _ in SAMPLERS.values()}


def scheduler(
    schedule: NoiseSchedule,
    name: str,
    prediction_type: str = "epsilon",
    timestep_spacing: str = "log_sigma",
    **options: Any,
) -> Any:
    """A scheduler for diffusers' pipelines that samples exactly ``schedule``.

    ``name`` is one of ddpm, ddim, euler, euler_a, dpmpp_2m, dpmpp_2m_sde, unipc, heun. ``timestep_spacing``
    is log_sigma or one of diffusers' (trailing, linspace, leading); ``options`` are more settings of
    diffusers' class (``use_karras_sigmas=True``, ``solver_order=3``). Raises ValueError for an unknown name,
    setting or prediction type, and for epsilon at SNR 0.
    """
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}: expected one of {', '.join(SAMPLERS)}")
    cls, settings = SAMPLERS[name]
    known = inspect.signature(cls._stock.__init__).parameters
    for option in options:
        if option not in known:
            raise ValueError(
                f"{cls.__name__} has no setting {option!r}: expected some of {', '.join(list(known)[1:])}"
            )
    return _made(cls, settings | options, schedule, prediction_type, timestep_spacing)


def fix_scheduler(
    fixed: Any,
    schedule: NoiseSchedule | None = None,
    prediction_type: str | None = None,
    timestep_spacing: str = "log_sigma",
    **options: Any,
) -> Any:
    """``fixed``, a scheduler of diffusers or a pipeline that has one, made to sample its own schedule
    exactly.

    A pipeline gets the new scheduler and is returned; a scheduler stays as it is, and a new one of the same
    name and settings is returned. ``schedule`` and ``prediction_type`` are for a config that does not say
    what was trained: a model trained with v-prediction and zero terminal SNR that was loaded as epsilon.
    ``options`` are more settings of the class. Raises ValueError for a class without a drop-in, and as
    :func:`scheduler`.
    """
    theirs = getattr(fixed, "scheduler", fixed)
    name = type(theirs).__name__
    if name not in CLASSES:
        raise ValueError(
            f"there is no drop-in for {name}: take another, for example pipe.scheduler = "
            "schedule.scheduler('euler', ...)"
        )
    trained = NoiseSchedule.from_config(theirs.config) if schedule is None else schedule
    settings = {key: value for key, value in theirs.config.items() if key != "_use_default_values"} | options
    ours = _made(
        CLASSES[name], settings, trained, prediction_type or settings["prediction_type"], timestep_spacing
    )
    if theirs is fixed:
        return ours
    fixed.scheduler = ours
    return fixed


def _made(
    cls: Any, settings: Mapping[str, Any], schedule: NoiseSchedule, prediction_type: str, spacing: str
) -> Any:
    if prediction.check_prediction_type(prediction_type) == "epsilon" and schedule.zero_terminal:
        raise ValueError(EPSILON)
    made = cls.from_config(
        config_for(cls._stock, schedule, prediction_type, settings), timestep_spacing=spacing
    )
    if made.exact:
        made._rows(1)  # refuse now what set_timesteps would
    return made


def config_for(
    cls: Any, schedule: NoiseSchedule, prediction_type: str, base: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """``base`` with the schedule, for diffusers' class ``cls``, which follows it as far as it can, or ours of
    that name."""
    knows_rescale = "rescale_betas_zero_snr" in inspect.signature(cls.__init__).parameters
    return scheduler_config(schedule, prediction_type, base, knows_rescale, cls.__name__ in FOLLOW_INFINITY)
