"""The plugin's flags in a script's parser."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace

from sdxl_fixes.command_line import Flag, add_flags, flag, flags_of
from sdxl_fixes.flags import FLAGS, grouped
from sdxl_fixes.trainers.fixes import fixes_flag

from .run import FIXES, TRAINS


@dataclass(frozen=True)
class ScriptFlags:
    """The flags that only these scripts have."""

    snr_gamma: float | None = flag(None, FLAGS["min_snr_gamma"].help)
    float32_noising: bool = flag(False, "noise the latents in float32 in mixed precision, too")
    max_token_length: int | None = flag(
        None, "captions of up to so many tokens, encoded in chunks of 75 as the UIs do (225: three chunks)"
    )
    chunk_buckets: bool = flag(
        False, "batch captions of equally many chunks, so that none is padded for a batch mate"
    )
    true_crop_coordinates: bool = flag(
        False, "give the network the crop that its cached latents were made of"
    )
    checked_caches: bool = flag(False, "key the script's caches by everything that changes their content")


_SHARED = grouped(
    *("base", "prediction", "schedule", "loss", "weighting", "noise", "timesteps", "keep", "validation"),
    *("heldout", "ema"),
)
_NOT_THERE = ("min_snr_gamma", "noise_offset")  # snr_gamma is diffusers' name; the offset is the scripts' own
FLAGS_HERE: Mapping[str, Flag] = {
    **{name: stated for name, stated in _SHARED.items() if name not in _NOT_THERE},
    "prediction_type": replace(FLAGS["prediction_type"], choices=TRAINS),
    **flags_of(ScriptFlags),
    "fixes": fixes_flag(FIXES),
}


def add_arguments(parser: argparse.ArgumentParser) -> Mapping[str, Flag]:
    """Add our flags to the script's parser; returns those that it has not got already."""
    known = {action.dest for action in parser._actions}
    add_flags(parser, FLAGS_HERE)
    return {name: stated for name, stated in FLAGS_HERE.items() if name not in known}
