"""The flag of an exact resume, and what it does not go with."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from sdxl_fixes.command_line import flag, flags_of
from sdxl_fixes.errors import FlagError
from sdxl_fixes.trainers.fixes import given


@dataclass(frozen=True)
class ResumeFlags:
    """The flag's value."""

    exact_resume: bool = flag(
        False,
        "make data order and random numbers a function of --seed, epoch and place in it, write the place "
        "into every state, and go on after exactly it with --resume",
        group="resume",
    )


RESUME_FLAGS = flags_of(ResumeFlags)
_COUNTED = "the state says where to go on"
_NOT = {  # kohya's flags -> why they do not go with it
    "initial_epoch": _COUNTED,
    "initial_step": _COUNTED,
    "skip_until_initial_step": _COUNTED,
    "dataset_class": "the order is that of kohya's own data sets",
    "deepspeed": "its states are written by DeepSpeed, with which this was never run",
    "fused_optimizer_groups": "upstream loads the state of the first of its optimizers alone",
}


def check_exact(args: argparse.Namespace) -> None:
    """Raise FlagError for flags of kohya's that --exact_resume does not go with."""
    for name, why in _NOT.items():
        if given(args, name):
            raise FlagError(f"--exact_resume does not go with --{name}, since {why}: leave one of them out")
    if getattr(args, "seed", None) is None:
        raise FlagError("--exact_resume needs --seed, of which order and random numbers are made: give one")
