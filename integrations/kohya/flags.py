"""The plugin's flags in kohya's parser, and the moment its arguments are known."""

from __future__ import annotations

import argparse
import codecs
import difflib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdxl_fixes.command_line import Flag, add_flags, declared, read_values
from sdxl_fixes.errors import FlagError
from sdxl_fixes.flags import FLAGS, grouped
from sdxl_fixes.log import warn
from sdxl_fixes.names import FLOW
from sdxl_fixes.trainers.fixes import fixes_flag, given

from . import edits, loop
from .chunk_flags import CHUNK_FLAGS
from .heldout import SPLIT_FLAGS
from .heldout import check as check_heldout
from .optimizers import cannot_learn
from .optimizers import check as check_optimizer
from .resume_flags import RESUME_FLAGS
from .run import FIXES, SESSION, start
from .speed_flags import SPEED_FLAGS, check_speed

_NOT_KOHYAS = (
    "flow_shift",
    "match_base",
    *("terminal_sigma", "terminal_sigma_method", "terminal_sigma_start"),
    *(
        "huber_l2_gradient",
        "min_snr_floor",
        "flow_weighting",
        *grouped("timesteps", "keep", "validation", "heldout", "ema"),
    ),
)
_TRAINED = ("epsilon", "v_prediction", FLOW)
_UNSET = "epsilon; v_prediction with --v_parameterization"
OURS: Mapping[str, Flag] = {
    "prediction_type": replace(FLAGS["prediction_type"], choices=_TRAINED, unset=_UNSET),
    **{name: FLAGS[name] for name in _NOT_KOHYAS},
    **CHUNK_FLAGS,
    **SPLIT_FLAGS,
    **RESUME_FLAGS,
    **SPEED_FLAGS,
    "fixes": fixes_flag(FIXES),
}
NAMES = (*FLAGS, *CHUNK_FLAGS, *SPLIT_FLAGS, *RESUME_FLAGS, *SPEED_FLAGS, "fixes")
MEANT = (*NAMES, "v_parameterization")  # by a misspelt key
READ = (  # kohya's own that we read with them
    *("v_parameterization", "v_pred_like_loss", "scale_v_pred_loss_like_noise_pred"),
    *("cache_text_encoder_outputs", "weighted_captions"),
    *("max_token_length", "min_timestep", "max_timestep", "seed", "gradient_accumulation_steps"),
    *("dataset_class", "pretrained_model_name_or_path", "output_dir", "resume"),
    *("masked_loss", "prior_loss_weight"),
    *("train_text_encoder", "network_module", "network_train_unet_only", "network_weights", "save_model_as"),
    *("torch_compile", "use_safetensors", "controlnet_model_name_or_path", "weights"),
    *("optimizer_type", "learning_rate", "max_grad_norm", "full_bf16", "full_fp16", "mixed_precision"),
    *("fused_backward_pass", "fused_optimizer_groups", "use_8bit_adam", "deepspeed"),
    *("max_train_steps", "max_train_epochs", "validation_split", "validation_seed"),
    *("save_last_n_steps", "save_last_n_epochs", "skip_until_initial_step"),
)
# difflib's ratio; noise_offset_type, which kohya_ss writes and sd-scripts ignores, has 0.83 with noise_offset
ALIKE = 0.85
_theirs: list[str] = []  # flags of ours that this sd-scripts has itself


def add_arguments(
    original: Callable[..., Any], parser: argparse.ArgumentParser, *args: Any, **kwargs: Any
) -> Any:
    """Upstream's arguments, then ours; a TOML --config_file is read with the same parser, so it knows them
    too."""
    result = original(parser, *args, **kwargs)
    _theirs[:] = [name for name in OURS if f"--{name}" in parser._option_string_actions]
    add_flags(parser, OURS)
    return result


def read_config(
    original: Callable[..., Any],
    args: argparse.Namespace,
    parser: argparse.ArgumentParser,
    *rest: Any,
    **kwargs: Any,
) -> Any:
    """Upstream puts a TOML file's values past argparse, and ignores a key that it does not know."""
    file = getattr(args, "config_file", None)
    if file:
        _refuse_mark(file)
    args = original(args, parser, *rest, **kwargs)
    if file:
        # not its choices: from a file upstream takes a max_token_length of 75 or 300 as well, and kohya_ss
        # writes 75
        theirs = {name: replace(flag, choices=()) for name, flag in declared(parser, READ).items()}
        try:
            values = read_values(args, {**declared(parser, NAMES), **theirs})
        except FlagError as error:
            raise FlagError(f"--config_file {file}: {error}") from error
        for name, value in values.items():
            setattr(args, name, value)
        _warn_of_misspelt(file, args, parser)
    loop.swap(edits.asked(args))
    return args


def _refuse_mark(file: str) -> None:
    """Upstream takes a byte order mark for a letter of the first key, which it then does not know."""
    path = Path(file if file.endswith(".toml") else f"{file}.toml")
    try:
        with path.open("rb") as stream:
            marked = stream.read(3) == codecs.BOM_UTF8
    except OSError:
        return  # upstream says that it is not there
    if marked:
        raise FlagError(
            f"--config_file {file} begins with a byte order mark, and the trainer would ignore its first "
            "key: save it as UTF-8 without one"
        )


def _warn_of_misspelt(file: str, args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Only of keys that look like a flag of ours: files written for several programs may hold others."""
    known = [action.dest for action in parser._actions]
    for key in vars(args).keys() - set(known):
        nearest = difflib.get_close_matches(
            key.strip("-").replace("-", "_").lower(), known, n=1, cutoff=ALIKE
        )
        if nearest and nearest[0] in MEANT:
            warn(
                f"--config_file {file}: the trainer has no flag {key!r} and ignores it: did you mean "
                f"{nearest[0]}?"
            )


def verify(original: Callable[..., Any], args: argparse.Namespace, *rest: Any, **kwargs: Any) -> Any:
    """The first call of every trainer's train(): nothing is loaded yet."""
    _check_theirs(args)
    loop.check(edits.asked(args))
    check_optimizer(args)
    run = start(args, OURS)
    if run.heldout is not None:
        check_heldout(args)
    if "speed" in run.on:
        check_speed(args)
    SESSION.begin(run)
    for line in cannot_learn(args) if args.fixes != "none" else ():
        warn(line)
    return original(args, *rest, **kwargs)


def _check_theirs(args: argparse.Namespace) -> None:
    """Raise FlagError for a flag that both have: it would act twice."""
    for name in _theirs if args.fixes != "none" else ():
        if given(args, name):
            raise FlagError(
                f"--{name} is a flag of this sd-scripts, too, and both would act: update sdxl-fixes, leave "
                "it out, or give --fixes none for the trainer's own"
            )
