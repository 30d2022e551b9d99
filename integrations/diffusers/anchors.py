"""What each fix needs to find in a script, looked for in its source before anything is loaded."""

from __future__ import annotations

import ast

_TRAINS_BY_TIMESTEP = (("DDPMScheduler.from_pretrained",), "it does not train with a DDPMScheduler")
_ADDS_NOISE = (("noise_scheduler.add_noise",), "it does not call noise_scheduler.add_noise")
_MSE = (("F.mse_loss",), "it does not call F.mse_loss: its loss is written out")
_LOGS = (("accelerator.log",), "it does not call accelerator.log")

_PIPELINES = (
    "DiffusionPipeline",
    *(f"StableDiffusionXL{kind}Pipeline" for kind in ("", "ControlNet", "InstructPix2Pix", "Adapter")),
)

# words of scripts that are refused as a whole: most have a loss that is not the error of one prediction
FOREIGN = {
    "teacher_unet": "it distils a teacher on the teacher's schedule",
    '"--pretrained_teacher_model"': "it distils a teacher on the teacher's schedule",
    "beta_dpo": "its loss compares with a reference model",
    "beta_orpo": "its loss compares two predictions",
    '"--loss_type"': "it has a --loss_type of its own, and diffusers' plain script of the same name does "
    "all of it with ours",
    "import webdataset": "it reads webdataset's shards, which nobody has tried with the fixes",
    "class IPAdapter": "it saves no model file, and predicts noise whatever the base model predicts",
}

# words of scripts that do something beside the loss of one prediction -> the fixes that it leaves no place,
# and what it is
BESIDES: dict[str, tuple[tuple[str, ...], str]] = {
    "additional_residuals=": (
        ("validation", "heldout", "keep"),
        "its U-Net is given a ControlNet's or an adapter's residuals, which depend on the noise",
    ),
    "InstructPix2Pix": (
        ("validation", "heldout", "keep"),
        "its U-Net is given the image to edit beside the noisy latents",
    ),
    '"--placeholder_token"': (
        ("validation", "heldout", "keep", "ema"),
        "it trains the text embeddings themselves, which would have to stay as they are",
    ),
    '"--instance_prompt"': (("buckets",), "it makes its batches of class and instance prompts"),
    "LatentPerceptualLoss": (
        ("loss", "weighting", "noise", "timesteps", "keep", "validation", "heldout"),
        "it adds a perceptual loss of its own, which no fix knows",
    ),
}

# fix -> what the script must call or define (one of the names), and what to say if it does not
ANCHORS: dict[str, tuple[tuple[tuple[str, ...], str], ...]] = {
    "schedule": (
        (
            ("DDPMScheduler.from_pretrained", "EulerDiscreteScheduler.from_pretrained"),
            "it loads no scheduler that follows betas",
        ),
    ),
    "loss": (_TRAINS_BY_TIMESTEP, _ADDS_NOISE, _MSE),
    "weighting": (_TRAINS_BY_TIMESTEP, _ADDS_NOISE, _MSE),
    "noise": (_TRAINS_BY_TIMESTEP, _ADDS_NOISE),
    "timesteps": (
        _TRAINS_BY_TIMESTEP,
        _ADDS_NOISE,
        (("torch.randint",), "it does not draw its timesteps with torch.randint"),
        _MSE,
    ),
    "keep": (_TRAINS_BY_TIMESTEP, _ADDS_NOISE, _MSE, (("unet",), "it does not call unet(...)")),
    "validation": (_TRAINS_BY_TIMESTEP, _ADDS_NOISE, (("unet",), "it does not call unet(...)"), _LOGS),
    "heldout": (_TRAINS_BY_TIMESTEP, (("unet",), "it does not call unet(...)"), _LOGS),
    "ema": (
        (
            ("pipeline.save_pretrained", "StableDiffusionXLPipeline.save_lora_weights"),
            "it saves neither a pipeline nor a LoRA",
        ),
    ),
    "prompts": (
        (("tokenizer", "self.tokenizer_1"), "it does not call tokenizer(...)"),
        (("def encode_prompt", "text_encoder_1"), "it has no encode_prompt and calls no text_encoder_1(...)"),
    ),
    "buckets": (
        (
            ("--caption_column",),
            "it has no --caption_column, so the length of its captions is not known beforehand",
        ),
    ),
    "crops": (
        (
            ("def compute_vae_encodings",),
            "it caches no latents, so its crop coordinates are those of the images",
        ),
    ),
    "caches": ((("Hasher.hash", "latents_cache.append"), "it keeps no cache"),),
    "previews": ((tuple(f"{name}.from_pretrained" for name in _PIPELINES), "it makes no images"),),
    "saving": ((("save_pretrained", "save_lora_weights"), "it saves no model"),),
}


def missing(source: str) -> dict[str, str]:
    """fix -> why it does not fit the script whose text is ``source``; fixes that fit are not in it. Empty for
    an empty source."""
    if why_not := refused(source):
        return dict.fromkeys(ANCHORS, why_not)
    names = _names(source)
    why = {
        fix: [reason for any_of, reason in needs if not names & set(any_of)] for fix, needs in ANCHORS.items()
    }
    for word, (fixes, reason) in BESIDES.items():
        for fix in fixes if word in source else ():
            why[fix].append(reason)
    return {fix: reasons[0] for fix, reasons in why.items() if reasons} if source else {}


def refused(source: str) -> str | None:
    """Why no fix has a place in the script whose text is ``source``; None where some have."""
    return next((reason for word, reason in FOREIGN.items() if word in source), None)


def in_sigma_space(source: str) -> bool:
    """Whether the script whose text is ``source`` noises by sigma, and knows no other way."""
    names = _names(source)
    return "EulerDiscreteScheduler.from_pretrained" in names and "DDPMScheduler.from_pretrained" not in names


def computes_with_predictions(source: str) -> bool:
    """Whether the script whose text is ``source`` makes something else than the loss of a prediction, by
    formulas for epsilon and v-prediction."""
    return "LatentPerceptualLoss" in source


def is_sdxl_script(source: str) -> bool:
    """Whether ``source`` looks like a training script for SDXL made after diffusers' examples: it names a
    pipeline of SDXL's, or loads a U-Net and two tokenizers."""
    names = _names(source)
    pipeline = any(name.startswith("StableDiffusionXL") for name in names)
    parts = "UNet2DConditionModel.from_pretrained" in names and "tokenizer_2" in source
    return {"def main", "def parse_args"} <= names and (pipeline or parts)


def _names(source: str) -> set[str]:
    """Every call by its dotted name and the ends of it (``a.b.c``, ``b.c``, ``c``), every function as ``def
    name``, every ``--flag``."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            found.add(f"def {node.name}")
        elif isinstance(node, ast.Call):
            dotted = _dotted(node.func)
            found |= {".".join(dotted[i:]) for i in range(len(dotted))}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("--"):
            found.add(node.value)
    return found


def _dotted(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Attribute):
        return [*_dotted(node.value), node.attr]
    return [node.id] if isinstance(node, ast.Name) else []
