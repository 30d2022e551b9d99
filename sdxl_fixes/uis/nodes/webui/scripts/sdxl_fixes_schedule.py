"""sdxl-fixes for Forge, reForge and AUTOMATIC1111: a checkpoint that carries a schedule record is sampled by
it.

It acts when a checkpoint is loaded and needs no setting. Files without a record load exactly as without this
extension. To remove it: ``sdxl-fixes webui remove PATH``, or delete its folder under extensions/.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from modules import script_callbacks
from sdxl_fixes_schedule_file import Schedule, read_schedule

LOG = logging.getLogger("sdxl-fixes")


def follow(sd_model: Any) -> None:
    """Called by the UI with every checkpoint that it has loaded."""
    _put_back(sd_model)
    path = getattr(getattr(sd_model, "sd_checkpoint_info", None), "filename", None)
    try:
        schedule = read_schedule(path) if path else None
        if schedule is None:
            return
        model = getattr(getattr(getattr(sd_model, "forge_objects", None), "unet", None), "model", None)
        if hasattr(model, "predictor"):
            _forge(sd_model, model, schedule)
        elif hasattr(model, "model_sampling"):
            _reforge(sd_model, model, schedule)
        else:
            _a1111(sd_model, schedule, ("epsilon", "v_prediction"))
    except ValueError as error:
        LOG.warning("[sdxl-fixes] %s; the model is loaded as without it", error)
        return
    print(f"[sdxl-fixes] {path}: {schedule}")


def _forge(sd_model: Any, model: Any, schedule: Schedule) -> None:
    from backend.modules.k_prediction import Prediction, PredictionDiscreteFlow

    if schedule.prediction_type == "flow_prediction":
        predictor = PredictionDiscreteFlow(shift=schedule.shift, timesteps=len(schedule.sigmas))
        if not torch.allclose(predictor.sigmas.double(), torch.from_numpy(schedule.sigmas), rtol=1e-5):
            raise ValueError("flow over this table of noise levels is not known here")
    elif schedule.prediction_type in ("epsilon", "v_prediction"):
        predictor = Prediction(
            sigma_data=1.0, prediction_type=schedule.prediction_type, timesteps=len(schedule.sigmas)
        )
        predictor.set_sigmas(torch.from_numpy(schedule.sigmas))
    else:
        raise ValueError(f"{schedule.prediction_type} is not known here")
    model.predictor = predictor
    sd_model.model_config.ztsnr = False  # the table ends where it must; Forge would rescale it once more


def _reforge(sd_model: Any, model: Any, schedule: Schedule) -> None:
    from ldm_patched.modules import model_sampling

    kinds = {"epsilon": model_sampling.EPS, "v_prediction": model_sampling.V_PREDICTION}
    _a1111(sd_model, schedule, tuple(kinds))

    class ModelSamplingFromFile(model_sampling.ModelSamplingDiscrete, kinds[schedule.prediction_type]):  # type: ignore[valid-type,misc]
        pass

    sampling = ModelSamplingFromFile(model.model_config)
    sampling.set_sigmas(torch.from_numpy(schedule.sigmas))
    model.model_sampling = sampling


def _a1111(sd_model: Any, schedule: Schedule, known: tuple[str, ...]) -> None:
    """Also reForge's samplers read these."""
    if schedule.prediction_type not in known:
        by_hand = (
            f": switch on Advanced Model Sampling, SD3, shift {schedule.shift:g}"
            if "flow" in schedule.prediction_type
            else ""
        )
        raise ValueError(f"{schedule.prediction_type} cannot be sampled automatically here{by_hand}")
    table = torch.from_numpy(1 / (1 + schedule.sigmas**2)).float().to(sd_model.alphas_cumprod.device)
    sd_model.sdxl_fixes_stock = (sd_model.parameterization, sd_model.alphas_cumprod)
    sd_model.parameterization = "v" if schedule.prediction_type == "v_prediction" else "eps"
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
