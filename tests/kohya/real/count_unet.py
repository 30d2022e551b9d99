"""count_unet.py: what SDXL's real U-Net and text encoders hold and compute for one 1024 x 1024 image in
bfloat16, as JSON.

On the meta device: no memory, no weights. Set SD_SCRIPTS.
"""

import json
import math
import sys

import checkouts
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

sys.path.insert(0, str(checkouts.first()))
import library.sdxl_original_unet as sdxl_original_unet

# what gradient checkpointing recomputes at once
BLOCKS = ("ResnetBlock2D", "BasicTransformerBlock", "Downsample2D", "Upsample2D")
INPUTS = {"x": (1, 4, 128, 128), "context": (1, 77, 2048), "y": (1, 2816)}


def storages(saved, own):
    return sum(size for key, size in saved.items() if key not in own)


def forward(unet, pack):
    with torch.device("meta"):
        inputs = {name: torch.randn(shape, dtype=torch.bfloat16) for name, shape in INPUTS.items()}
        timesteps = torch.zeros(1, dtype=torch.long)
    with (
        FlopCounterMode(display=False) as flops,
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        out = unet(inputs["x"], timesteps, inputs["context"], inputs["y"])
    return out, flops.get_total_flops()


def count():
    with torch.device("meta"):
        unet = sdxl_original_unet.SdxlUNet2DConditionModel().to(torch.bfloat16)
        small = CLIPTextConfig(
            projection_dim=768,
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
        )
        large = CLIPTextConfig(
            projection_dim=1280,
            hidden_size=1280,
            intermediate_size=5120,
            num_hidden_layers=32,
            num_attention_heads=20,
        )
        encoders = CLIPTextModel(small), CLIPTextModelWithProjection(large)
    unet.train()
    unet.set_use_sdpa(True)
    shapes = [tuple(p.shape) for p in unet.parameters()]
    own = {p.untyped_storage()._cdata for p in unet.parameters()}
    linears = [
        layer
        for part in unet.modules()
        if type(part).__name__ == "Transformer2DModel"
        for layer in part.modules()
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)
    ]
    found = {
        "unet": sum(map(math.prod, shapes)),
        "text_encoders": sum(p.numel() for encoder in encoders for p in encoder.parameters()),
        "lora_32": 32 * sum(sum(layer.weight.shape[:2]) for layer in linears),
        "adafactor": sum(
            math.prod(s) // s[-1] + math.prod(s) // s[-2] if len(s) > 1 else s[0] for s in shapes
        ),
    }
    kept, inside, stack = {}, {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        alive.append(storage)  # or its address may be used again
        for place in (kept, *(inside[name] for name in stack)):
            place[storage._cdata] = storage.nbytes()
        return tensor

    def enter(name):
        def hook(*_):
            inside[name] = {}
            stack.append(name)

        return hook

    alive = []
    blocks = [(name, part) for name, part in unet.named_modules() if type(part).__name__ in BLOCKS]
    hooks = [part.register_forward_pre_hook(enter(name)) for name, part in blocks]
    hooks += [part.register_forward_hook(lambda *_: stack.pop() and None) for _, part in blocks]
    _, found["forward"] = forward(unet, pack)
    found["whole"], found["recomputed"] = (
        storages(kept, own),
        max(storages(saved, own) for saved in inside.values()),
    )
    for hook in hooks:
        hook.remove()
    kept.clear()
    unet.enable_gradient_checkpointing()
    out, _ = forward(unet, pack)
    found["kept"] = storages(kept, own)
    with FlopCounterMode(display=False) as flops:
        out.sum().backward()
    found["backward"] = flops.get_total_flops()
    return found


if __name__ == "__main__":
    print(json.dumps(count()))
