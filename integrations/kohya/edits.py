"""Which edits of kohya's loops the flags ask for."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from sdxl_fixes.trainers.fixes import allowed, given

from . import resume, waits
from .loop import Edit, changed
from .run import FIXES
from .speed_flags import parts


def asked(args: argparse.Namespace) -> list[Edit]:
    """The edits, in the order in which they are made."""
    may_act = allowed(getattr(args, "fixes", None), FIXES)
    found = []
    if given(args, "exact_resume") and "resume" in may_act:
        found.append(resume.EDIT)
    if "speed" in may_act and "syncs" in parts(args):
        found.append(waits.EDIT)
    return found


def train(original: Callable[..., Any], self: Any, args: argparse.Namespace) -> Any:
    """The network trainer's own loop, or it edited."""
    edits = asked(args)
    for edit in (resume.EDIT, waits.EDIT):
        edit.held.reset()
    return (changed(original, edits) if edits else original)(self, args)
