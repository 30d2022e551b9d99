"""The training run that the patches serve: kohya's fixes, and what kohya's arguments make of them."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Mapping
from pathlib import Path

from sdxl_fixes.checkpoint import Sampling, markers, metadata, sampling_of_config
from sdxl_fixes.command_line import Flag
from sdxl_fixes.errors import FlagError
from sdxl_fixes.flags import TrainingFlags
from sdxl_fixes.log import say, warn
from sdxl_fixes.model_files.header import FormatError
from sdxl_fixes.model_files.model_file import is_pickle, read_sampling
from sdxl_fixes.names import FLOW, HUBER_KINDS, HUBER_SCHEDULES, LOSS_TYPES
from sdxl_fixes.trainers.base import (
    STOCK,
    Base,
    check_flags,
    check_others,
    hub_config,
    read_base,
    read_teacher,
)
from sdxl_fixes.trainers.fixes import (
    TIMESTEP_FLAGS,
    TIMESTEP_OPTIONS,
    Fix,
    allowed,
    given,
    switch_off,
)
from sdxl_fixes.trainers.report import sampling_flags, tell
from sdxl_fixes.trainers.run import Run, Trainer, prepare
from sdxl_fixes.trainers.session import Session
from sdxl_fixes.weighting import EpsilonLike, PlusVLike, Weighting

from .chunk_flags import Options
from .resume_flags import check_exact
from .scripts import SCRIPTS, TESTED, digest, version
from .speed_flags import PARTS, parts


def changes_schedule(args: argparse.Namespace) -> bool:
    """Whether training leaves SDXL's own schedule."""
    base: Base | None = getattr(args, BASE, None)
    if base is not None:
        return base.sampling.schedule != STOCK.schedule
    sigma, flow = getattr(args, "terminal_sigma", None), getattr(args, "prediction_type", None) == FLOW
    return given(args, "zero_terminal_snr") or sigma is not None or flow


def worth_saying(args: argparse.Namespace) -> bool:
    """Whether a saved file must say how it is sampled: it is not SDXL's own way, or a base said something."""
    return changes_schedule(args) or given(args, "v_parameterization") or bool(bases(args))


BASE = "base_that_decides"  # the attribute of our copy of the arguments
TRAINS = ("epsilon", "v_prediction", FLOW)
# what training may go on from: flags of one script or another
_CONTINUED = ("network_weights", "controlnet_model_name_or_path", "weights")
_WEIGHTS = {
    "min_snr_gamma": "apply_snr_weight",
    "debiased_estimation_loss": "apply_debiased_estimation",
    "scale_v_pred_loss_like_noise_pred": "scale_v_prediction_loss_like_noise_prediction",
    "v_pred_like_loss": "add_v_prediction_like_loss",
}
AFTER_STEPS = "sample_images_common"  # called before the first step, too
FIXES = {
    "schedule": Fix(
        {"zero_terminal_snr": None, "terminal_sigma": None, "prediction_type": (FLOW,), "match_base": None},
        options=("terminal_sigma_method", "terminal_sigma_start", "flow_shift"),
        parts={"trains_flow": "get_noise_noisy_latents_and_timesteps"},
        wanted=changes_schedule,
    ),
    "loss": Fix(
        {"loss_type": HUBER_KINDS},
        options=("huber_schedule", "huber_c", "huber_scale", "huber_l2_gradient"),
        parts={"masked_loss": "apply_masked_loss"},
    ),
    "weighting": Fix(
        dict.fromkeys((*_WEIGHTS, "flow_weighting")), options=("min_snr_floor",), parts=_WEIGHTS
    ),
    "noise": Fix({"ip_noise_gamma_random_strength": None}, needs=("ip_noise_gamma",)),
    "timesteps": Fix(
        TIMESTEP_FLAGS,
        options=TIMESTEP_OPTIONS,
        parts=dict.fromkeys(("terminal_timestep_share", "timestep_density_weighted"), "conditional_loss"),
    ),
    "buckets": Fix({"chunk_buckets": None}, options=("chunk_layout",), due="start"),
    "keep": Fix({"keep_base": None}),
    "validation": Fix({"stable_loss_steps": None}, options=("stable_loss_images",), first=(AFTER_STEPS,)),
    "heldout": Fix({"heldout_steps": None}, options=("heldout_dir", "heldout_split"), first=(AFTER_STEPS,)),
    "ema": Fix({"ema_decay": None}, options=("ema_evaluated",), due="later", first=(AFTER_STEPS,)),
    "resume": Fix({"exact_resume": None}, due="start"),
    "speed": Fix({"speed": None}, due="start", parts={f"speed_{part}": part for part in PARTS}),
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
    if flags.flow_weighting and len(found) > 1:
        raise FlagError(
            "--flow_weighting makes the loss rectified flow's, which no other weight may multiply: leave it "
            "out, or --scale_v_pred_loss_like_noise_pred and --v_pred_like_loss"
        )
    return tuple(found)


def bases(args: argparse.Namespace) -> dict[str, Sampling]:
    """What the models that are trained on say about how they are sampled, those that say anything."""
    return {name: said for name, said in _look(args).items() if isinstance(said, Sampling)}


def _look(args: argparse.Namespace) -> dict[str, Sampling | str]:
    """The same, or what is wrong with a record or scheduler config, in a sentence; nothing of what cannot be
    read. A scheduler config of SDXL's own in a folder or on the hub is what every tool writes, and says
    nothing."""
    found: dict[str, Sampling | str] = {}
    for name in filter(
        None, (getattr(args, name, None) for name in ("pretrained_model_name_or_path", *_CONTINUED))
    ):
        path = Path(name)
        try:
            said = read_sampling(path) if path.exists() else _on_the_hub(name)
        except (OSError, FormatError):
            continue
        except ValueError as error:
            found[str(path)] = str(error)
            continue
        if said is not None and (path.is_file() or said != STOCK):
            found[str(path)] = said
    return found


@functools.cache
def _on_the_hub(name: str) -> Sampling | None:
    """What the scheduler config of a model on the Hugging Face Hub says; the trainer reads it, too."""
    try:
        return sampling_of_config(hub_config(name))
    except OSError:
        return None


def match(args: argparse.Namespace, flags: TrainingFlags) -> Base:
    """The base model that decides, after kohya's own flags were set as it says. Raises FlagError for flags
    and models that say otherwise, and for what this trainer does not train."""
    base = read_base(getattr(args, "pretrained_model_name_or_path", None))
    said = getattr(args, "prediction_type", None)
    asked = (f"--prediction_type {said}", said) if said else None
    if given(args, "v_parameterization"):
        asked = ("--v_parameterization", "v_prediction")
    check_flags(base, flags, asked, TRAINS)
    check_others(base, {name: getattr(args, name, None) for name in _CONTINUED})
    schedule = base.sampling.schedule
    if len(schedule) != len(STOCK.schedule):
        raise FlagError(
            f"--match_base: {base}, over {len(schedule)} timesteps, and this trainer has "
            f"{len(STOCK.schedule)}: take another base model"
        )
    args.v_parameterization = base.sampling.prediction_type == "v_prediction"
    flow = base.sampling.prediction_type == FLOW
    args.prediction_type, args.zero_terminal_snr = (FLOW, False) if flow else (None, schedule.zero_terminal)
    return base


def trains_text(args: argparse.Namespace) -> bool:
    """Whether a text encoder is trained, so that embeddings change."""
    if hasattr(args, "network_module"):
        return not (args.network_train_unet_only or args.cache_text_encoder_outputs)
    return bool(getattr(args, "train_text_encoder", False))


def _teacher(args: argparse.Namespace) -> Sampling:
    """How the checkpoint that is trained on is sampled: SDXL's own way unless it says another. Raises
    FlagError, for --keep_base, where it cannot be read or its conditioning would change."""
    if trains_text(args):
        give = "--network_train_unet_only" if hasattr(args, "network_module") else "no --train_text_encoder"
        raise FlagError(
            "--keep_base needs text encoders that stay as they are, since the base reads their output, too: "
            f"give {give}"
        )
    return read_teacher(getattr(args, "pretrained_model_name_or_path", None))


def start(args: argparse.Namespace, ours: Mapping[str, Flag] | None = None) -> Run:
    """The run that kohya's parsed arguments describe, after it was reported. ``ours`` are flags of the
    plugin's own. Raises FlagError, before any model is loaded, for flags that make no sense and for fixes
    that cannot work here."""
    may_act = allowed(getattr(args, "fixes", None), FIXES)
    _say_v(args)
    dropped = switch_off(FIXES, may_act, ours or {}, args)
    known = _known(args)
    flags = (
        TrainingFlags.from_args(known) if may_act else TrainingFlags(prediction_type=known.prediction_type)
    )
    base = match(args, flags) if flags.match_base else None
    trained = flags.sampling() if base is None else base.sampling
    if trained.prediction_type == FLOW:
        _check_flow(args)
    fast = {f"speed_{part}": True for part in parts(args)}
    args = argparse.Namespace(
        **vars(args), **{BASE: base}, **fast
    )  # ours: it sees no more than kohya's at the start
    script = SESSION.script_name()
    # nobody asks for these by a flag of their own
    without = {fix for fix in SCRIPTS.get(script or "", {}) if not FIXES[fix].flags}
    asked = frozenset(name for name in may_act - without if FIXES[name].asked(args))
    refused = {**SESSION.patches.refused, **_no_place(script, asked, args)}
    options = Options.from_args(args) if may_act else None
    if "resume" in asked:
        check_exact(args)
    run = prepare(
        KOHYA,
        args,
        asked,
        refused,
        flags,
        trained,
        weightings(args, flags) if may_act else (),
        resumed=bool(getattr(args, "resume", None)),
        teacher=_teacher(args) if "keep" in asked else None,
        options=options,
        timestep_range=(getattr(args, "min_timestep", None) or 0, getattr(args, "max_timestep", None)),
        base=base,
    )
    _check_pickled(run)
    _tell(run, may_act, dropped)
    return run


def _say_v(args: argparse.Namespace) -> None:
    """--prediction_type v_prediction said kohya's way. Raises FlagError where both are given and differ."""
    said = getattr(args, "prediction_type", None)
    if given(args, "v_parameterization") and said not in (None, "v_prediction"):
        raise FlagError(
            f"--v_parameterization is --prediction_type v_prediction, and --prediction_type {said} was "
            "given, too: leave one of them out"
        )
    if said == "v_prediction":
        args.v_parameterization, args.prediction_type = True, None


def _check_flow(args: argparse.Namespace) -> None:
    """Raise FlagError for what has no meaning, or cannot be right, with rectified flow."""
    for name in ("scale_v_pred_loss_like_noise_pred", "v_pred_like_loss"):
        if given(args, name):
            raise FlagError(
                f"--{name} makes a loss of epsilon or v-prediction look like the other's, and {FLOW} is "
                "neither: leave it out"
            )


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


def saves_full(args: argparse.Namespace) -> bool:
    """Whether whole models are saved."""
    return SESSION.script_name() in (None, "sdxl_train.py") and not hasattr(args, "network_module")


def pickled(args: argparse.Namespace) -> str:
    """What is saved if that is a pickle, as half a sentence; else ""."""
    kind, full = getattr(args, "save_model_as", ""), saves_full(args)
    if full and getattr(args, "use_safetensors", False):
        return ""
    if kind is None:  # upstream's default of full models
        from_file = full and Path(getattr(args, "pretrained_model_name_or_path", None) or "").is_file()
        return "without --save_model_as a .ckpt is saved, a pickle" if from_file else ""
    return f"--save_model_as {kind} saves a pickle" if kind in ("ckpt", "pt") else ""


def _check_pickled(run: Run) -> None:
    """Raise FlagError if what is saved could not say that it is sampled otherwise than SDXL's own way."""
    trained, words = Sampling(run.schedule, run.prediction_type), pickled(run.args)
    if "saving" in run.on and words and trained != STOCK:
        raise FlagError(
            f"{words}, which cannot say that the model is sampled as {trained}, and no stamp can mend "
            "that: give --save_model_as safetensors, or --fixes all,-saving"
        )


def _tell(run: Run, may_act: frozenset[str], dropped: list[str]) -> None:
    args, root = run.args, SESSION.patches.root
    without = pickled(args) if "saving" in run.on else ""
    prompts = []
    if options := run.options:
        prompts.append(
            f"prompts of up to {75 * options.limit} tokens in batches of equal aspect and "
            f"chunks, {options.layout} vectors"
        )
    if "speed" in run.on:
        prompts.append(f"for speed {', '.join(part for part in PARTS if part in parts(args))}")
    files = []
    if "saving" in run.on:
        full = saves_full(args)
        names = markers(run.schedule, run.prediction_type) if full and not without else ()
        spec = metadata(run.schedule, run.prediction_type)["modelspec.prediction_type"]
        tensors = [f"markers {' '.join(names)}"] if names else []
        said = ["schedule record", *tensors, *([f"modelspec {spec}"] if spec else [])]
        beside = ["scheduler config beside it"] if full else []
        folder = str(getattr(args, "save_model_as", None)).startswith("diffusers")
        files.append("its scheduler" if folder else without or ", ".join([*said, *beside]))
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
    if trains_text(args):
        for flag in [f"--{name}" for name in ("stable_loss_steps", "heldout_steps") if given(args, name)]:
            warn(f"{flag}: text embeddings stay as first seen, though the text encoder is trained")
    can_resume = "resume" not in SCRIPTS.get(SESSION.script_name() or "", {"resume": ""})
    if given(args, "resume") and "resume" not in run.on and can_resume:
        warn(
            f"--resume continues weights, optimizer and learning rate; {resumed(args)}: states saved with "
            "--exact_resume go on exactly with it"
        )
    if without:
        warn(f"{without}, which carries neither record nor markers: take --save_model_as safetensors")
    model = Path(getattr(args, "pretrained_model_name_or_path", None) or "")
    if is_pickle(model) and model.is_file() and run.base is None:
        say(f"{model} is a pickle, which is never opened here, so it cannot be told how it was trained")
    trained = Sampling(run.schedule, run.prediction_type)
    for name, base in _look(args).items():
        if isinstance(base, str):
            warn(f"{base}: what it says of its schedule is not known")
        elif base != trained:
            differs = f"{name} says that it is sampled as {base}, and your flags train {trained}"
            warn(f"{differs}: the saved file will say what was trained; {_flags_for(base)}")


def resumed(args: argparse.Namespace) -> str:
    """What upstream's own resuming does to the place in the training."""
    if getattr(args, "skip_until_initial_step", False):
        return "as many batches are skipped, but random numbers are drawn anew"
    # the network trainer reads how many steps were done
    done = "whole epochs that are done are left out" if hasattr(args, "network_module") else "so are epochs"
    return f"steps are counted from 0 again, {done}, and the data is dealt anew"


def _flags_for(base: Sampling) -> str:
    """The flags that train on as ``base`` was, or what they cannot do."""
    flags = sampling_flags(base)
    if base.prediction_type not in TRAINS:
        return "no flags of this trainer train on as the base was trained"
    if flags is None:
        return "to go on as the base was trained, give --match_base"
    words = flags.replace("--prediction_type epsilon", "").replace(
        "--prediction_type v_prediction", "--v_parameterization"
    )
    return "to go on as the base was trained, give --match_base, or " + (
        words.strip() or "leave the schedule's flags and v_parameterization out"
    )


def _known(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments as our flags have them: with kohya's word for v-prediction, and without a fork's own
    losses, which stay the fork's."""
    known = argparse.Namespace(**{"prediction_type": None, **vars(args)})
    if given(args, "v_parameterization"):
        known.prediction_type = "v_prediction"
    if (
        getattr(args, "loss_type", "l2") not in LOSS_TYPES
        or getattr(args, "huber_schedule", "snr") not in HUBER_SCHEDULES
    ):
        known.loss_type, known.huber_schedule = "l2", "snr"
    return known
