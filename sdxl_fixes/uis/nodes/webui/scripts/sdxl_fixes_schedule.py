"""sdxl-fixes for Forge, Forge Neo, reForge and AUTOMATIC1111: a checkpoint that carries a schedule record is
sampled by it.

It acts when a checkpoint is loaded and needs no setting. Files without a record load exactly as without this
extension; where a record cannot be followed, one sentence in the console says so, and the UI does as without
it. To remove it: ``sdxl-fixes webui remove PATH``, or delete its folder under extensions/.
"""

from __future__ import annotations

import copy
import inspect
import logging
import sys
from types import SimpleNamespace
from typing import Any

import torch
from modules import script_callbacks
from sdxl_fixes_schedule_file import RecordError, Schedule, check, printable, read_schedule, why

LOG = logging.getLogger("sdxl-fixes")
TIMESTEPS = 1000  # which these UIs' samplers count on


def follow(sd_model: Any) -> None:
    """Called by the UI with every checkpoint that it has loaded. Changes all or nothing, and raises nothing:
    what a UI's newer version makes of its own objects cannot be known here."""
    path = getattr(getattr(sd_model, "sd_checkpoint_info", None), "filename", None)
    try:
        _put_back(sd_model)
        schedule = read_schedule(path) if path else None
        if schedule is None:
            return
        if len(schedule.sigmas) != TIMESTEPS:
            raise RecordError(f"{len(schedule.sigmas)} timesteps are not known here, only {TIMESTEPS}")
        model = getattr(getattr(getattr(sd_model, "forge_objects", None), "unet", None), "model", None)
        if hasattr(model, "predictor"):
            _forge(sd_model, model, schedule)
        elif hasattr(model, "model_sampling"):
            _reforge(sd_model, model, schedule)
        else:
            _a1111(sd_model, schedule)
    except Exception as error:
        sentence = f"{printable(str(path))}: {why(error)}; the model is loaded as without it"
        LOG.warning("[sdxl-fixes] %s", sentence)
        return
    print(f"[sdxl-fixes] {printable(path)}: {schedule}", file=sys.stderr)


def _forge(sd_model: Any, model: Any, schedule: Schedule) -> None:
    """Forge and Forge Neo: ``model.predictor`` holds the table and makes images of the network's output."""
    if schedule.prediction_type == "sample":
        raise RecordError("prediction_type sample is not known here")
    old = model.predictor
    predictor = _flow(schedule) if schedule.flow else _discrete(old, schedule)
    check(predictor.cpu(), schedule)
    model.predictor = predictor.to(old.sigmas.device)
    for holder, name in ((getattr(sd_model, "model_config", None), "ztsnr"), (sd_model, "use_shift")):
        if hasattr(holder, name):  # table and shift are the file's: the UI would change them once more
            setattr(holder, name, False)


def _discrete(old: Any, schedule: Schedule) -> Any:
    """The UI's own predictor with another table; a new one if the UI has taken the model for flow."""
    if hasattr(old, "set_sigmas"):
        predictor = copy.deepcopy(old)
    else:
        from backend.modules.k_prediction import Prediction

        predictor = _made(
            Prediction,
            sigma_data=1.0,
            prediction_type=schedule.prediction_type,
            beta_schedule="linear",
            linear_start=0.00085,
            linear_end=0.012,
            timesteps=TIMESTEPS,
        )
    table = torch.from_numpy(schedule.sigmas)
    predictor.prediction_type = schedule.prediction_type
    predictor.set_sigmas(table)
    predictor.alphas_cumprod = (1 / (1 + table**2)).float()
    return predictor


def _flow(schedule: Schedule) -> Any:
    from backend.modules.k_prediction import PredictionDiscreteFlow

    settings = {"shift": schedule.shift, "multiplier": 1000}
    predictor = _made(
        PredictionDiscreteFlow,
        model_config=SimpleNamespace(sampling_settings=settings),
        shift=schedule.shift,
        timesteps=TIMESTEPS,
    )
    predictor.sigmas = torch.from_numpy(schedule.sigmas).float()
    return predictor


def _made(cls: Any, **offered: Any) -> Any:
    """An instance, given as much of what is offered as this version of the class asks for."""
    asked = inspect.signature(cls).parameters
    return cls(**{name: value for name, value in offered.items() if name in asked})


def _reforge(sd_model: Any, model: Any, schedule: Schedule) -> None:
    """reForge: ``model.model_sampling`` as in ComfyUI, and A1111's samplers."""
    from ldm_patched.modules import model_sampling

    table = _alphas_cumprod(sd_model, schedule)
    kind = model_sampling.V_PREDICTION if _is_v(schedule) else model_sampling.EPS

    class ModelSamplingFromFile(model_sampling.ModelSamplingDiscrete, kind):  # type: ignore[valid-type,misc]
        pass

    sampling = ModelSamplingFromFile(model.model_config)
    sampling.set_sigmas(torch.from_numpy(schedule.sigmas))
    check(sampling, schedule)
    _set(sd_model, schedule, table)
    model.model_sampling = sampling


def _a1111(sd_model: Any, schedule: Schedule) -> None:
    _set(sd_model, schedule, _alphas_cumprod(sd_model, schedule))


def _alphas_cumprod(sd_model: Any, schedule: Schedule) -> Any:
    """The table in the form that A1111's samplers read, reForge's too."""
    if schedule.prediction_type not in ("epsilon", "v_prediction"):
        by_hand = f": in reForge switch on Advanced Model Sampling, SD3, shift {schedule.shift:g}"
        what = f"{schedule.prediction_type} cannot be sampled automatically here"
        raise RecordError(what + (by_hand if schedule.flow else ""))
    return torch.from_numpy(1 / (1 + schedule.sigmas**2)).float().to(sd_model.alphas_cumprod.device)


def _is_v(schedule: Schedule) -> bool:
    return bool(schedule.prediction_type == "v_prediction")


def _set(sd_model: Any, schedule: Schedule, table: Any) -> None:
    sd_model.sdxl_fixes_stock = (sd_model.parameterization, sd_model.alphas_cumprod)
    sd_model.parameterization = "v" if _is_v(schedule) else "eps"
    sd_model.alphas_cumprod = sd_model.alphas_cumprod_original = table
    sd_model.ztsnr = False  # the table ends where it must; the UI would rescale it once more


def _put_back(sd_model: Any) -> None:
    """A1111 loads another checkpoint's weights into the same model: what an earlier record changed must not
    stay."""
    stock = getattr(sd_model, "sdxl_fixes_stock", None)
    if stock is not None:
        sd_model.parameterization, sd_model.alphas_cumprod = stock
        sd_model.alphas_cumprod_original = stock[1]
        sd_model.sdxl_fixes_stock = None


script_callbacks.on_model_loaded(follow)
