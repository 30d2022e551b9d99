"""Shrinks sd-scripts' hard-coded SDXL in memory, so that its real training scripts run on a small CPU
machine.

Only sizes change: module constants of library/sdxl_original_unet.py, the depths and the context width that
its classes hold as literals, the widths that control nets hold as literals, and the text encoders' and VAE's
sizes that the single-file loader holds as literals. Schedulers, losses, data sets and saving are upstream's
own. ``apply()`` must come before the script is executed.
"""

import os

import torch

SCALE = int(os.environ.get("TINY_SCALE", "1"))  # larger for timing
CHANNELS, CONTEXT = 32 * SCALE, 96 * SCALE
TEXT_ENCODERS = {
    "te1": dict(width=32 * SCALE, layers=12),
    "te2": dict(width=64 * SCALE, layers=2),
}  # te1's hidden_states[11] is read: 12 layers


def text_config(which):
    import tiny_assets

    return tiny_assets.text_config(**TEXT_ENCODERS[which], scale=SCALE)


class ControlNetLayers:
    """torch.nn as the control net sees it: convolutions of the tiny U-Net's widths, where the real one's are
    meant."""

    def __getattr__(self, name):
        return getattr(torch.nn, name)

    def Conv2d(self, *channels, **options):
        return torch.nn.Conv2d(*(n * CHANNELS // 320 if n % 320 == 0 else n for n in channels), **options)


def apply():
    import library.model_util as model_util
    import library.sdxl_model_util as sdxl_model_util
    import library.sdxl_original_control_net as control_net
    import library.sdxl_original_unet as unet

    unet.MODEL_CHANNELS, unet.TIME_EMBED_DIM = CHANNELS, 4 * CHANNELS
    unet.ADM_IN_CHANNELS = 6 * 256 + TEXT_ENCODERS["te2"]["width"]
    unet.CONTEXT_DIM = CONTEXT
    init = unet.Transformer2DModel.__init__

    def small(self, *args, **kwargs):
        init(self, *args, **{**kwargs, "cross_attention_dim": CONTEXT, "num_transformer_layers": 1})

    unet.Transformer2DModel.__init__ = small  # in place: LoRA finds blocks by class name
    control_net.nn = ControlNetLayers()
    sdxl_model_util.CLIPTextConfig = lambda **config: text_config(
        "te1" if config["hidden_size"] == 768 else "te2"
    )
    model_util.VAE_PARAMS_CH = 32
    sdxl_model_util.DIFFUSERS_SDXL_UNET_CONFIG.update(
        block_out_channels=[CHANNELS, 2 * CHANNELS, 4 * CHANNELS],
        attention_head_dim=[1, 1, 2],
        cross_attention_dim=CONTEXT,
        projection_class_embeddings_input_dim=unet.ADM_IN_CHANNELS,
        transformer_layers_per_block=[1, 1, 1],
    )
