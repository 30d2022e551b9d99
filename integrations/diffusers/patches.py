"""Every patch of what diffusers' example scripts call, in one table (scripts of 0.32 to main). ``run`` is
applied before the script starts; of the others, only those of the fixes that its flags switch on. The one
that adds the flags is in ``install``, which reads this table."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sdxl_fixes.trainers.patching import Patch

from . import (
    buckets,
    caches,
    checkpoint,
    crops,
    ema,
    heldout,
    keep,
    loss,
    prompts,
    schedule,
    timesteps,
    validation,
)
from .run import SESSION

_FROM = ("pretrained_model_name_or_path", "subfolder")
_MSE = ("input", "target", "size_average", "reduce", "reduction")
_CLIP = ("self", "input_ids")

# fmt: off
PATCHES = (
    Patch(("run",), "diffusers.schedulers.scheduling_utils:SchedulerMixin.from_pretrained", _FROM,
          schedule.load, "training scheduler and pipeline schedulers of one schedule"),
    Patch(("run",), "accelerate:Accelerator.backward", ("self", "loss"), SESSION.backward,
          "stops a step in which a fix that is on was not reached"),
    Patch(("run",), "accelerate:Accelerator.save_state", ("self", "output_dir"), checkpoint.save_state,
          "checkpoints know their schedule"),
    Patch(("run",), "accelerate:Accelerator.load_state", ("self", "input_dir"), checkpoint.load_state,
          "and are resumed on no other"),

    Patch(("loss", "weighting", "timesteps", "keep"), "torch.nn.functional:mse_loss", _MSE, loss.mse_loss,
          "the step's loss: --loss_type, delta, SNR and importance weights from the schedule, finite at SNR "
          "0, prior half included"),
    Patch(("timesteps",), "torch:randint", (), timesteps.randint, "timesteps from the run's sampler"),
    Patch(("timesteps",), "torch:randn_like", (), timesteps.randn_like,
          "the latents' size, for --resolution_shift"),

    Patch(("prompts",), "transformers:PreTrainedTokenizerBase.__call__", ("self", "text"), prompts.tokenize,
          "captions in chunks of 75 tokens (upstream: cut at the first)"),
    Patch(("prompts",), "transformers:CLIPTextModel.forward", _CLIP, prompts.encode,
          "each chunk encoded by itself"),
    Patch(("prompts",), "transformers:CLIPTextModelWithProjection.forward", _CLIP, prompts.encode,
          "the same; pooled output of the first"),
    Patch(("prompts",), "torch.utils.data:DataLoader.__init__", ("self", "dataset"), prompts.loader,
          "cached embeddings of a batch cut to its longest caption"),
    Patch(("prompts",), "datasets:Dataset.map", ("self", "function"), prompts.remember,
          "which needs the number of chunks in the cache"),

    Patch(("buckets",), "torch.utils.data:DataLoader.__init__", ("self", "dataset"), buckets.loader,
          "batches of equally many chunks"),
    Patch(("buckets",), "accelerate:Accelerator.prepare", ("self",), buckets.prepare,
          "deals them out to the processes whole"),

    Patch(("crops",), "torch.utils.data:DataLoader.__init__", ("self", "dataset"), crops.loader,
          "crop coordinates of the cached latents (upstream: drawn anew at every access)"),

    Patch(("caches",), "datasets:Dataset.map", ("self", "function"), caches.map,
          "cache keys that know the models' files and the code; cold and warm runs draw the same noise"),
    Patch(("caches",), "datasets:Dataset.remove_columns", ("self", "column_names"), caches.remove_columns,
          "any --image_column and --caption_column (upstream: only image and text)"),

    # before the next row, which then is told of the trained call alone, and tells flow's timesteps first
    Patch(("keep",), "diffusers:UNet2DConditionModel.forward", ("self", "sample", "timestep"), keep.called,
          "the frozen base is asked first"),
    Patch(("keep",), "accelerate:Accelerator.load_state", ("self",), keep.load_state,
          "which is no resumed state's"),

    Patch(("schedule",), "diffusers.configuration_utils:ConfigMixin.from_config", ("config",),
          schedule.configured, "so do schedulers that the script makes for its validation images"),
    Patch(("schedule", "validation", "heldout"), "diffusers:UNet2DConditionModel.forward",
          ("self", "sample", "timestep"), validation.called,
          "of flow it is told T s; the first images are kept, with their conditioning"),
    Patch(("schedule",), "diffusers:ControlNetModel.forward", ("self", "sample", "timestep"),
          validation.controls, "is told the same"),
    Patch(("validation", "heldout"), "accelerate:Accelerator.log", (), validation.log,
          "their loss is computed and logged after the optimizer step"),
    Patch(("heldout", "ema"), "accelerate:Accelerator.prepare", ("self",), heldout.prepare,
          "held-out pictures are encoded before the first step"),
    Patch(("ema",), "accelerate.optimizer:AcceleratedOptimizer.step", ("self",), ema.stepped,
          "the weights' average is updated"),
    Patch(("ema",), "diffusers:DiffusionPipeline.save_pretrained", ("self", "save_directory"),
          ema.save_pipeline, "and saved in unet_ema"),
    Patch(("ema",), "diffusers.loaders:StableDiffusionXLLoraLoaderMixin.save_lora_weights",
          ("save_directory", "unet_lora_layers"), ema.save_lora, "or beside a LoRA, in ema"),

    Patch(("saving",), "safetensors.torch:save_file", ("tensors", "filename", "metadata"),
          checkpoint.save_file, "the record in the metadata"),
)
# fmt: on
_CACHING = "datasets:"  # patches of it serve scripts that keep embeddings in a datasets cache


def for_script(source: str, script: dict[str, Any]) -> tuple[Patch, ...]:
    """The table, without what the script has no use for, and with the names that it imported for itself or
    defines."""
    named = [
        Patch(
            ("saving",),
            "{}:save_file",
            ("tensors", "filename", "metadata"),
            checkpoint.save_file,
            "the same, for the kohya-format file",
        ),
        Patch(
            ("crops",),
            "{}:compute_vae_encodings",
            ("batch", "vae"),
            crops.encode,
            "keeps the crop beside the latents",
        ),
    ]
    own = [replace(p, target=p.target.format(script["__name__"])) for p in named if p.path in script]
    return (*(p for p in PATCHES if "new_fingerprint" in source or not p.target.startswith(_CACHING)), *own)
