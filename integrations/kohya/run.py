"""The training run that the patches serve: kohya's fixes, and what kohya's arguments make of them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from sdxl_fixes.checkpoint import Sampling, markers, metadata
from sdxl_fixes.command_line import Flag
from sdxl_fixes.errors import FlagError
from sdxl_fixes.flags import TrainingFlags
from sdxl_fixes.log import warn
from sdxl_fixes.model_files.header import FormatError
from sdxl_fixes.model_files.model_file import read_sampling
from sdxl_fixes.names import HUBER_KINDS, HUBER_SCHEDULES, LOSS_TYPES
from sdxl_fixes.schedule import NoiseSchedule
from sdxl_fixes.trainers.fixes import Fix, allowed, given, switch_off
from sdxl_fixes.trainers.report import schedule_flags, tell
from sdxl_fixes.trainers.run import Run, Trainer, prepare
from sdxl_fixes.trainers.session import Session
from sdxl_fixes.weighting import EpsilonLike, PlusVLike, Weighting

from .chunk_flags import Options
from .scripts import SCRIPTS, TESTED, digest, version


def changes_schedule(args: argparse.Namespace) -> bool:
    """Whether training leaves SDXL's own schedule."""
    return given(args, "zero_terminal_snr") or getattr(args, "terminal_sigma", None) is not None


def worth_saying(args: argparse.Namespace) -> bool:
    """Whether a saved file must say how it is sampled: it is not SDXL's own way, or a base said something."""
    return changes_schedule(args) or given(args, "v_parameterization") or bool(bases(args))


_WEIGHTS = {
    "min_snr_gamma": "apply_snr_weight",
    "debiased_estimation_loss": "apply_debiased_estimation",
    "scale_v_pred_loss_like_noise_pred": "scale_v_prediction_loss_like_noise_prediction",
    "v_pred_like_loss": "add_v_prediction_like_loss",
}
FIXES = {
    "schedule": Fix(
        {"zero_terminal_snr": None, "terminal_sigma": None},
        options=("terminal_sigma_method", "terminal_sigma_start"),
    ),
    "loss": Fix(
        {"loss_type": HUBER_KINDS},
        options=("huber_schedule", "huber_c", "huber_scale", "huber_l2_gradient"),
        parts={"masked_loss": "apply_masked_loss"},
    ),
    "weighting": Fix(dict.fromkeys(_WEIGHTS), options=("min_snr_floor",), parts=_WEIGHTS),
    "noise": Fix({"ip_noise_gamma_random_strength": None}, needs=("ip_noise_gamma",)),
    "timesteps": Fix(
        {"stratified_timesteps": None, "terminal_timestep_share": None},
        parts={"terminal_timestep_share": "conditional_loss"},
    ),
    "buckets": Fix({"chunk_buckets": None}, options=("chunk_layout",), due="start"),
    "keep": Fix({"keep_base": None}),
    "validation": Fix({"stable_loss_steps": None}, options=("stable_loss_images",)),
    "previews": Fix(due="later", wanted=changes_schedule),
    "saving": Fix(due="later", wanted=worth_saying),
}
KOHYA = Trainer(name="kohya-ss/sd-scripts", v_flag="--v_parameterization", fixes=FIXES)
SESSION = Session("sd-scripts")


def weightings(args: argparse.Namespace, flags: TrainingFlags) -> tuple[Weighting, ...]:
    """Every weighting of the loss that kohya's flags ask for; it multiplies them."""
    found = list(flags.weightings.values())
    if getattr(args, "scale_v_pred_loss_like_noise_pred", False):
        found.append(EpsilonLike())
    if amount := getattr(args, "v_pred_like_loss", None):
        found.append(PlusVLike(amount))
    return tuple(found)


def _bases(args: argparse.Namespace) -> list[Path]:
    """The models that are trained on: the checkpoint, a LoRA that is continued (a name on the Hugging Face
    Hub says nothing here)."""
    names = [getattr(args, name, None) for name in ("pretrained_model_name_or_path", "network_weights")]
    return [Path(name) for name in names if name and Path(name).exists()]


def bases(args: argparse.Namespace) -> dict[str, Sampling]:
    """What the models that are trained on say about how they are sampled, those that say anything."""
    return {name: said for name, said in _look(args).items() if isinstance(said, Sampling)}


def _look(args: argparse.Namespace) -> dict[str, Sampling | str]:
    """The same, or what is wrong with a record or scheduler config, in a sentence; nothing of what cannot be
    read. A folder's scheduler of SDXL's own is what every tool writes, and says nothing."""
    found: dict[str, Sampling | str] = {}
    for path in _bases(args):
        try:
            said = read_sampling(path)
        except (OSError, FormatError):
            continue
        except ValueError as error:
            found[str(path)] = str(error)
            continue
        if said is not None and not (path.is_dir() and said == Sampling(NoiseSchedule.sdxl(), "epsilon")):
            found[str(path)] = said
    return found


def trains_text(args: argparse.Namespace) -> bool:
    """Whether a text encoder is trained, so that embeddings change."""
    if hasattr(args, "network_module"):
        return not (args.network_train_unet_only or args.cache_text_encoder_outputs)
    return bool(getattr(args, "train_text_encoder", False))


def _base(args: argparse.Namespace) -> Sampling:
    """How the checkpoint that is trained on is sampled: SDXL's own way unless it says another. Raises
    FlagError, for --keep_base, where it cannot be read or its conditioning would change."""
    if trains_text(args):
        give = "--network_train_unet_only" if hasattr(args, "network_module") else "no --train_text_encoder"
        raise FlagError(
            "--keep_base needs text encoders that stay as they are, since the base reads their output, too: "
            f"give {give}"
        )
    name = getattr(args, "pretrained_model_name_or_path", None)
    try:
        # a name on the Hugging Face Hub says nothing here: the report tells what is taken for the base's
        said = read_sampling(Path(name)) if name and Path(name).exists() else None
    except (OSError, ValueError) as error:
        raise FlagError(f"--keep_base must know how the base is sampled: {error}") from error
    return said or Sampling(NoiseSchedule.sdxl(), "epsilon")


def start(args: argparse.Namespace, ours: Mapping[str, Flag] | None = None) -> Run:
    """The run that kohya's parsed arguments describe, after it was reported. ``ours`` are flags of the
    plugin's own. Raises FlagError, before any model is loaded, for flags that make no sense and for fixes
    that cannot work here."""
    may_act = allowed(getattr(args, "fixes", None), FIXES)
    dropped = switch_off(FIXES, may_act, ours or {}, args)
    flags = TrainingFlags.from_args(_known(args)) if may_act else TrainingFlags()
    script = SESSION.script_name()
    # nobody asks for these by a flag of their own
    without = {fix for fix in SCRIPTS.get(script or "", {}) if FIXES[fix].due == "later"}
    asked = frozenset(name for name in may_act - without if FIXES[name].asked(args))
    refused = {**SESSION.patches.refused, **_no_place(script, asked, args)}
    options = Options.from_args(args) if may_act else None
    v = given(args, "v_parameterization")
    run = prepare(
        KOHYA,
        args,
        asked,
        refused,
        flags,
        flags.schedule(),
        "v_prediction" if v else "epsilon",
        weightings(args, flags) if may_act else (),
        resumed=bool(getattr(args, "resume", None)),
        base=_base(args) if "keep" in asked else None,
        options=options,
        timestep_range=(getattr(args, "min_timestep", None) or 0, getattr(args, "max_timestep", None)),
    )
    _tell(run, may_act, dropped)
    return run


def _no_place(script: str | None, asked: frozenset[str], args: argparse.Namespace) -> dict[str, str]:
    """Fixes that this script has no use for, or that do not fit it -> why."""
    if script is None:
        return {}
    if script not in SCRIPTS:
        return dict.fromkeys(
            asked, f"{script} is not one of the scripts that it is made for: {', '.join(SCRIPTS)}"
        )
    found = {fix: why for (name, fix), why in SESSION.patches.refused_in.items() if name == script} | dict(
        SCRIPTS[script]
    )
    if (
        given(args, "huber_l2_gradient")
        and args.huber_l2_gradient == "batch"
        and script == "sdxl_train_textual_inversion.py"
    ):
        if getattr(args, "prior_loss_weight", 1.0) != 1.0:
            found["loss"] = (
                "--huber_l2_gradient batch does not see --prior_loss_weight in this script: "
                "take --huber_l2_gradient sample"
            )
    return found


def _tell(run: Run, may_act: frozenset[str], dropped: list[str]) -> None:
    args, root = run.args, SESSION.patches.root
    prompts = []
    if options := run.options:
        prompts.append(
            f"prompts of up to {75 * options.limit} tokens in batches of equal aspect and "
            f"chunks, {options.layout} vectors"
        )
    files = []
    if "saving" in run.on:
        full = SESSION.script_name() in (None, "sdxl_train.py") and not hasattr(args, "network_module")
        names = markers(run.schedule, run.prediction_type) if full else ()
        spec = metadata(run.schedule, run.prediction_type)["modelspec.prediction_type"]
        tensors = [f"markers {' '.join(names)}"] if names else []
        folder = str(getattr(args, "save_model_as", None)).startswith("diffusers")
        files.append(
            "its scheduler"
            if folder
            else ", ".join(["schedule record", *tensors, *([f"modelspec {spec}"] if spec else [])])
        )
    if "previews" in run.on:
        files.append("previews sample the same")
    known = version(root) if root is not None else ""
    tell(run, may_act, dropped, known, prompts, files)
    if not may_act:
        return
    if run.on and root is not None and digest(root) not in TESTED:
        warn(
            f"this sd-scripts is {known}: the fixes that are on are checked in every step, but their "
            "numbers were not compared"
        )
    if run.stable_loss is not None and trains_text(args):
        warn("--stable_loss_steps: text embeddings stay as first seen, though the text encoder is trained")
    if "saving" in run.on and getattr(args, "save_model_as", None) in ("ckpt", "pt"):
        warn(
            f"--save_model_as {args.save_model_as}: such a file carries neither record nor markers: take "
            "safetensors"
        )
    trained = Sampling(run.schedule, run.prediction_type)
    for name, base in _look(args).items():
        if isinstance(base, str):
            warn(f"{base}: what it says of its schedule is not known")
        elif base != trained:
            differs = f"{name} says that it is sampled as {base}, and your flags train {trained}"
            warn(f"{differs}: the saved file will say what was trained; {_flags_for(base)}")


def _flags_for(base: Sampling) -> str:
    """The flags that train on as ``base`` was, or what they cannot do."""
    flags = schedule_flags(base.schedule)
    if base.prediction_type not in ("epsilon", "v_prediction") or flags is None:
        return "no flags of this trainer train on as the base was trained"
    words = " ".join(
        word
        for word in ("--v_parameterization" if base.prediction_type == "v_prediction" else "", flags)
        if word
    )
    return "to go on as the base was trained, " + (
        f"give {words}" if words else "leave the schedule's flags and v_parameterization out"
    )


def _known(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments without a fork's own losses, which stay the fork's."""
    known = argparse.Namespace(**vars(args))
    if (
        getattr(args, "loss_type", "l2") not in LOSS_TYPES
        or getattr(args, "huber_schedule", "snr") not in HUBER_SCHEDULES
    ):
        known.loss_type, known.huber_schedule = "l2", "snr"
    return known
