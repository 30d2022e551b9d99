"""Runs the extension's own file against the real classes of a web UI's checkout, and prints the outcome as
JSON.

webui_run.py forge|neo|reforge|a1111 CHECKOUT EXTENSION FILE...: only modules.script_callbacks (which needs
gradio) is stood in for. Models are loaded in inference mode, as Forge and Neo do.
"""

import importlib.util
import json
import logging
import sys
import types
from pathlib import Path

ui, checkout, extension, *files = sys.argv[1:]
sys.path[:0] = [extension, checkout]
sys.argv = sys.argv[:1]
callbacks, said = [], []
logging.getLogger("sdxl-fixes").addHandler(logging.Handler())
logging.getLogger("sdxl-fixes").handlers[0].emit = lambda record: said.append(record.getMessage())
modules = types.ModuleType("modules")
modules.script_callbacks = types.SimpleNamespace(on_model_loaded=callbacks.append)
sys.modules["modules"] = modules

import torch  # noqa: E402
from known_network import Network, noise, steps  # noqa: E402

spec = importlib.util.spec_from_file_location(
    "extension", Path(extension) / "scripts" / "sdxl_fixes_schedule.py"
)
spec.loader.exec_module(importlib.util.module_from_spec(spec))
(follow,) = callbacks


def forge_model(model):
    """Forge's and Neo's own KModel; Neo takes a file whose path says rectified for flow."""
    sys.path += [
        str(Path(checkout, *parts)) for parts in (("modules_forge", "packages"), ("packages_3rdparty",))
    ]
    from backend import args

    args.args.cpu = args.args.always_cpu = True
    if ui == "neo":
        args.dynamic_args.reset()
        args.dynamic_args.ops = ""
    from backend.modules import k_model, k_prediction

    config = types.SimpleNamespace(prediction_type="epsilon", beta_schedule="scaled_linear")
    config.beta_start, config.beta_end, config.num_train_timesteps = 0.00085, 0.012, 1000
    scheduler = types.SimpleNamespace(config=config)
    kmodel = k_model.KModel(
        model=Network(), diffusers_scheduler=scheduler, k_predictor=None, config=model.model_config
    )
    if ui == "neo" and model.use_shift:
        kmodel.predictor = k_prediction.PredictionDiscreteFlow(model.model_config)
    return kmodel


def reforge_model(model):
    from ldm_patched.modules import model_sampling

    class Stock(model_sampling.ModelSamplingDiscrete, model_sampling.EPS):
        pass

    sampling = Stock(model.model_config)
    return types.SimpleNamespace(model_config=model.model_config, model_sampling=sampling)


def stock(file):
    """The model as the UI hands it over, with SDXL's own table."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    model = types.SimpleNamespace(
        sd_checkpoint_info=types.SimpleNamespace(filename=file),
        alphas_cumprod=torch.cumprod(1 - betas, 0).float(),
        parameterization="eps",
        ztsnr=True,
        use_shift="rectified" in Path(file).name,
        model_config=types.SimpleNamespace(ztsnr=True, sampling_settings={}),
    )
    inner = None
    if ui != "a1111":
        inner = reforge_model(model) if ui == "reforge" else forge_model(model)
        model.forge_objects = types.SimpleNamespace(unet=types.SimpleNamespace(model=inner))
    return model, inner


def describe(model, inner):
    table = getattr(inner, "predictor", getattr(inner, "model_sampling", None))
    found = {
        "alphas_cumprod": model.alphas_cumprod.double().tolist(),
        "parameterization": model.parameterization,
        "ztsnr": model.ztsnr,
        "config_ztsnr": model.model_config.ztsnr,
        "use_shift": model.use_shift,
    }
    if table is not None:
        ends = [float(table.timestep(table.sigmas[i : i + 1])[0]) for i in (0, 499, len(table.sigmas) - 1)]
        found |= {"sigmas": table.sigmas.double().tolist(), "timesteps": ends}
        found |= {"percent_0.5": float(table.percent_to_sigma(0.5)), "sampled": sample(inner, table)}
    return found


def sample(inner, table):
    """8 steps of Euler from noise, by the UI's own sampler and its own call of the network where it has
    them."""
    sigmas = torch.cat([table.sigmas[steps(len(table.sigmas))], torch.zeros(1)])
    x = table.noise_scaling(sigmas[:1], noise(), torch.zeros_like(noise()))
    if hasattr(inner, "apply_model"):
        from k_diffusion import sampling

        def denoise(x, sigma):
            return inner.apply_model(x, sigma, c_crossattn=torch.zeros(1))

        return sampling.sample_euler(denoise, x, sigmas, disable=True).flatten().tolist()
    for sigma, after in zip(sigmas[:-1].split(1), sigmas[1:].split(1), strict=True):
        output = Network()(table.calculate_input(sigma, x), table.timestep(sigma).float())
        x = x + (x - table.calculate_denoised(sigma, output, x)) / sigma * (after - sigma)
    return x.flatten().tolist()


results = []
for file in files:
    said.clear()
    with torch.inference_mode():
        model, inner = stock(file)
        untouched = describe(model, inner)
        follow(model)
        results.append(describe(model, inner) | {"said": list(said), "untouched": untouched})
    if ui == "a1111":  # the next checkpoint's weights go into the same model
        model.sd_checkpoint_info.filename = "nothing.safetensors"
        follow(model)
        results[-1]["after"] = {
            "alphas_cumprod": model.alphas_cumprod.double().tolist(),
            "parameterization": model.parameterization,
        }
print("RESULTS" + json.dumps(results))
