"""SDXL as it is trained: out of a folder, with the settings that make it fast, and back to a folder and to
pictures."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from PIL import Image
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from sdxl_fixes import Objective
from sdxl_fixes.checkpoint import Sampling
from sdxl_fixes.model_files.stamp import model_files, stamp_file, write_scheduler_config
from sdxl_fixes.prompts import encode, tokenize

UNET, TEXT = "unet.", "text_encoder."  # of the state's names


class Network(torch.nn.Module):
    """The U-Net, and text encoder 1 where it is trained: one module, because FSDP and DeepSpeed take one.
    What is not trained is no part of it."""

    def __init__(
        self, unet: UNet2DConditionModel, encoders: tuple[Any, Any], trained: bool, channels_last: bool
    ) -> None:
        super().__init__()
        self.unet, self.channels_last = unet, channels_last
        self.text_encoder = encoders[0] if trained else None
        self.frozen = encoders  # in a tuple, which torch does not look into

    def forward(
        self,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        ids: torch.Tensor,
        ids_2: torch.Tensor,
        time_ids: torch.Tensor,
    ) -> torch.Tensor:
        """The prediction, [B, 4, h, w], of ``noisy`` [B, 4, h, w], ``ids`` and ``ids_2`` [B, n, 77],
        ``time_ids`` [B, 6]."""
        first, second = self.frozen
        with torch.set_grad_enabled(self.text_encoder is not None and torch.is_grad_enabled()):
            context, pooled = encode(ids, ids_2, self.text_encoder or first, second)
        noisy, dtype = noisy.to(self.unet.dtype), self.unet.dtype
        if self.channels_last:
            noisy = noisy.contiguous(memory_format=torch.channels_last)
        told = {"text_embeds": pooled.to(dtype), "time_ids": time_ids}
        return self.unet(noisy, timesteps, context.to(dtype), added_cond_kwargs=told, return_dict=False)[0]


def load(args: argparse.Namespace, device: torch.device) -> Network:
    """By the flags; on ``device`` what is not trained."""
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    frozen = torch.float32 if args.precision == "fp32" else torch.bfloat16
    unet = UNet2DConditionModel.from_pretrained(args.model, subfolder="unet", torch_dtype=dtype).train()
    trained = args.train_text_encoder
    kinds = (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection))
    encoders = []
    for k, (name, kind) in enumerate(kinds):
        kept = dtype if trained and k == 0 else frozen
        encoder = kind.from_pretrained(args.model, subfolder=name).to(device, kept)
        encoders.append(encoder.requires_grad_(False).eval())
    if trained:
        train_text(encoders[0])
    speed(unet, args)
    return Network(unet, (encoders[0], encoders[1]), trained, args.channels_last)


def train_text(encoder: CLIPTextModel) -> None:
    """But for what comes after the last hidden state but one, which is all that the U-Net is given: DDP waits
    for a gradient of all that is trained."""
    unused = (f"layers.{encoder.config.num_hidden_layers - 1}.", "final_layer_norm.")
    encoder.train()
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(not any(part in name for part in unused))


def speed(unet: UNet2DConditionModel, args: argparse.Namespace) -> None:
    """What changes the time and memory of a step, and nothing else."""
    if args.channels_last:
        unet.to(memory_format=torch.channels_last)
    if args.checkpointing != "none":
        unet.enable_gradient_checkpointing()
    if args.checkpointing == "transformers":
        transformers = [module for module in unet.modules() if isinstance(module, Transformer2DModel)]
        depth = max(len(each.transformer_blocks) for each in transformers)
        deep = [each for each in transformers if len(each.transformer_blocks) == depth]
        for module in unet.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = module in transformers
        for each in deep[: args.keep_activations]:
            each.gradient_checkpointing = False
    if args.compile_blocks:
        # two kinds of blocks, with and without gradients, at every size until torch takes sizes as they come
        torch._dynamo.config.cache_size_limit = 64
        unet.compile_repeated_blocks(fullgraph=True, backend=args.compile_backend)


def optimizer(network: Network, args: argparse.Namespace) -> torch.optim.Optimizer:
    """AdamW; of weights in bfloat16 one that rounds stochastically, without which steps of 1e-4 are lost."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    options = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
    if args.precision != "bf16":
        return torch.optim.AdamW(trained, fused=args.fused_adamw, **options)
    from sdxl_fixes.trainers.adamw import AdamW  # torchao's

    return AdamW(trained, **options)


def pipeline(
    network: Network, state: Mapping[str, torch.Tensor], args: argparse.Namespace, to_save: bool = False
) -> StableDiffusionXLPipeline:
    """Of the weights in ``state``, as accelerate's get_state_dict gives them: nothing is copied but text
    encoder 1. ``to_save``: what is not trained is read again, as it was before it was rounded for the forward
    pass."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(network.unet.config)
    unet.load_state_dict(_of(state, UNET), assign=True)
    first, second = network.frozen
    parts = {} if to_save else {"text_encoder": first, "text_encoder_2": second}
    if network.text_encoder is not None:
        parts["text_encoder"] = CLIPTextModel(first.config).eval()
        parts["text_encoder"].load_state_dict(_of(state, TEXT))
    parts["unet"] = unet.eval()
    made = StableDiffusionXLPipeline.from_pretrained(args.model, **parts)
    made.set_progress_bar_config(disable=True)
    return made


def _of(state: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): each for name, each in state.items() if name.startswith(prefix)}


def save(pipe: StableDiffusionXLPipeline, folder: Path, objective: Objective) -> None:
    """A folder that says how it is sampled: by its scheduler, and by the record in the U-Net's files."""
    pipe.save_pretrained(folder)
    sampling = Sampling(objective.schedule, objective.prediction_type)
    write_scheduler_config(folder / "scheduler" / "scheduler_config.json", sampling)
    for file in model_files(folder):
        stamp_file(file, sampling, force=True)


@torch.no_grad()
def samples(
    pipe: StableDiffusionXLPipeline,
    prompts: Iterable[str],
    objective: Objective,
    args: argparse.Namespace,
    device: torch.device,
) -> Iterator[tuple[str, Image.Image]]:
    """Each prompt's picture, always of the same noise, on the schedule that is trained."""
    pipe.to(device)
    pipe.scheduler = objective.schedule.scheduler("dpmpp_2m", objective.prediction_type)
    for prompt in prompts:
        ids, ids_2 = (tokenize(each, [prompt, ""]) for each in (pipe.tokenizer, pipe.tokenizer_2))
        context, pooled = encode(ids, ids_2, pipe.text_encoder, pipe.text_encoder_2)
        context, pooled = context.to(pipe.unet.dtype), pooled.to(pipe.unet.dtype)
        latents = pipe(
            prompt_embeds=context[:1],
            negative_prompt_embeds=context[1:],
            pooled_prompt_embeds=pooled[:1],
            negative_pooled_prompt_embeds=pooled[1:],
            height=args.sample_side,
            width=args.sample_side,
            num_inference_steps=args.sample_steps,
            guidance_scale=args.sample_guidance,
            generator=torch.Generator().manual_seed(args.seed),
            output_type="latent",
        ).images
        pixels = pipe.vae.decode(latents.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor).sample
        yield prompt, pipe.image_processor.postprocess(pixels)[0]
