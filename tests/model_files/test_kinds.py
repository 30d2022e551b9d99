"""What a file is, by files of the classes that save them: diffusers, peft, transformers, lycoris. Only the
names and shapes are written: the models stay on torch's meta device."""

import os
from pathlib import Path

import pytest
import torch
from models import KINDS, write

from sdxl_fixes.model_files.kinds import Contents
from sdxl_fixes.model_files.model_file import ModelFile

diffusers = pytest.importorskip("diffusers")
UNETS = {
    "SDXL": {},
    "SDXL inpainting (9 input channels)": {"in_channels": 9},
    "SDXL image editing (8 input channels)": {"in_channels": 8},
    "pruned SDXL (SSD-1B, Segmind-Vega, KOALA)": {"transformer_layers_per_block": (1, 2, 4)},
    "SDXL's refiner": {
        "cross_attention_dim": 1280,
        "projection_class_embeddings_input_dim": 2560,
        "block_out_channels": (32, 64, 64, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": 4,
    },
}
FOUR = {
    "addition_embed_type": None,
    "block_out_channels": (32, 64, 64, 64),
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    "transformer_layers_per_block": 1,
}
UNETS |= {"Stable Diffusion 1": {**FOUR, "cross_attention_dim": 768}}
UNETS |= {"Stable Diffusion 2": {**FOUR, "cross_attention_dim": 1024}}
CONFIG = {
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "layers_per_block": 1,
    "attention_head_dim": 8,
}


def unet(**changes):
    """SDXL's U-Net, narrow."""
    with torch.device("meta"):
        return diffusers.UNet2DConditionModel(**(CONFIG | changes))


def shapes(state, prefix=""):
    return {prefix + name: list(tensor.shape) for name, tensor in state.items()}


def saved(folder, state, **options):
    state = state.state_dict() if isinstance(state, torch.nn.Module) else state
    return ModelFile.read(write(folder / "file.safetensors", shapes(state), **options)).contents


@pytest.mark.parametrize("name", UNETS)
def test_unets_are_told_apart(name, tmp_path):
    sdxl = "SDXL" in name and "refiner" not in name
    assert saved(tmp_path, unet(**UNETS[name])) == Contents("diffusers_unet", name, sdxl)


def with_adapter(config, **options):
    peft = pytest.importorskip("peft")
    if not hasattr(peft, config):
        pytest.skip(f"this peft has no {config}")
    model = unet()
    made = peft.get_peft_model(model, getattr(peft, config)(target_modules=["to_k", "to_q"], **options))
    return peft.get_peft_model_state_dict(made)


PEFT = {
    "LoraConfig": {"r": 4},
    "LoHaConfig": {"r": 4},
    "LoKrConfig": {"r": 4},
    "OFTConfig": {"r": 0, "oft_block_size": 4},
    "IA3Config": {"feedforward_modules": []},
    "VeraConfig": {"r": 4, "save_projection": True},
    "HRAConfig": {"r": 4},
}


@pytest.mark.parametrize("config", PEFT)
def test_pefts_networks_are_networks(config, tmp_path):
    try:
        state = with_adapter(config, **PEFT[config])
    except NotImplementedError as error:
        pytest.skip(f"not on torch's meta device: {error}")
    assert saved(tmp_path, state) == Contents("lora", "SDXL", True)


def test_dora_and_the_names_of_diffusers_through_the_years(tmp_path):
    from diffusers.utils import convert_state_dict_to_diffusers

    state = with_adapter("LoraConfig", r=4, use_dora=True)
    assert saved(tmp_path, state) == Contents("lora", "SDXL", True)
    plain = {f"unet.{name.removeprefix('base_model.model.')}": tensor for name, tensor in state.items()}
    assert saved(tmp_path, plain) == Contents("lora", "SDXL", True)
    named = with_adapter("LoraConfig", r=4)
    named = {f"unet.{name.removeprefix('base_model.model.')}": tensor for name, tensor in named.items()}
    assert saved(tmp_path, convert_state_dict_to_diffusers(dict(named))) == Contents("lora", "SDXL", True)


def test_attention_processors_of_2023(tmp_path):
    """diffusers 0.11 to 0.24: unet.load_attn_procs; its own table knows the names."""
    from diffusers.utils.state_dict_utils import DIFFUSERS_OLD_TO_PEFT

    block = "down_blocks.2.attentions.1.transformer_blocks.7.attn1.processor"
    for name in DIFFUSERS_OLD_TO_PEFT:
        state = {f"{prefix}{block}{name}.weight": torch.empty(4, 64) for prefix in ("", "unet.")}
        assert saved(tmp_path, state).kind == "lora", name


@pytest.mark.parametrize("algo", ["lora", "locon", "loha", "lokr", "oft", "boft", "glora", "ia3"])
@pytest.mark.parametrize("decompose", [False, True])
def test_lycoris_networks_are_networks(algo, decompose, tmp_path):
    lycoris = pytest.importorskip("lycoris", reason="builds real networks: pip install lycoris-lora")
    small = diffusers.UNet2DConditionModel(**CONFIG)
    lycoris.LycorisNetwork.apply_preset({"target_module": ["Transformer2DModel"]})
    try:
        made = lycoris.create_lycoris(
            small, 1.0, linear_dim=4, linear_alpha=1, algo=algo, dora_wd=decompose, factor=4
        )
    except TypeError as error:
        pytest.skip(str(error))
    assert made.loras
    kohya = {name.replace("lycoris_", "lora_unet_"): tensor for name, tensor in made.state_dict().items()}
    for state in (made.state_dict(), kohya):
        assert saved(tmp_path, state) == Contents("lora", "SDXL", True)


def helpers():
    """Models of SDXL that have no schedule: what is said of each -> its tensors."""
    import transformers

    same = {key: value for key, value in CONFIG.items() if key != "up_block_types"}
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPTextConfig(**text)
    yield "a ControlNet", diffusers.ControlNetModel(**same).state_dict()
    yield "a T2I-Adapter", diffusers.T2IAdapter(3, (32, 32, 32, 32), 1, 16, "full_adapter_xl").state_dict()
    yield "a T2I-Adapter", diffusers.T2IAdapter(3, (32, 32, 32, 32), 1, 8, "light_adapter").state_dict()
    vae = diffusers.AutoencoderKL(block_out_channels=(32,), norm_num_groups=8).state_dict()
    yield "a VAE", vae
    yield "a VAE", {f"first_stage_model.{name}": tensor for name, tensor in vae.items()}
    encoder = transformers.CLIPTextModel(config).state_dict()
    yield "text encoders", encoder
    yield "text encoders", transformers.CLIPTextModelWithProjection(config).state_dict()
    both = {f"conditioner.embedders.0.transformer.{name}": tensor for name, tensor in encoder.items()}
    yield "text encoders and a VAE", both | {f"first_stage_model.{name}": each for name, each in vae.items()}
    yield "a textual inversion embedding", {"clip_l": torch.empty(4, 768), "clip_g": torch.empty(4, 1280)}
    yield "a textual inversion embedding", {"<token>": torch.empty(768)}
    ip = ("image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight", "ip_adapter.1.to_v_ip.weight")
    yield "an IP-Adapter", {name: torch.empty(4, 4) for name in ip}
    yield (
        "another architecture",
        diffusers.FluxTransformer2DModel(
            num_layers=1,
            num_single_layers=1,
            num_attention_heads=1,
            attention_head_dim=16,
            axes_dims_rope=(4, 6, 6),
        ).state_dict(),
    )


def test_what_has_no_schedule_is_named(tmp_path):
    with torch.device("meta"):
        found = list(helpers())
    assert len(found) == 12
    for what, state in found:
        with pytest.raises(ValueError, match=what) as caught:
            saved(tmp_path, state)
        assert "\n" not in str(caught.value) and "file.safetensors" in str(caught.value)


def test_a_control_net_of_kohyas_names_is_no_unet(tmp_path):
    """sd-scripts' and the original one's: a U-Net's names, and more."""
    for extra in ("controlnet_down_blocks.0.weight", "zero_convs.0.0.weight", "input_hint_block.0.weight"):
        state = {**KINDS["bare_unet"], extra: [320, 320, 1, 1]}
        with pytest.raises(ValueError, match="a ControlNet, which has no noise schedule"):
            ModelFile.read(write(tmp_path / "c.safetensors", state))


LEVELS = {
    f"model.diffusion_model.input_blocks.{block}.1.transformer_blocks.{depth}.norm1.bias": [4]
    for block in (7, 8)
    for depth in range(10)
}
PACKED = {
    "nf4 of bitsandbytes": {
        "label_emb.0.0.weight": [1280 * 2816 // 2, 1],
        "label_emb.0.0.weight.absmax": [56320],
        "label_emb.0.0.weight.quant_state.bitsandbytes__nf4": [84],
    },
    "SVDQuant": {"label_emb.0.0.qweight": [1280, 1408], "label_emb.0.0.wscales": [44, 1280]},
    "GGUF's blocks": {"label_emb.0.0.weight": [1280 * 2816 // 32, 34]},
}


@pytest.mark.parametrize("packing", PACKED)
def test_packed_weights_are_still_sdxls(packing, tmp_path):
    label = {f"model.diffusion_model.{name}": shape for name, shape in PACKED[packing].items()}
    state = {**KINDS["checkpoint"], **LEVELS}
    del state["model.diffusion_model.label_emb.0.0.weight"]
    file = write(tmp_path / "m.safetensors", {**state, **label}, dtype="U8", size=1)
    assert ModelFile.read(file).contents == Contents("checkpoint", "SDXL", True)
    four = {"model.diffusion_model.input_blocks.11.0.in_layers.0.bias": [4]}
    file = write(tmp_path / "m.safetensors", {**state, **label, **four}, dtype="U8", size=1)
    assert ModelFile.read(file).is_sdxl is False


def test_scaled_fp8_is_still_sdxls(tmp_path):
    label = {"model.diffusion_model.label_emb.0.0.scale_weight": [1]}
    file = write(tmp_path / "m.safetensors", {**KINDS["checkpoint"], **label}, dtype="F8_E4M3", size=1)
    assert ModelFile.read(file).contents == Contents("checkpoint", "SDXL", True)


BLOCK = "input_blocks_8_1_transformer_blocks_{}_attn{}_to_k"
LORAS = {
    "kohya's": (f"lora_unet_{BLOCK.format(9, 1)}.lora_down.weight", [4, 1280], "SDXL"),
    "kohya's, cross attention": (f"lora_unet_{BLOCK.format(0, 2)}.lora_down.weight", [4, 2048], "SDXL"),
    "of Stable Diffusion 1": (
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight",
        [4, 768],
        "Stable Diffusion 1",
    ),
    "of its fourth level": (
        "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_ff_net_2.lora_up.weight",
        [320, 4],
        "Stable Diffusion 1 or 2",
    ),
    "of Flux": (
        "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight",
        [4, 3072],
        "another architecture",
    ),
    "of Flux, in peft's names": (
        "transformer.single_transformer_blocks.0.attn.to_k.lora_A.weight",
        [4, 3072],
        "another architecture",
    ),
    "text encoders": ("lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", [4, 1280], "SDXL"),
    "nobody knows": ("lora_unet_down_blocks_1_resnets_0_conv1.lora_down.weight", [4, 320, 3, 3], None),
    "OneTrainer's": (
        "unet.down_blocks.2.attentions.0.transformer_blocks.3.ff.net.2.lora_down.weight",
        [4, 5120],
        "SDXL",
    ),
    "an embedding in a bundle": ("bundle_emb.token.clip_g", [2, 1280], None),
}


@pytest.mark.parametrize("case", LORAS)
def test_networks_say_what_they_are_for(case, tmp_path):
    name, shape, model = LORAS[case]
    file = write(tmp_path / "l.safetensors", {name: shape})
    assert ModelFile.read(file).contents == Contents(
        "lora", model, None if model is None else model == "SDXL"
    )


def test_metadata_says_what_the_names_do_not(tmp_path):
    name, shape, _ = LORAS["nobody knows"]
    for key, says in (
        ("ss_base_model_version", "sdxl_base_v1-0"),
        ("modelspec.architecture", "stable-diffusion-xl-v1-base/lora"),
    ):
        file = write(tmp_path / "l.safetensors", {name: shape}, {key: says})
        assert ModelFile.read(file).contents == Contents("lora", "SDXL", True)


def test_omis_names_of_every_module_are_a_networks(tmp_path):
    """As InvokeAI's copy of the OMI's converter names them."""
    if "INVOKEAI" not in os.environ:
        pytest.skip("asks the real converter: set INVOKEAI=path/to/InvokeAI")
    vendor = Path(os.environ["INVOKEAI"]) / "invokeai/backend/model_manager/omi/vendor/convert/lora"
    space: dict = {}
    for file in ("convert_lora_util.py", "convert_clip.py", "convert_sdxl_lora.py"):
        lines = (vendor / file).read_text().split("\n")
        source = "\n".join(lines)
        for module in ("convert_lora_util", "convert_clip"):
            start = f"from invokeai.backend.model_manager.omi.vendor.convert.lora.{module} import"
            if start in source:
                head, tail = source.split(start, 1)
                cut = tail.index(")") + 1 if tail.lstrip().startswith("(") else tail.index("\n")
                source = head + tail[cut:]
        exec(compile(source, file, "exec"), space)
    prefixes = {each.omi_prefix for each in space["convert_sdxl_lora_key_sets"]()} - {"bundle_emb"}
    assert len(prefixes) > 500
    for prefix in prefixes:
        path = write(tmp_path / "l.safetensors", {f"{prefix}.lora_down.weight": [4, 4]})
        assert ModelFile.read(path).kind == "lora"
