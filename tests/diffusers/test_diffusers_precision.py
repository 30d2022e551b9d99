"""A LoRA in bfloat16: what diffusers makes of it, and where it is warned of."""

import argparse

import pytest
import torch

from sdxl_fixes.diffusers.run import rounded_lora

TEXT_TO_IMAGE = "train_text_to_image_lora_sdxl.py"


def test_an_adapter_of_a_bfloat16_unet_is_bfloat16():
    peft = pytest.importorskip("peft")
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
    )
    unet.requires_grad_(False)
    unet.to(dtype=torch.bfloat16)
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]))
    assert {p.dtype for p in unet.parameters() if p.requires_grad} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("script", "args", "lost"),
    [
        (TEXT_TO_IMAGE, dict(), "0.051"),
        ("train_dreambooth_lora_sdxl_advanced.py", dict(learning_rate=1e-5), "0.0051"),
        (TEXT_TO_IMAGE, dict(mixed_precision="fp16"), None),
        (TEXT_TO_IMAGE, dict(mixed_precision="no"), None),
        (TEXT_TO_IMAGE, dict(learning_rate=1.0), None),  # prodigy's
        ("train_text_to_image_sdxl.py", dict(), None),  # float32 weights
    ],
    ids=str,
)
def test_where_it_is_said(script, args, lost, monkeypatch):
    args = argparse.Namespace(**{"mixed_precision": "bf16", "learning_rate": 1e-4, **args})
    line = rounded_lora(args, script)
    assert (line is None) == (lost is None)
    assert line is None or f"lost in every weight above {lost}: with --mixed_precision fp16, or no" in line
    if args.mixed_precision == "bf16":  # of accelerate launch
        args.mixed_precision = None
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
        assert rounded_lora(args, script) == line
