"""A fix as data: its name, the flags that bring it into play, stated once, and when its work must have been
seen."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from sdxl_fixes.command_line import Flag
from sdxl_fixes.errors import FlagError
from sdxl_fixes.flags import FLAGS, grouped

# what every trainer's fix of the timesteps is asked for by, and what shapes it
TIMESTEP_FLAGS: Mapping[str, None] = dict.fromkeys(
    ("stratified_timesteps", "terminal_timestep_share", "timestep_density", "resolution_shift")
)
TIMESTEP_OPTIONS = tuple(name for name in grouped("timesteps") if name not in TIMESTEP_FLAGS)


@dataclass(frozen=True)
class Fix:
    """One fix of a trainer.

    flags    the flags that ask for it, each with the values that do (None: any but false, 0 and the default)
    needs    flags without which they do nothing
    options  flags that shape it and do nothing by themselves
    due      when its work must have been seen: "step" in every training step, "start" by the end of the
             first, "later" at no fixed time
    parts    further work that is due with it: flag -> name of the function that must have been reached if the
             flag is given
    first    further work that must have been seen by the end of the first step: names of functions
    wanted   decides by the arguments, in place of ``flags``, where more than flags decides
    """

    flags: Mapping[str, tuple[Any, ...] | None] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    due: str = "step"
    parts: Mapping[str, str] = field(default_factory=dict)
    first: tuple[str, ...] = ()
    wanted: Callable[[argparse.Namespace], bool] | None = None

    def asked(self, args: argparse.Namespace) -> bool:
        """Whether ``args`` bring it into play."""
        if self.wanted is not None:
            return self.wanted(args)
        asks = any(
            given(args, flag) and (values is None or getattr(args, flag) in values)
            for flag, values in self.flags.items()
        )
        return asks and all(given(args, flag) for flag in self.needs)

    def marks(self, args: argparse.Namespace) -> list[str]:
        """Names of the parts that are due beside the fix itself."""
        return [part for flag, part in self.parts.items() if given(args, flag)]

    @property
    def text(self) -> str:
        """The flags, for people."""
        return ", ".join(
            f"--{flag}" + (f" {'|'.join(map(str, values))}" if values else "")
            for flag, values in self.flags.items()
        )


def given(args: argparse.Namespace, flag: str) -> bool:
    """Whether a flag was given another value than its default; 0 is off, as trainers' own ``if`` takes it."""
    value = getattr(args, flag, None)
    return bool(value) and (flag not in FLAGS or value != FLAGS[flag].default)


def without_effect(fixes: Mapping[str, Fix], args: argparse.Namespace) -> list[str]:
    """Sentences about flags that were given and do nothing, since what they shape was not asked for."""
    found = []
    for fix in fixes.values():
        if not fix.asked(args):
            lacking = " and ".join(f"--{flag}" for flag in fix.needs) or fix.text
            shaping = [*fix.options, *(flag for flag in fix.flags if fix.needs and flag not in fix.needs)]
            found += [f"--{flag} has no effect without {lacking}" for flag in shaping if given(args, flag)]
    return found


def allowed(text: str | None, known: Collection[str]) -> frozenset[str]:
    """``all``, ``none``, names, or ``all,-name``: the fixes that may be switched on. Raises FlagError for an
    unknown name."""
    chosen: set[str] = set()
    for word in (word.strip() for word in (text or "all").split(",")):
        names = {"all": set(known), "none": set[str]()}.get(word.lstrip("-"), {word.lstrip("-")})
        if not names <= set(known):
            raise FlagError(
                f"--fixes: unknown fix {word.lstrip('-')!r}: expected all, none, or some of "
                f"{', '.join(known)} (-name leaves one out)"
            )
        chosen = chosen - names if word.startswith("-") else chosen | names
    return frozenset(chosen)


def fixes_flag(known: Collection[str]) -> Flag:
    """``--fixes``, for a trainer whose fixes are ``known``."""
    help = f"which sdxl-fixes may act: all, none, or a list of {', '.join(known)}; -name leaves one out"
    return Flag("fixes", str, None, help, unset="all")


def switch_off(
    fixes: Mapping[str, Fix], may_act: Collection[str], ours: Mapping[str, Flag], args: argparse.Namespace
) -> list[str]:
    """Take the plugin's own flags (``ours``) of fixes that ``--fixes`` switches off out of ``args``, as if
    they had not been given: nothing may half-follow them. Returns their names; a trainer's own flags stay,
    and mean what upstream makes of them."""
    gone = []
    for name, fix in fixes.items():
        for flag in (*fix.flags, *fix.options):
            if name not in may_act and flag in ours and given(args, flag):
                setattr(args, flag, ours[flag].default)
                gone.append(flag)
    return gone
