"""Pictures that a script does not train on, encoded once when it has prepared its models, with the VAE and
the text encoders of its base model (its own may be gone by then)."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sdxl_fixes.errors import FlagError
from sdxl_fixes.prompts import CHUNK, encode, tokenize
from sdxl_fixes.trainers.heldout import HeldOut, Picture, Pixels, bucketed, in_folder, untouched_draws

from .run import SESSION

if TYPE_CHECKING:
    from accelerate import Accelerator


def name(heldout: HeldOut, args: argparse.Namespace) -> None:
    """The pictures of ``--heldout_dir``, squares of the script's resolution. Raises FlagError for a folder
    that has none, or that the script trains on."""
    if not args.heldout_dir:
        raise FlagError("--heldout_steps needs --heldout_dir, a folder of pictures that are not trained on")
    folder = Path(args.heldout_dir).resolve()
    for flag in ("train_data_dir", "instance_data_dir"):
        trained = getattr(args, flag, None)
        if trained and folder.is_relative_to(Path(trained).resolve()):
            raise FlagError(
                f"--heldout_dir {args.heldout_dir} lies in --{flag} {trained}, so its pictures are trained "
                "on: move it elsewhere"
            )
    heldout.name(bucketed(in_folder(args.heldout_dir), [(args.resolution, args.resolution)]))


def prepare(original: Callable[..., Any], self: Accelerator, *args: Any, **kwargs: Any) -> Any:
    """The script has its models and optimizer ready, and trains next."""
    result = original(self, *args, **kwargs)
    run = SESSION.run
    if run is not None and self._optimizers and SESSION.called_by_script():
        SESSION.accelerator = self
        if run.heldout is not None and run.heldout.samples is None:
            with untouched_draws():  # of loading, too
                _begin(run.heldout, run.args, self)
    return result


@torch.no_grad()
def _begin(heldout: HeldOut, args: argparse.Namespace, accelerator: Accelerator) -> None:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    from diffusers import AutoencoderKL

    base = args.pretrained_model_name_or_path
    kept: dict[str, Any] = {"revision": getattr(args, "revision", None) or "main"}
    variant: dict[str, Any] = {**kept, "variant": getattr(args, "variant", None)}
    other = getattr(args, "pretrained_vae_model_name_or_path", None)
    device = accelerator.device
    precision = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision)
    vae = AutoencoderKL.from_pretrained(other or base, subfolder=None if other else "vae", **variant)
    vae.to(device, torch.float32).eval()
    tokenizers = [CLIPTokenizer.from_pretrained(base, subfolder=f"tokenizer{n}", **kept) for n in ("", "_2")]
    encoders = [
        kind.from_pretrained(base, subfolder=folder, **variant).to(device, precision).eval()
        for kind, folder in ((CLIPTextModel, "text_encoder"), (CLIPTextModelWithProjection, "text_encoder_2"))
    ]
    chunks = max(1, (args.max_token_length or CHUNK) // CHUNK)

    def latents(pixels: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = vae.encode(pixels.to(device)).latent_dist.mode()
        return found.mul(vae.config.scaling_factor)

    def conditioning(picture: Picture, pixels: Pixels) -> Any:
        ids = [tokenize(each, [picture.caption])[:, :chunks] for each in tokenizers]
        text, pooled = encode(*ids, *encoders)
        sizes = torch.tensor([[*pixels.original, *pixels.crop, *pixels.target]], device=device)
        added = {"text_embeds": pooled, "time_ids": sizes.to(pooled.dtype)}
        return (text,), {"added_cond_kwargs": added, "return_dict": False}

    heldout.encode(latents, conditioning)
