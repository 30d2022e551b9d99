"""The training run that the patches serve: the fixes for diffusers' scripts, and their arguments as settings."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection
from typing import Any

from sdxl_fixes.flags import FlagError, Settings
from sdxl_fixes.prediction import check_prediction_type
from sdxl_fixes.schedule import NoiseSchedule
from sdxl_fixes.trainers import run as core
from sdxl_fixes.trainers.patching import PatchSet
from sdxl_fixes.trainers.run import Fix, Run, Session, Trainer


def departs(args: argparse.Namespace, settings: Settings) -> bool:
    """Whether training leaves the base model's schedule or prediction type."""
    return settings.changes_schedule or getattr(args, "prediction_type", None) not in (None, getattr(args, "base_prediction_type", None))


def caches_may_lie(args: argparse.Namespace, settings: Settings) -> bool:
    """Whether what the script keeps for later may be something else than it takes it for."""
    columns = getattr(args, "caption_column", None) not in (None, "text") or getattr(args, "image_column", None) not in (None, "image")
    cached_text = hasattr(args, "proportion_empty_prompts")
    asked = args.checked_caches or args.max_token_length or args.true_crop_coordinates or columns
    return bool(asked) if cached_text else bool(getattr(args, "cache_latents", False))


_SCHEDULE = "--zero_terminal_snr, --terminal_sigma, --prediction_type"
FIXES = {
    "schedule": Fix(_SCHEDULE, departs, core.describe_schedule, every_step=True),
    "loss": Fix("--loss_type huber, smooth_l1, l1", lambda args, settings: settings.loss_type != "l2", core.describe_loss, every_step=True),
    "weighting": Fix(
        "--snr_gamma, --soft_min_snr_gamma, --debiased_estimation_loss",
        lambda args, settings: bool(settings.weightings()),
        core.describe_weighting,
        every_step=True,
    ),
    "noise": Fix(
        "--ip_noise_gamma, --float32_noising",
        lambda args, settings: settings.perturbation() is not None or args.float32_noising,
        lambda run: f"float32 arithmetic, {run.settings.perturbation() or 'no perturbation'}",
        every_step=True,
    ),
    "timesteps": Fix(
        "--stratified_timesteps, --terminal_timestep_share",
        lambda args, settings: bool(settings.stratified_timesteps or settings.terminal_timestep_share),
        core.describe_timesteps,
        every_step=True,
    ),
    "validation": Fix(
        "--stable_loss_steps",
        core.wants_stable_loss,
        lambda run: core.describe_validation(run, any(getattr(run.args, f"train_text_encoder{end}", False) for end in ("", "_ti"))),
        every_step=True,
    ),
    "prompts": Fix(
        "--max_token_length",
        lambda args, settings: bool(args.max_token_length),
        lambda run: f"captions of up to {run.args.max_token_length} tokens, 75 to a chunk",
        every_step=True,
    ),
    "buckets": Fix(
        "--chunk_buckets",
        lambda args, settings: args.chunk_buckets,
        lambda run: "captions of equally many chunks to a batch",
        every_step=True,
    ),
    "crops": Fix(
        "--true_crop_coordinates",
        lambda args, settings: args.true_crop_coordinates,
        lambda run: "the crop that was encoded",
        every_step=True,
    ),
    "caches": Fix(
        "--checked_caches; also on with --max_token_length, --true_crop_coordinates, another --caption_column, --cache_latents",
        caches_may_lie,
        lambda run: "what is kept belongs to what it is used for",
        every_step=True,
    ),
    "previews": Fix(_SCHEDULE, departs, core.describe_previews),
    "saving": Fix(_SCHEDULE, departs, lambda run: "the schedule's record in unet, ControlNet and LoRA files and in checkpoints"),
}
DIFFUSERS = Trainer(
    name="huggingface/diffusers example",
    v_flag="--prediction_type v_prediction",
    fixes=FIXES,
    flag_fixes={
        "zero_terminal_snr": "schedule",
        "terminal_sigma": "schedule",
        "loss_type": "loss",
        "huber_l2_gradient": "loss",
        "min_snr_floor": "weighting",
        "soft_min_snr_gamma": "weighting",
        "debiased_estimation_loss": "weighting",
        "ip_noise_gamma": "noise",
        "float32_noising": "noise",
        "stratified_timesteps": "timesteps",
        "terminal_timestep_share": "timesteps",
        "stable_loss_steps": "validation",
        "max_token_length": "prompts",
        "chunk_buckets": "buckets",
        "true_crop_coordinates": "crops",
        "checked_caches": "caches",
    },
)


class ScriptSession(Session):
    """A session that knows its script: patched library functions act only for calls that come from it."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """No script, no run."""
        self.patches, self.run = PatchSet(()), None
        self.script: dict[str, Any] = {}  # the globals of the script's module
        self.training = False  # whether the script has its training scheduler

    def called_by_script(self) -> bool:
        """Whether the nearest function on the stack that is not ours belongs to the script."""
        return caller() is self.script


def caller() -> dict[str, Any]:
    """The globals of the nearest function on the stack that is not ours."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("sdxl_fixes"):
        frame = frame.f_back
    return frame.f_globals


SESSION = ScriptSession()


def start(args: argparse.Namespace, patches: PatchSet) -> Run:
    """The run that a script's parsed arguments describe. Raises FlagError, before any model is loaded, for flags that make no sense.

    The base model's scheduler config, which is read when a flag of ours is used, is the schedule that the flags change.
    """
    known = argparse.Namespace(**{**vars(args), "min_snr_gamma": args.snr_gamma})
    settings = Settings.from_args(known)
    asked = [name for name, fix in FIXES.items() if fix.wanted(known, settings)]
    base, known.base_prediction_type, edm = _base(args) if asked else (None, "epsilon", False)
    if edm and "schedule" in asked:
        raise FlagError(f"{args.pretrained_model_name_or_path} is an EDM model with sigmas of its own: leave out {_SCHEDULE}")
    if edm or getattr(args, "do_edm_style_training", False):
        refuse_edm(asked)
    weighting = settings.weighting()
    if args.max_token_length is not None and args.max_token_length <= 75:
        raise FlagError(f"--max_token_length {args.max_token_length}: expected more than the 75 tokens that upstream has (150, 225, ...)")
    if args.chunk_buckets and not args.max_token_length:
        raise FlagError("--chunk_buckets needs --max_token_length 150, 225, ...: at 75 tokens every caption is one chunk")
    if args.chunk_buckets and hasattr(args, "instance_prompt"):
        raise FlagError(
            "--chunk_buckets does not fit the DreamBooth scripts, which make their batches of class and instance prompts: leave it out"
        )
    prediction_type = args.prediction_type or known.base_prediction_type
    if settings.stable_loss_steps and prediction_type not in ("epsilon", "v_prediction"):
        raise FlagError(f"--stable_loss_steps knows the loss of epsilon and v_prediction, not of {prediction_type}: leave it out")
    if getattr(args, "timestep_bias_strategy", "none") != "none" and FIXES["timesteps"].wanted(known, settings):
        raise FlagError(
            f"--timestep_bias_strategy {args.timestep_bias_strategy} draws the timesteps its own way: leave it out, or "
            "--stratified_timesteps and --terminal_timestep_share"
        )
    return Run.start(
        DIFFUSERS,
        known,
        settings,
        patches,
        prediction_type,
        settings.schedule(base),
        () if weighting is None else (weighting,),
        resumed=bool(getattr(args, "resume_from_checkpoint", None)),
    )


def refuse_edm(fixes: Collection[str]) -> None:
    """Raise FlagError if one of ``fixes`` does not apply to EDM-style training, which noises and weights its own loss by sigma."""
    refused = [name for name in ("loss", "weighting", "noise", "timesteps", "validation") if name in fixes]
    if refused:
        raise FlagError(
            f"EDM-style training noises by sigma and weights its own loss by sigma, so {', '.join(refused)} cannot be had there: leave "
            "out --loss_type, --snr_gamma, --ip_noise_gamma and the like, or train without --do_edm_style_training"
        )


def _base(args: argparse.Namespace) -> tuple[NoiseSchedule | None, str, bool]:
    """The base model's schedule (None if it has no betas), its prediction type, and whether it is trained EDM-style."""
    from diffusers import DDPMScheduler

    where = args.pretrained_model_name_or_path
    try:
        config = DDPMScheduler.load_config(where, subfolder="scheduler", revision=getattr(args, "revision", None))
        edm = "EDM" in config.get("_class_name", "")
        schedule = None if edm else NoiseSchedule.from_config(config)
        return schedule, check_prediction_type(config.get("prediction_type", "epsilon")), edm
    except (OSError, ValueError) as error:
        raise FlagError(f"--pretrained_model_name_or_path {where}: no noise schedule in its scheduler folder ({error})") from error
