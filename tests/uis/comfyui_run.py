"""Runs inside ComfyUI's own Python, in its checkout: loads stamped files with its real nodes and prints what
it made of them, as JSON.

comfyui_run.py CHECKOUT FOLDER: the stamped files and what to do with them are in FOLDER/cases.json
(test_comfyui.py wrote it), and ``comfyui_run.py CHECKOUT FOLDER keys`` writes FOLDER/keys.json, the names and
shapes of a whole SDXL checkpoint, from ComfyUI's own model definitions. Weights stay on torch's meta device:
a full-size checkpoint costs no memory; everything else is ComfyUI's.
"""

import asyncio
import contextlib
import inspect
import json
import sys
from pathlib import Path

checkout, folder = Path(sys.argv[1]), Path(sys.argv[2])
sys.path.insert(0, str(checkout))
sys.argv = sys.argv[:1]

from comfy.cli_args import args  # noqa: E402

args.cpu = True

import comfy.k_diffusion.sampling  # noqa: E402
import comfy.model_base  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import folder_paths  # noqa: E402
import nodes  # noqa: E402
import torch  # noqa: E402
from comfy_extras import nodes_model_advanced, nodes_model_merging  # noqa: E402
from known_network import Network, noise, steps  # noqa: E402

comfy.model_management.unet_inital_load_device = lambda *args: torch.device("meta")
comfy.model_base.BaseModel.load_model_weights = lambda self, *args, **kwargs: self
comfy.model_management.load_models_gpu = lambda *args, **kwargs: None
for kind in ("checkpoints", "diffusion_models", "loras"):
    folder_paths.add_model_folder_path(kind, str(folder))


def keys():
    """Every tensor of a saved checkpoint: U-Net, text encoders, VAE."""
    import comfy.sdxl_clip
    import comfy.supported_models

    config = comfy.supported_models.SDXL({**comfy.supported_models.SDXL.unet_config, **UNET_CONFIG})
    config.set_inference_dtype(torch.float16, None)
    model = comfy.model_base.SDXL(config, device=torch.device("meta"))
    clip = comfy.sdxl_clip.SDXLClipModel(device="meta", dtype=torch.float16).state_dict()
    with torch.device("meta"):
        vae = comfy.sd.AutoencoderKL(ddconfig=VAE_CONFIG, embed_dim=4).state_dict()
    parts = [clip, vae]
    if "unet_state_dict" in inspect.signature(model.state_dict_for_saving).parameters:  # since 2026
        parts.insert(0, model.diffusion_model.state_dict())
    state = model.state_dict_for_saving(*parts)
    (folder / "keys.json").write_text(
        json.dumps({name: list(tensor.shape) for name, tensor in state.items()})
    )


UNET_CONFIG = {
    "in_channels": 4,
    "out_channels": 4,
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "num_classes": "sequential",
    "num_head_channels": 64,
    "use_spatial_transformer": True,
    "transformer_depth_middle": 10,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "use_checkpoint": False,
    "image_size": 32,
    "use_temporal_attention": False,
    "legacy": False,
}
VAE_CONFIG = {"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128}
VAE_CONFIG |= {"ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0}


def describe(model):
    """What sampling would use."""
    sampling = model.get_model_object("model_sampling")
    sigmas = sampling.sigmas.double()
    steps = comfy.samplers.calculate_sigmas(sampling, "normal", 20)
    return {
        "classes": [cls.__name__ for cls in type(sampling).__mro__],
        "sigmas": sigmas.tolist(),
        "first_step": float(steps[0]),
        "first_timestep": float(sampling.timestep(steps[:1])[0]),
        "middle_timestep": float(sampling.timestep(sigmas[499:500].float())[0]),
        "percent_0.5": float(sampling.percent_to_sigma(0.5)),
        "zsnr": bool(getattr(sampling, "zsnr", False)),
        "model_type": model.model.model_type.name,
        "patcher": type(model).__name__,
        "sampled": sample(model.model, sampling),
    }


def sample(base, sampling):
    """8 steps of ComfyUI's Euler from noise, by its own call of the network, which is a known one."""
    kept = base.diffusion_model, base.model_sampling, base.manual_cast_dtype, base.current_patcher
    base.diffusion_model, base.model_sampling = Network(), sampling
    base.manual_cast_dtype = base.current_patcher = None
    sigmas = torch.cat([sampling.sigmas[steps(len(sampling.sigmas))], torch.zeros(1)])
    x = sampling.noise_scaling(sigmas[:1], noise(), torch.zeros_like(noise()))
    try:
        with torch.inference_mode():
            x = comfy.k_diffusion.sampling.sample_euler(base.apply_model, x, sigmas, disable=True)
    finally:
        base.diffusion_model, base.model_sampling, base.manual_cast_dtype, base.current_patcher = kept
    return x.flatten().tolist()


def load(case):
    """By the node that a workflow has."""
    if case["loader"] == "nothing":
        path = folder_paths.get_full_path_or_raise("checkpoints", case["file"])
        return comfy.sd.load_checkpoint_guess_config(path, output_model=False)[0]
    if case["loader"] == "unet":
        return nodes.UNETLoader().load_unet(case["file"], "default")[0]
    return nodes.CheckpointLoaderSimple().load_checkpoint(case["file"])[0]


def without_others(original):
    """comfy.sd.load_state_dict_guess_config, which leaves out text encoders and VAE: they would really be
    loaded."""

    def guess(*args, **kwargs):
        call = inspect.signature(original).bind(*args, **kwargs)
        call.arguments.update(output_vae=False, output_clip=False)
        return original(*call.args, **call.kwargs)

    return guess


comfy.sd.load_state_dict_guess_config = without_others(comfy.sd.load_state_dict_guess_config)


def after(model, then):
    """What a workflow does after loading."""
    if then == "discrete":
        return nodes_model_advanced.ModelSamplingDiscrete().patch(model, "v_prediction", False)[0]
    if then == "sd3":
        return nodes_model_advanced.ModelSamplingSD3().patch(model, 5.0)[0]
    if then == "lora":
        return nodes.LoraLoaderModelOnly().load_lora_model_only(model, "lora.safetensors", 1.0)[0]
    if then in ("reload", "dynamic") and not hasattr(model, "cached_patcher_init"):
        return None  # of 2025: it loads only once
    if then == "reload":  # as for a clone without dynamic VRAM, or for another GPU
        make, arguments, *place = model.cached_patcher_init
        made = make(*arguments, disable_dynamic=True)
        return made[place[0]] if place else made
    if then == "dynamic":
        assert model.is_dynamic()
        return model.clone(disable_dynamic=True)
    if then.startswith("from file "):
        return nodes.NODE_CLASS_MAPPINGS["SDXLFixesScheduleFromFile"]().patch(
            model, then.removeprefix("from file ")
        )[0]
    return model


def save(model):
    """Save Checkpoint, with the weights left out of the file that it writes."""
    written = {}

    def save_torch_file(state, path, metadata=None):
        small = {
            name: torch.zeros(0) if tensor.is_meta else tensor
            for name, tensor in state.items()
            if not tensor.is_meta
        }
        written.update(names=sorted(small), metadata=metadata)

    original, comfy.utils.save_torch_file = comfy.utils.save_torch_file, save_torch_file
    try:
        nodes_model_merging.save_checkpoint(model, filename_prefix="sdxl-fixes", output_dir=str(folder))
    finally:
        comfy.utils.save_torch_file = original
    return written


@contextlib.contextmanager
def dynamic_vram():
    """As on a GPU with comfy-aimdo, whose buffers are stood in for: nothing is moved there."""
    if not hasattr(comfy.model_patcher, "ModelPatcherDynamic"):  # of 2025
        yield
        return
    import comfy_aimdo.host_buffer

    comfy_aimdo.host_buffer.HostBuffer = lambda *args: None
    kept = comfy.model_management.get_torch_device, comfy.model_patcher.CoreModelPatcher
    comfy.model_management.get_torch_device = lambda: torch.device("meta")
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    try:
        yield
    finally:
        comfy.model_management.get_torch_device, comfy.model_patcher.CoreModelPatcher = kept


def main():
    if (folder / "cases.json").exists():
        cases = json.loads((folder / "cases.json").read_text())
    else:
        return keys()
    results = []
    # sorted: all cases without the node come first, because the node stays installed
    for case in sorted(cases, key=lambda case: case["node"]):
        if case["node"] and "SDXLFixesScheduleFromFile" not in nodes.NODE_CLASS_MAPPINGS:
            loaded = nodes.load_custom_node(str(folder / "custom_nodes" / "sdxl_fixes_schedule"))
            assert asyncio.run(loaded) if asyncio.iscoroutine(loaded) else loaded, (
                "ComfyUI did not load the node"
            )
        with dynamic_vram() if case.get("then") == "dynamic" else contextlib.nullcontext():
            model = after(load(case), case.get("then", ""))
        if model is not None:
            case |= describe(model) | ({"saved": save(model)} if case.get("save") else {})
        results.append(case)
    print("RESULTS" + json.dumps(results))


main()
