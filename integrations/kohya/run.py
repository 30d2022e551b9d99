"""The training run that the patches serve: kohya's fixes, and kohya's arguments as settings."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from sdxl_fixes.checkpoint import Sampling
from sdxl_fixes.flags import Settings
from sdxl_fixes.loss import HUBER_KINDS, HUBER_SCHEDULES, LOSS_TYPES
from sdxl_fixes.model_file import said_sampling
from sdxl_fixes.trainers import run as core
from sdxl_fixes.trainers.patching import PatchSet
from sdxl_fixes.trainers.run import Fix, Run, Session, Trainer
from sdxl_fixes.weighting import EpsilonLike, PlusVLike, Weighting


def weightings(args: argparse.Namespace, settings: Settings) -> tuple[Weighting, ...]:
    """Every weighting of the loss that kohya's flags ask for; it multiplies them."""
    found = list(settings.weightings().values())
    if getattr(args, "scale_v_pred_loss_like_noise_pred", False):
        found.append(EpsilonLike())
    if amount := getattr(args, "v_pred_like_loss", None):
        found.append(PlusVLike(amount))
    return tuple(found)


def base_sampling(args: argparse.Namespace) -> Sampling | None:
    """What the model that is trained says about its schedule, if it says anything (a name on the Hugging Face Hub says nothing here)."""
    name = getattr(args, "pretrained_model_name_or_path", None)
    return said_sampling(Path(name)) if name and Path(name).exists() else None


def trains_text(args: argparse.Namespace) -> bool:
    """Whether a text encoder is trained, so that embeddings change."""
    if hasattr(args, "network_module"):
        return not (args.network_train_unet_only or args.cache_text_encoder_outputs)
    return bool(getattr(args, "train_text_encoder", False))


FIXES = {
    "schedule": Fix(
        "--zero_terminal_snr, --terminal_sigma", lambda args, settings: settings.changes_schedule, core.describe_schedule, every_step=True
    ),
    "loss": Fix(
        "--loss_type huber, smooth_l1", lambda args, settings: settings.loss_type in HUBER_KINDS, core.describe_loss, every_step=True
    ),
    "weighting": Fix(
        "--min_snr_gamma, --debiased_estimation_loss, --v_pred_like_loss, --scale_v_pred_loss_like_noise_pred",
        lambda args, settings: bool(weightings(args, settings)),
        core.describe_weighting,
        every_step=True,
    ),
    "noise": Fix(
        "--ip_noise_gamma_random_strength",
        lambda args, settings: settings.perturbation() is not None and settings.ip_noise_gamma_random_strength,
        lambda run: repr(run.settings.perturbation()),
        every_step=True,
    ),
    "timesteps": Fix(
        "--stratified_timesteps, --terminal_timestep_share",
        lambda args, settings: bool(settings.stratified_timesteps or settings.terminal_timestep_share),
        core.describe_timesteps,
        every_step=True,
    ),
    "buckets": Fix(
        "--chunk_buckets",
        lambda args, settings: bool(getattr(args, "chunk_buckets", False)),
        lambda run: f"aspect x chunk, prompts of at most {run.args.max_token_length} tokens, {run.args.chunk_layout or '75n+2'} vectors",
        every_step=True,
    ),
    "validation": Fix(
        "--stable_loss_steps",
        core.wants_stable_loss,
        lambda run: core.describe_validation(run, trains_text(run.args)),
        every_step=True,
    ),
    "previews": Fix("--zero_terminal_snr, --terminal_sigma", lambda args, settings: settings.changes_schedule, core.describe_previews),
    "saving": Fix(
        "--zero_terminal_snr, --terminal_sigma, --v_parameterization; or a base model that has a schedule record or marker",
        lambda args, settings: bool(settings.changes_schedule or getattr(args, "v_parameterization", False) or base_sampling(args)),
        core.describe_saving,
    ),
}
KOHYA = Trainer(
    name="kohya-ss/sd-scripts",
    v_flag="--v_parameterization",
    fixes=FIXES,
    flag_fixes={
        "terminal_sigma": "schedule",
        "huber_l2_gradient": "loss",
        "min_snr_floor": "weighting",
        "stratified_timesteps": "timesteps",
        "terminal_timestep_share": "timesteps",
        "chunk_buckets": "buckets",
        "stable_loss_steps": "validation",
    },
)
SESSION = Session()


def start(args: argparse.Namespace, patches: PatchSet) -> Run:
    """The run that kohya's parsed arguments describe. Raises FlagError, before any model is loaded, for flags that make no sense."""
    settings = Settings.from_args(_known(args))
    run = Run.start(
        KOHYA,
        args,
        settings,
        patches,
        "v_prediction" if getattr(args, "v_parameterization", False) else "epsilon",
        settings.schedule(),
        weightings(args, settings),
        resumed=bool(getattr(args, "resume", None)),
        min_timestep=getattr(args, "min_timestep", None) or 0,
        max_timestep=getattr(args, "max_timestep", None),
    )
    base, trained = base_sampling(args), Sampling(run.schedule, run.prediction_type)
    if base not in (None, trained) and os.environ.get("RANK", "0") == "0":
        print(
            f"  WARNING: {args.pretrained_model_name_or_path} says that it is sampled as {base}, and your flags train {trained}: "
            f"the saved model will say what was trained; {_flags_for(base)}",
            file=sys.stderr,
            flush=True,
        )
    return run


def _flags_for(base: Sampling) -> str:
    """The flags that train on as ``base`` was, or what they cannot do."""
    words = ["--v_parameterization"] if base.prediction_type == "v_prediction" else []
    step, sigma = base.schedule.recipe[-1], base.schedule.terminal_sigma
    settings = Settings()
    if base.schedule.residual_signal == 0:
        settings, words = Settings(zero_terminal_snr=True), [*words, "--zero_terminal_snr"]
    elif base.schedule != settings.schedule():
        method, start = str(step.get("method", "beta_end")), step.get("start")
        settings = Settings(terminal_sigma=float(f"{sigma:.6g}"), terminal_sigma_method=method, terminal_sigma_start=start)
        words += [f"--terminal_sigma {sigma:.6g}", f"--terminal_sigma_method {method}"]
        words += [] if start is None else [f"--terminal_sigma_start {start}"]
    if base.prediction_type not in ("epsilon", "v_prediction") or settings.schedule() != base.schedule:
        return "no flags of this trainer train on as the base was trained"
    return "to go on as the base was trained, " + (
        f"give {' '.join(words)}" if words else "leave the schedule's flags and v_parameterization out"
    )


def _known(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments without a fork's own losses, which stay the fork's."""
    known = argparse.Namespace(**vars(args))
    if getattr(args, "loss_type", "l2") not in LOSS_TYPES or getattr(args, "huber_schedule", "snr") not in HUBER_SCHEDULES:
        known.loss_type, known.huber_schedule = "l2", "snr"
    return known
