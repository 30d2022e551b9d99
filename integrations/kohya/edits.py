"""Which edits of kohya's loops the flags ask for."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from sdxl_fixes.trainers.fixes import allowed, given

from . import resume
from .loop import Edit, changed
from .run import FIXES


def asked(args: argparse.Namespace) -> list[Edit]:
    """The edits, in the order in which they are made."""
    may_act = allowed(getattr(args, "fixes", None), FIXES)
    found = []
    if given(args, "exact_resume") and "resume" in may_act:
        found.append(resume.EDIT)
    return found


def train(original: Callable[..., Any], self: Any, args: argparse.Namespace) -> Any:
    """The network trainer's own loop, or it edited."""
    edits = asked(args)
    resume.EDIT.held.reset()
    return (changed(original, edits) if edits else original)(self, args)
