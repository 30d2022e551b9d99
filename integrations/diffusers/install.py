"""Apply the patches to the libraries that the example scripts call, and take them back. The first waits for
the script's arguments, and then applies those that its flags ask for."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sdxl_fixes.command_line import Flag
from sdxl_fixes.errors import FixError, FlagError
from sdxl_fixes.trainers.patching import Patch, PatchSet

from . import heldout
from .anchors import computes_with_predictions, in_sigma_space, missing, refused
from .flags import add_arguments
from .patches import PATCHES, for_script
from .run import FIXES, SESSION, caller, start

# the parser that has one is the script's
MARKS = {"--pretrained_model_name_or_path", "--pretrained_teacher_model"}


def parse_args(
    original: Callable[..., Any], parser: argparse.ArgumentParser, *args: Any, **kwargs: Any
) -> Any:
    """Upstream's arguments and ours; other parsers of the process are left alone."""
    if not MARKS & set(parser._option_string_actions):
        return original(parser, *args, **kwargs)
    ours = add_arguments(parser)
    parsed = original(parser, *args, **kwargs)
    begin(parsed, caller(), ours)
    return parsed


ARGUMENTS = Patch(
    ("run",),
    "argparse:ArgumentParser.parse_args",
    ("self", "args"),
    parse_args,
    "adds the flags, and checks them before any model is loaded",
)


def begin(args: argparse.Namespace, script: dict[str, Any], ours: Mapping[str, Flag]) -> None:
    """Nothing is loaded yet: decide which fixes are on, replace what they need, and take their flags away
    from the script."""
    SESSION.script, SESSION.training = script, False
    # a notebook has no file to check
    source = Path(script["__file__"]).read_text(encoding="utf-8") if "__file__" in script else ""
    if why_not := refused(source):
        raise FlagError(
            f"{Path(script['__file__']).name} cannot be fixed: {why_not}; start it without sdxl-fixes"
        )
    patches = SESSION.patches
    # the others act if and when they can
    no_place = {fix: why for fix, why in missing(source).items() if FIXES[fix].flags}
    table = PatchSet((ARGUMENTS, *for_script(source, script)), calls=SESSION.called)
    table.refused = {**patches.refused, **no_place}
    table.refused |= {
        fix: why for patch, why in table.check().items() if why is not None for fix in patch.fixes
    }
    try:
        run = start(args, table, ours, in_sigma_space(source))
        if run.noising.flow and computes_with_predictions(source):
            raise FlagError(
                "this script computes images by formulas for epsilon and v_prediction: leave "
                "--prediction_type flow_prediction out"
            )
    except FlagError as error:
        raise FlagError(str(error).replace("--min_snr_gamma", "--snr_gamma")) from error
    if run.heldout is not None:
        heldout.name(run.heldout, run.args)
    patches.undo()
    table.apply({"run", *run.on})
    SESSION.patches = table
    SESSION.begin(run)
    if "weighting" in run.on:
        args.snr_gamma = None  # the script must not weight again
    if run.noising.flow:
        args.prediction_type = None  # which the script does not know, nor its DDPMScheduler
    if "caches" in run.on and getattr(args, "cache_latents", False):
        args.cache_latents = False
        SESSION.reached("caches")


def install() -> None:
    """Get ready for an example script of diffusers, or your own copy of one, that will run in this process:
    call it before the script parses its arguments. Only then is anything else replaced, and only what the
    flags ask for.

    Installing twice is the same as once. Raises FixError when diffusers or accelerate are of a shape that we
    do not know.
    """
    uninstall()
    patches = PatchSet((ARGUMENTS, *PATCHES), calls=SESSION.called)
    patches.apply({"run"})
    if "run" in patches.refused:
        patches.undo()
        raise FixError(f"this diffusers or accelerate is not one that we know ({patches.refused['run']})")
    SESSION.patches = patches
    SESSION.watch_optimizers()


def uninstall() -> None:
    """Put the libraries' own functions back."""
    SESSION.patches.undo()
    SESSION.unwatch()
    SESSION.reset()
