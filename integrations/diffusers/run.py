"""The training run that the patches serve: the fixes for diffusers' scripts, and what their arguments make of
them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxl_fixes.checkpoint import Sampling, sampling_of_config
from sdxl_fixes.command_line import Flag
from sdxl_fixes.errors import FlagError
from sdxl_fixes.flags import TrainingFlags
from sdxl_fixes.log import warn
from sdxl_fixes.model_files.header import FormatError
from sdxl_fixes.model_files.model_file import read_sampling
from sdxl_fixes.names import FLOW, check_prediction_type
from sdxl_fixes.schedule import NoiseSchedule
from sdxl_fixes.trainers.base import STOCK, Base, check_flags, hub_config, read_base, read_teacher
from sdxl_fixes.trainers.fixes import (
    TIMESTEP_FLAGS,
    TIMESTEP_OPTIONS,
    Fix,
    allowed,
    given,
    switch_off,
)
from sdxl_fixes.trainers.patching import PatchSet
from sdxl_fixes.trainers.report import lost_above, tell
from sdxl_fixes.trainers.run import Run, Trainer, prepare
from sdxl_fixes.trainers.session import Session

from .scripts import version

if TYPE_CHECKING:
    from accelerate import Accelerator


def departs(args: argparse.Namespace) -> bool:
    """Whether training leaves the base model's schedule or prediction type; with a base that decides, whether
    it is on another schedule than SDXL's own, or than its scheduler config says."""
    if (base := getattr(args, "base_that_decides", None)) is not None:
        config = Sampling(args.base_schedule, args.base_prediction_type)
        return bool(base.sampling != config or config.schedule != STOCK.schedule)
    changed = given(args, "zero_terminal_snr") or getattr(args, "terminal_sigma", None) is not None
    predicts, base = (getattr(args, name, None) for name in ("prediction_type", "base_prediction_type"))
    # the scripts know no flow, whatever the base
    return changed or FLOW in (predicts, base) or predicts not in (None, base)


def worth_saying(args: argparse.Namespace) -> bool:
    """Whether saved files must say how they are sampled."""
    base = getattr(args, "base_that_decides", None)
    return departs(args) or (base is not None and base.sampling != STOCK)


def caches_may_lie(args: argparse.Namespace) -> bool:
    """Whether what the script keeps for later may be something else than it takes it for."""
    columns = getattr(args, "caption_column", None) not in (None, "text") or getattr(
        args, "image_column", None
    ) not in (None, "image")
    cached_text = hasattr(args, "proportion_empty_prompts")
    asked = args.checked_caches or args.max_token_length or args.true_crop_coordinates or columns
    return bool(asked) if cached_text else bool(getattr(args, "cache_latents", args.checked_caches))


FIXES = {
    "schedule": Fix(
        {"zero_terminal_snr": None, "terminal_sigma": None, "prediction_type": None, "match_base": None},
        options=("terminal_sigma_method", "terminal_sigma_start", "flow_shift"),
        parts={"trains_flow": "UNet2DConditionModel.forward", "trains_velocity": "get_velocity"},
        wanted=departs,
    ),
    "loss": Fix(
        {"loss_type": ("huber", "smooth_l1", "l1")},
        options=("huber_schedule", "huber_c", "huber_scale", "huber_l2_gradient"),
    ),
    "weighting": Fix(
        dict.fromkeys(("snr_gamma", "soft_min_snr_gamma", "debiased_estimation_loss", "flow_weighting")),
        options=("min_snr_floor",),
        parts={"trains_velocity": "get_velocity"},
    ),
    "noise": Fix(
        {"ip_noise_gamma": None, "float32_noising": None}, options=("ip_noise_gamma_random_strength",)
    ),
    "timesteps": Fix(
        TIMESTEP_FLAGS,
        options=TIMESTEP_OPTIONS,
        parts=dict.fromkeys(("terminal_timestep_share", "timestep_density_weighted"), "mse_loss"),
    ),
    "keep": Fix({"keep_base": None}),
    "validation": Fix({"stable_loss_steps": None}, options=("stable_loss_images",)),
    "heldout": Fix({"heldout_steps": None}, options=("heldout_dir",)),
    "ema": Fix({"ema_decay": None}, options=("ema_evaluated",), due="later"),
    "prompts": Fix({"max_token_length": None}, due="start"),
    "buckets": Fix({"chunk_buckets": None}, due="start"),
    "crops": Fix({"true_crop_coordinates": None}, due="start"),
    "caches": Fix({"checked_caches": None}, due="start", wanted=caches_may_lie),
    "previews": Fix(due="later", wanted=departs),
    "saving": Fix(due="later", wanted=worth_saying),
}
TRAINS = ("epsilon", "v_prediction", FLOW)
# fixes that look up at each sample's timestep
BY_TIMESTEP = frozenset(("loss", "weighting", "timesteps", "keep"))
# fixes that have no place in EDM-style training
TRAINING = ("loss", "weighting", "noise", "timesteps", "keep", "validation", "heldout")
DIFFUSERS = Trainer(
    name="huggingface/diffusers example", v_flag="--prediction_type v_prediction", fixes=FIXES
)


class ScriptSession(Session):
    """A session that knows its script: patched library functions act only for calls that come from it."""

    def __init__(self) -> None:
        super().__init__("script")

    def reset(self) -> None:
        """No script, no run."""
        super().reset()
        self.trim, self.chunks, self.cut = True, list[int](), (0, 0)  # of prompts: for prompts.py
        self.script: dict[str, Any] = {}  # the globals of the script's module
        self.training = False  # whether the script has its training scheduler
        self.accelerator: Accelerator | None = None  # that the script trains with
        self.drawing = False  # whether the run's sampler draws timesteps

    def _look(self) -> str:
        return f"sdxl-fixes doctor {self.script.get('__file__', 'SCRIPT')} tells more"

    def called_by_script(self) -> bool:
        """Whether the nearest function on the stack that is not ours belongs to the script."""
        return caller() is self.script


def without_them(run: Run) -> str:
    """The value of --fixes for a script in which the timesteps of a loss are not known."""
    return ",".join(("all", *(f"-{fix}" for fix in sorted(run.on & BY_TIMESTEP))))


def caller() -> dict[str, Any]:
    """The globals of the nearest function on the stack that is not ours."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("sdxl_fixes"):
        frame = frame.f_back
    return frame.f_globals


SESSION = ScriptSession()


def start(
    args: argparse.Namespace,
    patches: PatchSet,
    ours: Mapping[str, Flag] | None = None,
    sigma_space: bool = False,
) -> Run:
    """The run that a script's parsed arguments describe, after it was reported. ``ours`` are flags that the
    script does not have itself, ``sigma_space`` is whether it noises by sigma and knows no other way. Raises
    FlagError, before any model is loaded, for flags that make no sense.

    The base model's scheduler config, which is read when a flag of ours is used, is the schedule that the
    flags change.
    """
    may_act = allowed(args.fixes, FIXES)
    dropped = switch_off(FIXES, may_act, ours or {}, args)
    known = argparse.Namespace(**{**vars(args), "min_snr_gamma": args.snr_gamma})
    flags = TrainingFlags.from_args(known) if may_act else TrainingFlags()
    known.base_prediction_type = "epsilon"
    decides = match(args, flags) if flags.match_base else None
    maybe = frozenset(name for name in may_act if FIXES[name].asked(known))
    base, edm = _base(args, decides is not None) if maybe or decides else (STOCK, False)
    known.base_prediction_type, known.base_schedule = base.prediction_type, base.schedule
    known.base_that_decides = decides
    on = frozenset(name for name in may_act if FIXES[name].asked(known)) if maybe or decides else maybe
    if edm and "schedule" in on:
        raise FlagError(
            f"{args.pretrained_model_name_or_path} is an EDM model with sigmas of its own: "
            f"leave out {FIXES['schedule'].text}"
        )
    by_sigma = edm or getattr(args, "do_edm_style_training", False)
    if by_sigma:
        refuse_edm(on)
    trained = flags.sampling(base if decides is None else decides.sampling)
    # by sigma the scripts make the target of v by themselves
    known.trains_velocity = trained.prediction_type in ("v_prediction", FLOW) and not by_sigma
    _check(known, on, trained.prediction_type)
    if sigma_space and ("schedule" in on or decides is not None):
        _check_sigma_space(trained)
    weighting = flags.weighting() if may_act else None
    where = args.pretrained_model_name_or_path
    run = prepare(
        replace(DIFFUSERS, v_flag="v_prediction, in a script that trains it,") if sigma_space else DIFFUSERS,
        known,
        on,
        patches.refused,
        flags,
        trained,
        () if weighting is None else (weighting,),
        resumed=bool(getattr(args, "resume_from_checkpoint", None)),
        base=decides,
        teacher=read_teacher(where, getattr(args, "revision", None)) if "keep" in on else None,
    )
    _tell(run, may_act, dropped)
    return run


def match(args: argparse.Namespace, flags: TrainingFlags) -> Base:
    """The base model that decides. Raises FlagError for flags that say otherwise, and for what these scripts
    do not train."""
    base = read_base(args.pretrained_model_name_or_path, getattr(args, "revision", None))
    asked = args.prediction_type
    check_flags(base, flags, asked and (f"--prediction_type {asked}", asked), TRAINS)
    return base


def _check(args: argparse.Namespace, on: frozenset[str], prediction_type: str) -> None:
    if "prompts" in on and args.max_token_length <= 75:
        raise FlagError(
            f"--max_token_length {args.max_token_length}: expected more than the 75 tokens that "
            "upstream has (150, 225, ...)"
        )
    if "buckets" in on and not args.max_token_length:
        raise FlagError(
            "--chunk_buckets needs --max_token_length 150, 225, ...: at 75 tokens every caption is one chunk"
        )
    if "buckets" in on and hasattr(args, "instance_prompt"):
        raise FlagError(
            "--chunk_buckets does not fit a DreamBooth script: it makes its batches of class and instance "
            "prompts; leave the flag out"
        )
    for fix, flag in (("validation", "stable_loss_steps"), ("heldout", "heldout_steps")):
        if fix in on and prediction_type == "sample":
            raise FlagError(
                f"--{flag} knows the loss of epsilon, v_prediction and flow_prediction, not of "
                f"{prediction_type}: leave it out"
            )
    if "ema" in on and getattr(args, "use_ema", False):
        raise FlagError(
            "--ema_decay and the script's own --use_ema both keep an average: leave one of the two out"
        )
    if "ema" in on and getattr(args, "train_text_encoder_ti", False):
        raise FlagError(
            "--ema_decay does not average the embeddings of --train_text_encoder_ti, which belong to the "
            "LoRA: leave one of the two out"
        )
    if "keep" in on and _trains_text(args):
        raise FlagError(
            "--keep_base needs text encoders that stay as they are, since the base reads their output, too: "
            "leave --train_text_encoder and --train_text_encoder_ti out"
        )
    if prediction_type == FLOW and getattr(args, "do_edm_style_training", False):
        raise FlagError(
            f"--do_edm_style_training noises by sigma, which is not {FLOW}: leave one of the two out"
        )
    if "timesteps" in on and getattr(args, "timestep_bias_strategy", "none") != "none":
        raise FlagError(
            f"--timestep_bias_strategy {args.timestep_bias_strategy} draws the timesteps its own way: leave "
            f"it out, or {', '.join(f'--{name}' for name in TIMESTEP_FLAGS if given(args, name))}"
        )


def _check_sigma_space(trained: Sampling) -> None:
    if trained.prediction_type != "epsilon":
        raise FlagError(
            f"this script noises by sigma and measures {trained.prediction_type} as if it were epsilon: "
            "leave --prediction_type out, and take a base model that predicts epsilon"
        )
    if trained.schedule.zero_terminal:
        raise FlagError(
            "this script noises by sigma, which must be finite: give --terminal_sigma 300 or the like "
            "instead of --zero_terminal_snr"
        )


def _trains_text(args: argparse.Namespace) -> bool:
    """Whether a text encoder is trained, so that embeddings change."""
    return any(getattr(args, f"train_text_encoder{end}", False) for end in ("", "_ti"))


def _tell(run: Run, may_act: frozenset[str], dropped: list[str]) -> None:
    args, prompts = run.args, []
    if "prompts" in run.on:
        prompts.append(f"captions of up to {args.max_token_length} tokens, 75 to a chunk")
    if "buckets" in run.on:
        prompts.append("captions of equally many chunks to a batch")
    prompts += ["true crop coordinates"] if "crops" in run.on else []
    prompts += ["checked caches"] if "caches" in run.on else []
    files = (
        ["schedule record in every model file but the VAE's, the scheduler of a saved folder"]
        if "saving" in run.on
        else []
    )
    files += ["validation images sample the same"] if "previews" in run.on else []
    script = SESSION.script.get("__file__")
    tell(
        run,
        may_act,
        dropped,
        "" if script is None else f"{Path(script).name}, {version(script)}",
        prompts,
        files,
    )
    if _trains_text(args):
        for flag in [f"--{name}" for name in ("stable_loss_steps", "heldout_steps") if given(args, name)]:
            warn(f"{flag}: text embeddings stay as first seen, though the text encoder is trained")
    if may_act and (line := rounded_lora(args, "" if script is None else Path(script).name)):
        warn(line)


_LORA = ("train_text_to_image_lora_sdxl", "train_dreambooth_lora_sdxl")


def rounded_lora(args: argparse.Namespace, script: str) -> str | None:
    """A sentence on what the LoRA ``script`` does with bfloat16: diffusers' scripts cast what is trained up
    to float32 for fp16 alone; None for others."""
    lost = lost_above(getattr(args, "learning_rate", None) or 0.0)
    precision = getattr(args, "mixed_precision", None) or os.environ.get("ACCELERATE_MIXED_PRECISION")
    if not script.startswith(_LORA) or precision != "bf16" or lost is None:
        return None
    return (
        "--mixed_precision bf16: this script keeps the LoRA itself in bfloat16 and rounds it to nearest, so "
        f"that a step of --learning_rate {args.learning_rate:g} is lost in every weight above {lost:.2g}: "
        "with --mixed_precision fp16, or no, it is kept in float32"
    )


def refuse_edm(fixes: Collection[str]) -> None:
    """Raise FlagError if one of ``fixes`` does not apply to EDM-style training, which noises and weights its
    own loss by sigma."""
    refused = [name for name in TRAINING if name in fixes]
    if refused:
        raise FlagError(
            f"EDM-style training noises by sigma and weights its own loss by sigma, so {', '.join(refused)} "
            "cannot be had there: leave "
            "out --loss_type, --snr_gamma, --ip_noise_gamma and the like, or train without "
            "--do_edm_style_training"
        )


def _base(args: argparse.Namespace, decides: bool) -> tuple[Sampling, bool]:
    """How the base model was trained by its scheduler config (SDXL's own schedule if that has no betas), and
    whether EDM-style; ``decides``: not that config alone is believed."""
    where = args.pretrained_model_name_or_path
    try:
        config = hub_config(where, getattr(args, "revision", None))
        if "EDM" in config.get("_class_name", ""):
            predicts = check_prediction_type(config.get("prediction_type", "epsilon"))
            return Sampling(NoiseSchedule.sdxl(), predicts), True
        said = sampling_of_config(config)
    except (OSError, ValueError) as error:
        raise FlagError(
            f"--pretrained_model_name_or_path {where}: no noise schedule in its scheduler folder ({error})"
        ) from error
    if Path(where).is_dir() and not decides:
        _warn_of_record(Path(where), said)
    return said, False


def _warn_of_record(folder: Path, config: Sampling) -> None:
    """The record in a base model's U-Net may say something else than its scheduler config, which is what the
    script trains on."""
    try:
        said = read_sampling(folder)
    except (OSError, FormatError):
        return
    except ValueError as error:
        return warn(f"{error}: what it says of its schedule is not known")
    if said != config:
        warn(
            f"the record in {folder} says {said}, its scheduler config {config}, which is what is trained "
            f"on: sdxl-fixes stamp {folder} puts the record into the config, and --match_base trains by it"
        )
