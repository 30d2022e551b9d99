"""What each fix needs to find in a script, looked for in its source before anything is loaded."""

from __future__ import annotations

import ast

_TRAINS_BY_TIMESTEP = (("DDPMScheduler.from_pretrained",), "it does not train with a DDPMScheduler")
_ADDS_NOISE = (("noise_scheduler.add_noise",), "it does not call noise_scheduler.add_noise")
_MSE = (("F.mse_loss",), "it does not call F.mse_loss: its loss is written out")
_LOGS = (("accelerator.log",), "it does not call accelerator.log")

_PIPELINES = tuple(f"StableDiffusionXL{kind}Pipeline" for kind in ("", "ControlNet", "InstructPix2Pix", "Adapter"))

# words of scripts whose loss is not the error of one prediction, where no fix of training has a place
FOREIGN = {
    "teacher_unet": "it distils a teacher on the teacher's schedule",
    "beta_dpo": "its loss compares with a reference model",
    "beta_orpo": "its loss compares two predictions",
    '"--loss_type"': "it has a --loss_type of its own",
}

# words of scripts whose U-Net is given what the stable loss cannot keep
BESIDES = {
    "additional_residuals=": "its U-Net is given a ControlNet's or an adapter's residuals, which depend on the noise",
    "InstructPix2Pix": "its U-Net is given the image to edit beside the noisy latents",
}

# fix -> what the script must call or define (one of the names), and what to say if it does not
ANCHORS: dict[str, tuple[tuple[tuple[str, ...], str], ...]] = {
    "schedule": (
        (("DDPMScheduler.from_pretrained", "EulerDiscreteScheduler.from_pretrained"), "it loads no scheduler that follows betas"),
    ),
    "loss": (_TRAINS_BY_TIMESTEP, _ADDS_NOISE, _MSE),
    "weighting": (_TRAINS_BY_TIMESTEP, _ADDS_NOISE, _MSE),
    "noise": (_TRAINS_BY_TIMESTEP, _ADDS_NOISE),
    "timesteps": (_TRAINS_BY_TIMESTEP, _ADDS_NOISE, (("torch.randint",), "it does not draw its timesteps with torch.randint"), _MSE),
    "validation": (_TRAINS_BY_TIMESTEP, _ADDS_NOISE, (("unet",), "it does not call unet(...)"), _LOGS),
    "prompts": ((("tokenizer",), "it does not call tokenizer(...)"), (("def encode_prompt",), "it has no encode_prompt")),
    "crops": ((("def compute_vae_encodings",), "it caches no latents, so its crop coordinates are those of the images"),),
    "caches": ((("Hasher.hash", "latents_cache.append"), "it keeps no cache"),),
    "previews": ((tuple(f"{name}.from_pretrained" for name in _PIPELINES), "it makes no images"),),
    "saving": ((("save_pretrained", "save_lora_weights"), "it saves no model"),),
}


def missing(source: str) -> dict[str, str]:
    """fix -> why it does not fit the script whose text is ``source``; fixes that fit are not in it. Empty for an empty source."""
    names = _names(source)
    why = {fix: [reason for any_of, reason in needs if not names & set(any_of)] for fix, needs in ANCHORS.items()}
    why["validation"] += [reason for word, reason in BESIDES.items() if word in source]
    foreign = [reason for word, reason in FOREIGN.items() if word in source]
    if foreign:
        why |= {fix: foreign for fix in ANCHORS if fix not in ("crops", "caches")}
    return {fix: reasons[0] for fix, reasons in why.items() if reasons} if source else {}


def is_sdxl_script(source: str) -> bool:
    """Whether ``source`` looks like a training script for SDXL made after diffusers' examples."""
    names = _names(source)
    return {"def main", "def parse_args"} <= names and bool({name for name in names if name.startswith("StableDiffusionXL")})


def _names(source: str) -> set[str]:
    """Every call by its dotted name and the ends of it (``a.b.c``, ``b.c``, ``c``), and every function as ``def name``."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            found.add(f"def {node.name}")
        elif isinstance(node, ast.Call):
            dotted = _dotted(node.func)
            found |= {".".join(dotted[i:]) for i in range(len(dotted))}
    return found


def _dotted(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Attribute):
        return [*_dotted(node.value), node.attr]
    return [node.id] if isinstance(node, ast.Name) else []
