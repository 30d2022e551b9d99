"""Every patch of sd-scripts, in one table (v0.10.0 to main). ``run`` carries the flags and is applied whatever fixes are on."""

from __future__ import annotations

from sdxl_fixes.trainers.patching import Patch

from . import buckets, checkpoint, flags, loss, noise, previews, prompts, schedule, timesteps, validation, weighting

_FUNCTIONS, _UTIL, _MODELS = "library.custom_train_functions", "library.train_util", "library.sdxl_model_util"
_SDXL, _PIPELINE, _UNET = "library.strategy_sdxl", "library.sdxl_lpw_stable_diffusion", "library.sdxl_original_unet"
_WEIGHT = ("loss", "timesteps", "noise_scheduler")

# What came with v0.10.0; below it the trainers pass other values between the same functions, so nothing is patched at all.
NEEDED = Patch("run", f"{_UTIL}:get_huber_threshold_if_needed", ("args", "timesteps", "noise_scheduler"), loss.threshold, "")

# fmt: off
PATCHES = (
    Patch("run", f"{_FUNCTIONS}:add_custom_train_arguments", ("parser",), flags.add_arguments, "adds the flags"),
    Patch("run", f"{_UTIL}:read_config_from_file", ("args", "parser"), flags.read_config,
          "a TOML file's values are read as on the command line (upstream takes any), misspelt keys of ours are named"),
    Patch("run", f"{_UTIL}:verify_training_args", ("args",), flags.verify, "checks the flags before any model is loaded"),
    Patch("run", f"{_UTIL}:LossRecorder.add", ("self",), flags.step_done, "stops after the first step if a fix was never reached"),

    Patch("schedule", f"{_FUNCTIONS}:prepare_scheduler_for_custom_training", ("noise_scheduler", "device"), schedule.prepare,
          "one schedule for betas, alphas_cumprod, SNR table and noising (upstream keeps the SNR table of the old one)"),
    Patch("schedule", f"{_FUNCTIONS}:fix_noise_scheduler_betas_for_zero_terminal_snr", ("noise_scheduler",), schedule.rescale,
          "the same, whichever of the two comes last"),

    Patch("loss", f"{_UTIL}:get_huber_threshold_if_needed", ("args", "timesteps", "noise_scheduler"), loss.threshold,
          "delta from that schedule, on the timesteps' device; --huber_scale counts in every --huber_schedule"),
    Patch("loss", f"{_UTIL}:conditional_loss", ("model_pred", "target", "loss_type", "reduction", "huber_c"), loss.conditional_loss,
          "the form that does not cancel to 0 for small errors", exact=True),

    Patch("weighting", f"{_FUNCTIONS}:apply_snr_weight", (*_WEIGHT, "gamma"), weighting.min_snr,
          "min-SNR from that schedule, finite at SNR 0, one lookup per batch"),
    Patch("weighting", f"{_FUNCTIONS}:apply_debiased_estimation", _WEIGHT, weighting.debiased, "the same for debiased estimation"),
    Patch("weighting", f"{_FUNCTIONS}:scale_v_prediction_loss_like_noise_prediction", _WEIGHT, weighting.epsilon_like, "the same"),
    Patch("weighting", f"{_FUNCTIONS}:add_v_prediction_like_loss", (*_WEIGHT, "v_pred_like_loss"), weighting.plus_v_like, "the same"),

    Patch("noise", f"{_UTIL}:get_noise_noisy_latents_and_timesteps", ("args", "noise_scheduler", "latents"), noise.noise_and_timesteps,
          "random input perturbation draws a strength per sample (upstream: one for the batch)"),

    Patch("timesteps", f"{_UTIL}:get_timesteps", ("min_timestep", "max_timestep", "b_size", "device"), timesteps.draw,
          "timesteps from the run's sampler"),
    Patch("timesteps", f"{_UTIL}:conditional_loss", ("model_pred", "target", "loss_type", "reduction", "huber_c"), loss.importance,
          "the importance weight that keeps the expected loss unchanged"),

    Patch("buckets", "library.config_util:generate_dataset_group_by_blueprint", ("dataset_group_blueprint",), buckets.datasets,
          "batches of equal aspect and prompt chunks, tokens cut at the longest of the batch"),
    Patch("buckets", f"{_UTIL}:collator_class.__init__", ("self", "epoch", "step", "dataset"), buckets.collator,
          "an epoch's first batches are its own (upstream: the last epoch's)"),
    Patch("buckets", f"{_SDXL}:SdxlTextEncodingStrategy._get_hidden_states_sdxl", ("self", "input_ids1", "input_ids2"),
          prompts.hidden_states, "--chunk_layout"),
    Patch("buckets", f"{_SDXL}:SdxlTextEncodingStrategy.encode_tokens_with_weights",
          ("self", "tokenize_strategy", "models", "tokens_list", "weights_list"), prompts.encode_with_weights,
          "--chunk_layout, with emphasis", exact=True),
    Patch("buckets", f"{_SDXL}:SdxlTextEncoderOutputsCachingStrategy.cache_batch_outputs",
          ("self", "tokenize_strategy", "models", "text_encoding_strategy", "infos"), prompts.cache_outputs,
          "caches prompts of equal chunks together", exact=True),
    Patch("buckets", f"{_PIPELINE}:SdxlStableDiffusionLongPromptWeightingPipeline.__call__", ("self", "prompt", "negative_prompt"),
          prompts.preview, "previews give prompt and negative prompt the chunks of the longer one"),

    Patch("validation", f"{_UTIL}:get_noise_noisy_latents_and_timesteps", ("args", "noise_scheduler", "latents"), validation.noised,
          "the first images are kept"),
    Patch("validation", f"{_UNET}:SdxlUNet2DConditionModel.forward", ("self", "x", "timesteps"), validation.called,
          "with their conditioning"),
    Patch("validation", f"{_UTIL}:sample_images_common", ("pipe_class", "accelerator", "args", "epoch", "steps"), validation.step_done,
          "their loss is computed and logged after the optimizer step"),

    Patch("previews", f"{_UTIL}:get_my_scheduler", ("sample_sampler", "v_parameterization"), previews.scheduler,
          "previews sample the trained schedule, trailing, x0 not clipped (upstream: SDXL's own, leading, clipped at 1)"),

    Patch("saving", f"{_UTIL}:get_sai_model_spec", ("state_dict", "args"), checkpoint.model_spec,
          "the schedule's record and prediction type in the metadata"),
    Patch("saving", f"{_MODELS}:save_file", ("tensors", "filename"), checkpoint.save_file,
          "marker tensors v_pred and ztsnr, where they say the truth"),
    Patch("saving", f"{_MODELS}:save_diffusers_checkpoint", ("output_dir",), checkpoint.save_folder,
          "diffusers folders get the trained scheduler (upstream: the source's)"),
)
# fmt: on
