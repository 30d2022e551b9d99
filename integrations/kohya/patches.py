"""Every patch of sd-scripts, in one table (v0.10.0 to main). ``run`` carries the flags and is applied
whatever fixes are on.

v0.11 moved most functions into modules of their own; both homes are named, newest first.
"""

from __future__ import annotations

from sdxl_fixes.trainers.patching import Patch

from . import (
    buckets,
    checkpoint,
    edits,
    ema,
    flags,
    heldout,
    keep,
    loss,
    noise,
    previews,
    prompts,
    resume,
    schedule,
    speed,
    timesteps,
    validation,
    waits,
)
from .run import SESSION

_LOSS, _ARGS, _DATA = (
    "library.loss|library.train_util",
    "library.args|library.train_util",
    "library.dataset|library.train_util",
)
_SAMPLING, _SAVING, _MODELS = (
    "library.sampling|library.train_util",
    "library.model_io|library.train_util",
    "library.sdxl_model_util",
)
_FILES = "library.checkpoint_io|library.train_util"
_FUNCTIONS, _SDXL, _UNET = (
    "library.custom_train_functions",
    "library.strategy_sdxl",
    "library.sdxl_original_unet",
)
_PIPELINE = "library.sdxl_lpw_stable_diffusion"
_WEIGHT = ("loss", "timesteps", "noise_scheduler")
_STEP = ("loss", "weighting", "timesteps")
_LOSSES = (*_STEP, "keep")
_LOOPS = ("sdxl_train.py", "sdxl_train_network.py")
_MASKS = ("sdxl_train.py", "sdxl_train_network.py", "sdxl_train_textual_inversion.py")

# What came with v0.10.0; below it the trainers pass other values between the same functions, so nothing is
# patched at all.
NEEDED = Patch(
    ("run",),
    f"{_LOSS}:get_huber_threshold_if_needed",
    ("args", "timesteps", "noise_scheduler"),
    loss.threshold,
    "",
)

# fmt: off
PATCHES = (
    Patch(("run",), f"{_FUNCTIONS}:add_custom_train_arguments", ("parser",), flags.add_arguments,
          "adds the flags"),
    Patch(("run",), f"{_ARGS}:read_config_from_file", ("args", "parser"), flags.read_config,
          "a TOML file's values are read as on the command line (upstream takes any), misspelt keys of ours "
          "are named"),
    Patch(("run",), f"{_ARGS}:verify_training_args", ("args",), flags.verify,
          "checks the flags before any model is loaded"),
    Patch(("run",), "accelerate.accelerator:Accelerator.backward", ("self", "loss"), SESSION.backward,
          "stops a step in which a fix that is on was not reached"),
    Patch(("run",), "accelerate.accelerator:Accelerator.save_state", ("self", "output_dir"),
          checkpoint.save_state, "state folders know their schedule"),
    Patch(("run",), "accelerate.accelerator:Accelerator.load_state", ("self", "input_dir"),
          checkpoint.load_state, "and are resumed on no other"),

    Patch(("schedule",), f"{_FUNCTIONS}:prepare_scheduler_for_custom_training", ("noise_scheduler", "device"),
          schedule.prepare,
          "one schedule for betas, alphas_cumprod, SNR table and noising (upstream keeps the SNR table of "
          "the old one)"),
    Patch(("schedule",), f"{_FUNCTIONS}:fix_noise_scheduler_betas_for_zero_terminal_snr",
          ("noise_scheduler",), schedule.rescale, "the same, whichever of the two comes last"),

    # before the rows of the same functions, which go around them
    Patch(("speed",), f"{_LOSS}:get_noise_noisy_latents_and_timesteps",
          ("args", "noise_scheduler", "latents"), waits.noised,
          "the schedule's table stays on the GPU (upstream fetches it in every step)"),
    Patch(("speed",), f"{_LOSS}:get_timesteps", ("min_timestep", "max_timestep", "b_size", "device"),
          waits.timesteps, "timesteps are sent without waiting", exact=True),
    Patch(("speed",), "library.sdxl_train_util:timestep_embedding", ("timesteps", "dim"), waits.embedding,
          "frequencies of the size embedding are made on the GPU", only=_LOOPS),
    Patch(("speed",), "train_network:NetworkTrainer.process_batch", ("self", "batch"), waits.batch,
          "NaN in latents is mended without looking", only=("sdxl_train_network.py",)),
    Patch(("speed",), f"{_UNET}:BasicTransformerBlock.forward_body", ("self", "hidden_states"), speed.block,
          "transformer blocks, compiled", only=_LOOPS),
    Patch(("speed",), "accelerate.accelerator:Accelerator.prepare_optimizer", ("self", "optimizer"),
          speed.prepare_optimizer, "fused AdamW"),
    Patch(("speed",), "accelerate.accelerator:Accelerator.load_state", ("self",), speed.load_state,
          "after a state is loaded, too"),

    Patch(("schedule", *_LOSSES, "noise", "validation"), f"{_LOSS}:get_noise_noisy_latents_and_timesteps",
          ("args", "noise_scheduler", "latents"), noise.noised,
          "tells the step its timesteps, and of flow the network T s and the loss its target; "
          "random input perturbation draws a strength per sample (upstream: "
          "one for the batch)"),
    Patch(("timesteps",), f"{_LOSS}:get_timesteps", ("min_timestep", "max_timestep", "b_size", "device"),
          timesteps.draw, "timesteps from the run's sampler"),

    Patch(_LOSSES, f"{_LOSS}:conditional_loss", ("model_pred", "target", "loss_type", "reduction", "huber_c"),
          loss.conditional_loss,
          "the step's loss: Huber that does not cancel to 0, delta, SNR and importance weights from the one "
          "schedule", exact=True),
    Patch(_LOSSES, f"{_FUNCTIONS}:apply_masked_loss", ("loss", "batch"), loss.masked, "the same under a mask",
          exact=True, only=_MASKS),
    Patch(("loss",), f"{_LOSS}:get_huber_threshold_if_needed", ("args", "timesteps", "noise_scheduler"),
          loss.threshold,
          "delta from the one schedule (upstream's stops on a GPU with v-prediction, and forgets "
          "--huber_scale)"),
    Patch(("loss",), "train_network:NetworkTrainer.process_batch", ("self", "batch"), loss.batch,
          "the loss weights of a LoRA's regularisation images, for --huber_l2_gradient batch",
          only=("sdxl_train_network.py",)),

    Patch(("weighting",), f"{_FUNCTIONS}:apply_snr_weight", (*_WEIGHT, "gamma"), loss.weighted,
          "the loss has min-SNR already, finite at SNR 0, one lookup per batch"),
    Patch(("weighting",), f"{_FUNCTIONS}:apply_debiased_estimation", _WEIGHT, loss.weighted,
          "the same for debiased estimation"),
    Patch(("weighting",), f"{_FUNCTIONS}:scale_v_prediction_loss_like_noise_prediction", _WEIGHT,
          loss.weighted, "the same"),
    Patch(("weighting",), f"{_FUNCTIONS}:add_v_prediction_like_loss", (*_WEIGHT, "v_pred_like_loss"),
          loss.weighted, "the same"),

    Patch(("buckets",), "library.config_util:generate_dataset_group_by_blueprint",
          ("dataset_group_blueprint",), buckets.datasets,
          "batches of equal aspect and prompt chunks, tokens cut at the longest of the batch"),
    Patch(("buckets",), f"{_DATA}:collator_class.__init__", ("self", "epoch", "step", "dataset"),
          buckets.collator, "an epoch's first batches are its own (upstream: the last epoch's)"),
    Patch(("buckets",), f"{_SDXL}:SdxlTextEncodingStrategy._get_hidden_states_sdxl",
          ("self", "input_ids1", "input_ids2"), prompts.hidden_states, "--chunk_layout"),
    Patch(("buckets",), f"{_SDXL}:SdxlTextEncodingStrategy.encode_tokens_with_weights",
          ("self", "tokenize_strategy", "models", "tokens_list", "weights_list"), prompts.encode_with_weights,
          "--chunk_layout, with emphasis", exact=True),
    Patch(("buckets",), f"{_SDXL}:SdxlTextEncoderOutputsCachingStrategy.cache_batch_outputs",
          ("self", "tokenize_strategy", "models", "text_encoding_strategy", "infos"), prompts.cache_outputs,
          "caches prompts of equal chunks together", exact=True),
    Patch(("buckets",), f"{_PIPELINE}:SdxlStableDiffusionLongPromptWeightingPipeline.__call__",
          ("self", "prompt", "negative_prompt"), prompts.preview,
          "previews give prompt and negative prompt the chunks of the longer one"),

    # before the next row, which then is told of the trained call alone, and tells flow's timesteps first
    Patch(("keep",), f"{_UNET}:SdxlUNet2DConditionModel.forward", ("self", "x", "timesteps"), keep.called,
          "the frozen base is asked first"),
    Patch(("keep",), "accelerate.accelerator:Accelerator.load_state", ("self",), keep.load_state,
          "which is no resumed state's"),

    Patch(("schedule", "validation", "heldout"), f"{_UNET}:SdxlUNet2DConditionModel.forward",
          ("self", "x", "timesteps"), validation.called,
          "flow's timesteps come unrounded; the first images are kept, with their conditioning"),
    # before the next row, which goes around it: what is held out is encoded at a resumed beginning, too
    Patch(("resume",), f"{_SAMPLING}:sample_images_common",
          ("pipe_class", "accelerator", "args", "epoch", "steps"), resume.sampled,
          "no preview of a beginning that is none"),
    Patch(("validation", "heldout", "ema"), f"{_SAMPLING}:sample_images_common",
          ("pipe_class", "accelerator", "args", "epoch", "steps"), validation.step_done,
          "their loss is computed and logged after the optimizer step, the weights' average updated"),

    # after it: what the step before has lost is said first
    Patch(("speed",), f"{_SAMPLING}:sample_images_common",
          ("pipe_class", "accelerator", "args", "epoch", "steps"), waits.sampled,
          "the loss of the step before is read and logged"),

    Patch(("heldout",), "library.config_util:generate_dataset_group_by_blueprint",
          ("dataset_group_blueprint",), heldout.datasets, "which pictures are not trained on"),
    Patch(("heldout",), f"{_DATA}:DatasetGroup.new_cache_text_encoder_outputs",
          ("self", "models", "accelerator"), heldout.cache_text,
          "their captions, while there are text encoders"),

    Patch(("run", "resume", "speed"), "train_network:NetworkTrainer.train", ("self", "args"), edits.train,
          "its loop begins where a state was saved, and reads its losses when they are there",
          only=("sdxl_train_network.py",)),
    # before the next row, which makes the loader anew
    Patch(("speed",), "accelerate.accelerator:Accelerator.prepare_data_loader", ("self", "data_loader"),
          waits.prepare_data_loader, "batches come from pinned memory"),
    Patch(("resume",), "accelerate.accelerator:Accelerator.prepare_data_loader", ("self", "data_loader"),
          resume.prepare_data_loader,
          "the order of the data, and every batch's random numbers, follow from seed and epoch"),
    Patch(("resume",), "accelerate.accelerator:Accelerator.backward", ("self", "loss"), resume.backward,
          "states know the loss of the step that they are saved in"),

    Patch(("previews",), f"{_SAMPLING}:get_my_scheduler", ("sample_sampler", "v_parameterization"),
          previews.scheduler,
          "previews sample the trained schedule, trailing, x0 not clipped (upstream: SDXL's own, leading, "
          "clipped at 1)"),

    Patch(("previews",), f"{_PIPELINE}:SdxlStableDiffusionLongPromptWeightingPipeline.__call__",
          ("self", "prompt", "negative_prompt"), previews.called, "none is made with another scheduler"),

    Patch(("saving",), f"{_SAVING}:get_sai_model_spec", ("state_dict", "args"), checkpoint.model_spec,
          "the schedule's record and prediction type in the metadata"),
    Patch(("saving",), f"{_MODELS}:save_file", ("tensors", "filename"), checkpoint.save_file,
          "marker tensors v_pred and ztsnr, where they say the truth; beside the file a scheduler config",
          only=("sdxl_train.py",)),
    Patch(("saving",), f"{_FILES}:save_sd_model_on_epoch_end_or_stepwise_common", ("args", "on_epoch_end"),
          checkpoint.save_and_remove, "which goes with a file that is removed", only=("sdxl_train.py",)),
    Patch(("saving",), "library.huggingface_util:upload", ("args", "src", "dest_suffix"), checkpoint.upload,
          "and with one that is uploaded", only=("sdxl_train.py",)),
    Patch(("saving",), f"{_MODELS}:save_diffusers_checkpoint", ("output_dir",), checkpoint.save_folder,
          "diffusers folders get the trained scheduler (upstream: the source's)", only=("sdxl_train.py",)),

    # after the rows of saving, which then act on both files
    Patch(("ema",), f"{_MODELS}:save_stable_diffusion_checkpoint", ("output_file",), ema.save,
          "the weights' average beside every model", only=("sdxl_train.py",)),
    Patch(("ema",), f"{_MODELS}:save_diffusers_checkpoint", ("output_dir",), ema.save,
          "the same of a folder", only=("sdxl_train.py",)),
)
# fmt: on
