"""The plugin's flags in kohya's parser, and the moment its arguments are known."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from sdxl_fixes.flags import TIMESTEP_FLAGS, VALIDATION_FLAGS, add_flags
from sdxl_fixes.run import add_fixes_flag

from . import buckets
from .run import FIXES, SESSION, start

OURS = (
    *("terminal_sigma", "terminal_sigma_method", "terminal_sigma_start", "huber_l2_gradient", "min_snr_floor"),
    *(*TIMESTEP_FLAGS, *VALIDATION_FLAGS),
)


def add_arguments(original: Callable[..., Any], parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
    """Upstream's arguments, then ours; a TOML --config_file is read with the same parser, so it knows them too."""
    result = original(parser, *args, **kwargs)
    add_flags(parser, OURS)
    group = parser.add_argument_group("sdxl-fixes, prompts")
    for name, options in buckets.FLAGS.items():
        group.add_argument(f"--{name}", **options)
    add_fixes_flag(parser, FIXES)
    return result


def verify(original: Callable[..., Any], args: argparse.Namespace, *rest: Any, **kwargs: Any) -> Any:
    """The first call of both trainers' train(): nothing is loaded yet."""
    buckets.Options.from_args(args)  # checks them
    SESSION.run = start(args, SESSION.patches)
    return original(args, *rest, **kwargs)


def step_done(original: Callable[..., Any], self: Any, **kwargs: Any) -> Any:
    """Called at the end of every training step: by now every fix that is on must have been reached."""
    SESSION.check_reached()
    return original(self, **kwargs)
