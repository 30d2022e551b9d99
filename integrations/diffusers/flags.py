"""The plugin's flags in a script's parser, and the moment its arguments are known."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from sdxl_fixes.flags import (
    LOSS_FLAGS,
    SCHEDULE_FLAGS,
    TIMESTEP_FLAGS,
    VALIDATION_FLAGS,
    WEIGHTING_FLAGS,
    FlagError,
    add_flags,
)
from sdxl_fixes.trainers.fixes import add_fixes_flag
from sdxl_fixes.trainers.patching import PatchSet

from .anchors import in_sigma_space, missing, refused
from .run import FIXES, SESSION, caller, start

# the parser that has one is the script's
MARKS = {"--pretrained_model_name_or_path", "--pretrained_teacher_model"}
SHARED = (
    *(*SCHEDULE_FLAGS, *LOSS_FLAGS, *WEIGHTING_FLAGS),
    *("ip_noise_gamma", "ip_noise_gamma_random_strength", *TIMESTEP_FLAGS, *VALIDATION_FLAGS),
)
OURS: dict[str, dict[str, Any]] = {
    "snr_gamma": dict(type=float, help="min-SNR weighting (arXiv:2303.09556); 5 is the paper's"),
    "prediction_type": dict(
        choices=("epsilon", "v_prediction"),
        help="what the model is trained to predict (default: as the base model)",
    ),
    "float32_noising": dict(action="store_true", help="noise the latents in float32 in mixed precision, too"),
    "max_token_length": dict(
        type=int,
        help="captions of up to so many tokens, encoded in chunks of 75 as the UIs do (225: three chunks)",
    ),
    "chunk_buckets": dict(
        action="store_true",
        help="batch captions of equally many chunks, so that none is padded for a batch mate",
    ),
    "true_crop_coordinates": dict(
        action="store_true", help="give the network the crop that its cached latents were made of"
    ),
    "checked_caches": dict(
        action="store_true", help="key the script's caches by everything that changes their content"
    ),
}


def parse_args(
    original: Callable[..., Any], parser: argparse.ArgumentParser, *args: Any, **kwargs: Any
) -> Any:
    """Upstream's arguments and ours; other parsers of the process are left alone."""
    if not MARKS & set(parser._option_string_actions):
        return original(parser, *args, **kwargs)
    theirs = {action.dest for action in parser._actions}
    add_flags(parser, tuple(name for name in SHARED if name != "min_snr_gamma"))
    group = parser.add_argument_group("sdxl-fixes for diffusers")
    for name, options in OURS.items():
        if f"--{name}" not in parser._option_string_actions:
            group.add_argument(f"--{name}", **options)
    add_fixes_flag(parser, FIXES)
    parsed = original(parser, *args, **kwargs)
    begin(parsed, caller(), {action.dest for action in parser._actions} - theirs)
    return parsed


def begin(args: argparse.Namespace, script: dict[str, Any], ours: Collection[str]) -> None:
    """Nothing is loaded yet: decide which fixes are on, replace what they need, and take their flags away
    from the script."""
    from .patches import for_script

    SESSION.script, SESSION.training = script, False
    # a notebook has no file to check
    source = Path(script["__file__"]).read_text(encoding="utf-8") if "__file__" in script else ""
    if why_not := refused(source):
        raise FlagError(
            f"{Path(script['__file__']).name} cannot be fixed: {why_not}; start it without sdxl-fixes"
        )
    patches = SESSION.patches
    # the others act if and when they can
    no_place = {fix: why for fix, why in missing(source).items() if FIXES[fix].due != "later"}
    table = PatchSet(for_script(source, script), calls=SESSION.called)
    table.refused = {**patches.refused, **no_place}
    table.refused |= {
        fix: why for patch, why in table.check().items() if why is not None for fix in patch.fixes
    }
    try:
        run = start(args, table, ours, in_sigma_space(source))
    except FlagError as error:
        raise FlagError(str(error).replace("--min_snr_gamma", "--snr_gamma")) from error
    patches.undo()
    table.apply({"run", *run.on})
    SESSION.patches = table
    SESSION.begin(run)
    if "weighting" in run.on:
        args.snr_gamma = None  # the script must not weight again
    if "caches" in run.on and getattr(args, "cache_latents", False):
        args.cache_latents = False
        SESSION.reached("caches")
