"""What a .safetensors file holds (checkpoint, U-Net, LoRA, ...) and of which model, told by the names, dtypes
and shapes in its header. The U-Nets' widths and depths are those of ComfyUI's supported_models.py and of the
diffusers configs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sdxl_fixes.checkpoint import UNET
from sdxl_fixes.model_files.header import Header, Tensor

# kind of file -> what to call it, and the prefixes at which UIs look for its markers
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "checkpoint": ("checkpoint (U-Net, text encoders, VAE)", ("",)),
    "unet": ("U-Net alone, under model.diffusion_model.", ("", UNET)),
    "bare_unet": ("U-Net alone, bare names", ("",)),
    "diffusers_unet": ("U-Net in diffusers' names", ()),
    "lora": ("LoRA or other network", ()),
    "shard": ("one of several shards", ()),
}
SDXL = "SDXL"
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")

# names of networks: kohya's, OneTrainer's and OMI's; diffusers' since 2023 (an attention processor's, then
# .lora., then peft's); LyCORIS' and peft's algorithms (LoHa, LoKr, OFT, BOFT, DoRA, GLoRA, IA3, VeRA, full)
_NETWORK = re.compile(
    r"^lora_(unet|te\d?|transformer)_|^lycoris_|^bundle_emb\.|^base_model\.model\."
    r"|[._]lora(_linear_layer)?[._](down|up|mid|A|B|magnitude_vector|embedding_A|embedding_B)(\.|$)"
    r"|\.hada_(w1|w2|t1|t2)|\.lokr_(w1|w2|t2)|\.b?oft_([a-zA-Z]|diag|blocks)|\.dora_scale$|\.ia3_l(\.|$)"
    r"|\.(vera_lambda_|hra_u|on_input$)|\.(diff|diff_b|w_norm|b_norm|a1\.weight|b2\.weight)$"
)
# files of Stable Diffusion that have no noise schedule of their own, by names that no U-Net has: what they
# are -> a name of them
_HELPERS: dict[str, re.Pattern[str]] = {
    "a ControlNet": re.compile(
        r"^(control_model\.|controlnet_|input_hint_block\.|zero_convs\.)|^lora_controlnet$"
    ),
    "a ControlNet-LLLite": re.compile(r"^lllite_"),
    "an IP-Adapter": re.compile(r"^(ip_adapter\.|image_proj\.)|\.to_[kv]_ip\."),
    "a T2I-Adapter": re.compile(
        r"^(adapter\.)?body\.\d+\.(in_conv|block1|resnets)\b|^adapter\.(body|conv_in)\."
    ),
}
_VAE = re.compile(r"^((first_stage_model|vae)\.)?(en|de)coder\.(conv_(in|out)|mid|mid_block|down|up)\b")
_TEXT_ENCODER = re.compile(
    r"(^|\.)(encoder\.layers\.\d+\.(self_attn|mlp)|embeddings\.(token|position)_embedding)\."
    r"|(^|\.)transformer\.resblocks\.|^(text_projection|logit_scale)\b"
)
_TEXT_WIDTHS = (768, 1024, 1280)
_OTHER_UNET = re.compile(
    r"(^|\.)(double_blocks|single_blocks|joint_blocks|single_transformer_blocks|blocks)\.\d"
)
_BLOCKS = re.compile(r"(^|[._])(down_blocks|up_blocks|mid_block|input_blocks|output_blocks|middle_block)[._]")


@dataclass(frozen=True)
class Contents:
    """``kind`` is a key of KINDS. ``model`` names what it belongs to, None where that cannot be seen;
    ``sdxl`` is whether that is SDXL's U-Net (with its schedule and markers)."""

    kind: str
    model: str | None = None
    sdxl: bool | None = None

    @property
    def what(self) -> str:
        """What to call it."""
        model = self.model or ("a model that is not SDXL" if self.sdxl is False else None)
        return KINDS[self.kind][0] + (f" of {model}" if model else "")


def contents(path: Path, header: Header) -> Contents:
    """What the file is. Raises ValueError, in one sentence, for what has no noise schedule."""
    names = header.tensors
    if _SHARD.search(path.name):
        return Contents("shard")
    for what, known in _HELPERS.items():
        if any(known.search(name) for name in names):
            raise ValueError(_no_schedule(path, what))
    for prefix, kind in ((UNET, "unet"), ("", "bare_unet")):
        if any(name.startswith(prefix + "input_blocks.") for name in names):
            others = ("conditioner.", "first_stage_model.", "cond_stage_model.", "text_encoders.", "vae.")
            whole = kind == "unet" and any(name.startswith(others) for name in names)
            return Contents("checkpoint" if whole else kind, *_unet(names, prefix, _SGM))
    if any(_NETWORK.search(name) for name in names):
        return Contents("lora", *_network(header))
    if "conv_in.weight" in names and any(name.startswith("time_embedding.linear_1.") for name in names):
        return Contents("diffusers_unet", *_unet(names, "", _DIFFUSERS))
    raise ValueError(_other(path, names))


def _no_schedule(path: Path, what: str) -> str:
    return (
        f"{path} is {what}, which has no noise schedule of its own: stamp or inspect the checkpoint that it "
        "is used with"
    )


def _other(path: Path, names: Mapping[str, Tensor]) -> str:
    if any(name.startswith(UNET) or _OTHER_UNET.search(name) for name in names):
        return f"{path} is a model of another architecture: only Stable Diffusion's U-Net is known here"
    kinds: tuple[tuple[str, Callable[[str], bool]], ...] = (
        ("text encoders", lambda name: bool(_TEXT_ENCODER.search(name))),
        ("a VAE", lambda name: bool(_VAE.search(name))),
    )
    found = [what for what, known in kinds if any(known(name) for name in names)]
    if found:
        return _no_schedule(path, " and ".join(found) + " without a U-Net")
    if 0 < len(names) <= 8 and all(
        tensor.shape[-1:] and tensor.shape[-1] in _TEXT_WIDTHS and len(tensor.shape) < 3
        for tensor in names.values()
    ):
        return _no_schedule(path, "a textual inversion embedding")
    return (
        f"{path} holds no U-Net and no LoRA of Stable Diffusion's kind, so there is no schedule to speak of"
    )


# ---------------------------------------------------------------- U-Nets


@dataclass(frozen=True)
class _Names:
    """How a naming calls what tells U-Nets apart: the first convolution, the embedding of size and pooled
    text, a name of the fourth level, and the transformers of the third."""

    first: str
    label: str
    fourth: re.Pattern[str]
    third: re.Pattern[str]


_SGM = _Names(
    "input_blocks.0.0.weight",
    "label_emb.0.0.",
    re.compile(r"input_blocks\.(9|1\d)\."),
    re.compile(r"input_blocks\.[78]\.1\.transformer_blocks\.(\d+)\."),
)
_DIFFUSERS = _Names(
    "conv_in.weight",
    "add_embedding.linear_1.",
    re.compile(r"down_blocks\.3\."),
    re.compile(r"down_blocks\.2\.attentions\.\d+\.transformer_blocks\.(\d+)\."),
)


def _unet(names: Mapping[str, Tensor], prefix: str, style: _Names) -> tuple[str | None, bool | None]:
    """The model, and whether it is SDXL's. Packed weights (bitsandbytes, GGUF, SVDQuant) have lost their
    shape: then the levels and the transformers tell."""
    own = {name[len(prefix) :]: tensor for name, tensor in names.items() if name.startswith(prefix)}
    label = any(name.startswith(style.label) for name in own)
    size, four = _inputs(own.get(style.label + "weight")), any(style.fourth.match(name) for name in own)
    depth = max((int(m[1]) for name in own if (m := style.third.match(name))), default=-1) + 1
    if size == 2816 or (size is None and label and depth and not four):
        return _sdxl(_inputs(own.get(style.first)), depth), True
    if size == 2560:
        return "SDXL's refiner", False
    if label and size is None:
        return None, False if four else None
    if label:
        return "a Stable Diffusion with another embedding (unCLIP)", False
    return _by_context(_context(own)), False


def _sdxl(channels: int | None, depth: int) -> str:
    if depth and depth < 10:
        return "pruned SDXL (SSD-1B, Segmind-Vega, KOALA)"
    return {9: "SDXL inpainting (9 input channels)", 8: "SDXL image editing (8 input channels)"}.get(
        channels or 4, SDXL
    )


def _inputs(tensor: Tensor | None) -> int | None:
    """Inputs of a layer by its weight; None where it is packed, or not there."""
    if tensor is None or len(tensor.shape) < 2 or tensor.shape[1] == 1 or tensor.dtype in ("U8", "I32"):
        return None
    return tensor.shape[1]


def _context(names: Mapping[str, Tensor]) -> int | None:
    """Width of the text that the U-Net attends to, by its cross attention."""
    found = (
        _inputs(tensor) for name, tensor in names.items() if re.search(r"attn2[._]to_k\b.*weight$", name)
    )
    return next((width for width in found if width is not None and width >= 128), None)


def _by_context(width: int | None) -> str | None:
    return {
        768: "Stable Diffusion 1",
        1024: "Stable Diffusion 2",
        1280: "SDXL's refiner",
        2048: SDXL,
    }.get(width or 0)


# ---------------------------------------------------------------- LoRA and other networks

_OF_SDXL = re.compile(r"^(lora_te2_text_model|text_encoder_2\.|clip_g\.|lora_unet_(label_emb|add_embedding))")
_DEPTH = re.compile(r"transformer_blocks[._]([2-9])[._]")
_FOURTH = re.compile(r"(down_blocks|up_blocks)[._]3[._]|(input_blocks|output_blocks)[._](9|1[01])[._]")
_TEXT = re.compile(r"^(lora_te\d?_|text_encoder|clip_[lg]\.|bundle_emb\.|lycoris_text|te\d?\.)|text_model")


def _network(header: Header) -> tuple[str | None, bool | None]:
    """What a network is for: by its blocks, else by its cross attention, else by kohya's and modelspec's
    metadata; (None, None) where none of them tells."""
    names, unet = header.tensors, [name for name in header.tensors if _BLOCKS.search(name)]
    others = [name for name in names if _NETWORK.search(name) and not _TEXT.search(name)]
    if others and not unet and any(_transformer(name) for name in others):
        return "another architecture", False
    if any(_FOURTH.search(name) for name in unet):
        model = _by_context(_context_of_lora(names))
        return (model or "Stable Diffusion 1 or 2"), False
    if any(_OF_SDXL.search(name) for name in names) or any(_DEPTH.search(name) for name in unet):
        return SDXL, True
    model = _by_context(_context_of_lora(names)) or _by_metadata(header.metadata)
    return model, None if model is None else model == SDXL


def _transformer(name: str) -> bool:
    """Whether it is of a transformer that denoises by itself, as Flux, SD3 and video models have."""
    return bool(
        re.search(
            r"(double|single|joint|transformer|refiner)_?(transformer_)?blocks[._]\d|blocks[._]\d", name
        )
    )


def _context_of_lora(names: Mapping[str, Tensor]) -> int | None:
    """As _context, of a network's first matrix."""
    down = re.compile(
        r"attn2[._](processor[._])?to_[kv](_lora)?[._](lora[._](down|A)|down|lora_linear_layer\.down)\b"
    )
    widths = (tensor.shape[-1] for name, tensor in names.items() if tensor.shape and down.search(name))
    return next((width for width in widths if _by_context(width)), None)


def _by_metadata(metadata: Mapping[str, str]) -> str | None:
    said = metadata.get("ss_base_model_version", ""), metadata.get("modelspec.architecture", "")
    starts: Iterable[tuple[str, str]] = (
        ("sdxl", SDXL),
        ("stable-diffusion-xl", SDXL),
        ("sd_v1", "Stable Diffusion 1"),
        ("stable-diffusion-v1", "Stable Diffusion 1"),
        ("sd_v2", "Stable Diffusion 2"),
        ("stable-diffusion-v2", "Stable Diffusion 2"),
    )
    return next((model for start, model in starts if any(word.startswith(start) for word in said)), None)
