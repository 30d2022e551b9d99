"""Runs the extension's own file against the real classes of a Forge or reForge checkout, and prints the
outcome as JSON.

webui_run.py forge|reforge CHECKOUT EXTENSION FILE...: only modules.script_callbacks (which needs gradio) is
stood in for.
"""

import importlib.util
import json
import sys
import types
from pathlib import Path

ui, checkout, extension, *files = sys.argv[1:]
sys.path[:0] = [extension, checkout]
sys.argv = sys.argv[:1]
callbacks = []
modules = types.ModuleType("modules")
modules.script_callbacks = types.SimpleNamespace(on_model_loaded=callbacks.append)
sys.modules["modules"] = modules

import torch  # noqa: E402

spec = importlib.util.spec_from_file_location(
    "extension", Path(extension) / "scripts" / "sdxl_fixes_schedule.py"
)
spec.loader.exec_module(importlib.util.module_from_spec(spec))
(follow,) = callbacks


def stock(file):
    """The model as the UI hands it over, with SDXL's own table."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    model = types.SimpleNamespace(
        sd_checkpoint_info=types.SimpleNamespace(filename=file),
        alphas_cumprod=torch.cumprod(1 - betas, 0).float(),
        parameterization="eps",
        ztsnr=True,
        model_config=types.SimpleNamespace(ztsnr=True, sampling_settings={}),
    )
    inner = types.SimpleNamespace(model_config=model.model_config)
    if ui == "forge":
        from backend.modules.k_prediction import Prediction

        inner.predictor = Prediction(
            sigma_data=1.0, prediction_type="epsilon", linear_start=0.00085, linear_end=0.012
        )
    elif ui == "reforge":
        from ldm_patched.modules import model_sampling

        class Stock(model_sampling.ModelSamplingDiscrete, model_sampling.EPS):
            pass

        inner.model_sampling = Stock(model.model_config)
    if ui != "a1111":
        model.forge_objects = types.SimpleNamespace(unet=types.SimpleNamespace(model=inner))
    return model, inner


def describe(model, inner):
    table = getattr(inner, "predictor", getattr(inner, "model_sampling", None))
    found = {
        "alphas_cumprod": model.alphas_cumprod.double().tolist(),
        "parameterization": model.parameterization,
        "ztsnr": model.ztsnr,
    }
    if table is not None:
        x, output, sigma = (
            torch.randn(1, 4, 2, 2).double(),
            torch.randn(1, 4, 2, 2).double(),
            table.sigmas[700:701],
        )
        found |= {
            "sigmas": table.sigmas.double().tolist(),
            "timesteps": [
                float(table.timestep(table.sigmas[i : i + 1])[0]) for i in (0, 499, len(table.sigmas) - 1)
            ],
            "x": x.flatten().tolist(),
            "output": output.flatten().tolist(),
            "denoised": table.calculate_denoised(sigma.double(), output, x).flatten().tolist(),
            "config_ztsnr": model.model_config.ztsnr,
        }
    return found


results = []
for file in files:
    model, inner = stock(file)
    follow(model)
    results.append(describe(model, inner))
    if ui == "a1111":  # the next checkpoint's weights go into the same model
        model.sd_checkpoint_info.filename = "nothing.safetensors"
        follow(model)
        results[-1]["after"] = {
            "alphas_cumprod": model.alphas_cumprod.double().tolist(),
            "parameterization": model.parameterization,
        }
print("RESULTS" + json.dumps(results))
