"""The models of docs/loading.md, stamped: each case as a checkpoint, a LoRA and a diffusers folder."""

import json

from models import KINDS, model, write

from sdxl_fixes import NoiseSchedule
from sdxl_fixes.checkpoint import Sampling
from sdxl_fixes.model_files.stamp import stamp_file, write_scheduler_config

SDXL = NoiseSchedule.sdxl()
SAMPLINGS = {
    "eps 14.6": Sampling(SDXL, "epsilon"),
    "v": Sampling(SDXL, "v_prediction"),
    "v + ZTSNR": Sampling(SDXL.zero_terminal_snr(), "v_prediction"),
    "eps + ZTSNR": Sampling(SDXL.zero_terminal_snr(), "epsilon"),
    "eps 300": Sampling(SDXL.with_terminal_sigma(300), "epsilon"),
    "any betas": Sampling(SDXL.with_terminal_sigma(300, "tail"), "v_prediction"),
    "flow": Sampling(NoiseSchedule.flow(), "flow_prediction"),
}
# by which UIs know SDXL
CROSS = {"model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": [640, 2048]}
_MODULE = "lora_unet_input_blocks_8_1_transformer_blocks_5_attn1_to_k"
LORA = {
    f"{_MODULE}.lora_down.weight": [4, 1280],
    f"{_MODULE}.lora_up.weight": [1280, 4],
    f"{_MODULE}.alpha": [1],
}


def stamped_checkpoint(path, sampling):
    """Its path."""
    stamp_file(write(path, {**KINDS["checkpoint"], **CROSS}), sampling)
    return path


def stamped_lora(path, sampling):
    """Its path."""
    stamp_file(write(path, LORA), sampling)
    return path


def stamped_folder(folder, sampling):
    """A diffusers folder of U-Net and scheduler; returns it."""
    for part in ("unet", "scheduler"):
        (folder / part).mkdir(parents=True)
    stamp_file(model(folder / "unet" / "diffusion_pytorch_model.safetensors", "diffusers_unet"), sampling)
    unet = {"_class_name": "UNet2DConditionModel", "cross_attention_dim": 2048, "in_channels": 4}
    (folder / "unet" / "config.json").write_text(json.dumps(unet))
    config = folder / "scheduler" / "scheduler_config.json"
    assert write_scheduler_config(config, sampling) == "written"
    named = json.loads(config.read_text())["_class_name"]
    index = {"_class_name": "StableDiffusionXLPipeline", "scheduler": ["diffusers", named]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
