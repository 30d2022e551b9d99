"""The flag of speed, its parts, and what they do not go with."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from sdxl_fixes.command_line import flag, flags_of
from sdxl_fixes.errors import FlagError

PARTS = ("syncs", "fused", "compile")
_FUSED = ("adamw", "torch.optim.adamw", "torch.optim.adam")


@dataclass(frozen=True)
class SpeedFlags:
    """The flag's value."""

    speed: str | None = flag(
        None,
        f"what may be done for speed, of {', '.join(PARTS)}: no step waits for the GPU, torch's fused AdamW, "
        "compiled transformer blocks",
        group="speed",
    )


SPEED_FLAGS = flags_of(SpeedFlags)


def parts(args: argparse.Namespace) -> frozenset[str]:
    """What ``--speed`` names, by commas or blanks. Raises FlagError for an unknown name."""
    named = frozenset((getattr(args, "speed", None) or "").replace(",", " ").split())
    if unknown := sorted(named - set(PARTS)):
        raise FlagError(f"--speed: unknown part {unknown[0]!r}: expected some of {', '.join(PARTS)}")
    return named


def check_speed(args: argparse.Namespace) -> None:
    """Raise FlagError for what the parts do not go with; have kohya make the optimizer fused."""
    named = parts(args)
    if getattr(args, "deepspeed", False):
        raise FlagError("--speed was never run with --deepspeed, which has its own: leave one of them out")
    if "fused" in named:
        _fuse(args)
    if "compile" in named:
        for name in ("torch_compile", "xformers", "mem_eff_attn"):
            if getattr(args, name, False):
                raise FlagError(
                    f"--speed compile does not go with --{name}: leave one of them out (--sdpa goes with it)"
                )


def _fuse(args: argparse.Namespace) -> None:
    optimizer = getattr(args, "optimizer_type", None) or "AdamW"
    if getattr(args, "use_8bit_adam", False) or optimizer.lower() not in _FUSED:
        raise FlagError(
            f"--speed fused is torch's AdamW (--optimizer_type AdamW, or torch.optim.Adam), not {optimizer}: "
            "take that, or leave fused out"
        )
    options = list(getattr(args, "optimizer_args", None) or ())
    for option in options:
        key, _, value = option.partition("=")
        if (key, value) != ("fused", "True") and key in ("fused", "foreach", "capturable", "differentiable"):
            raise FlagError(f"--speed fused contradicts --optimizer_args {option}: leave one of them out")
    if "fused=True" not in options:
        args.optimizer_args = [*options, "fused=True"]
