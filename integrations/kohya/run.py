"""The training run that the patches serve: its settings, and which fixes are switched on."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from sdxl_fixes import __version__
from sdxl_fixes.checkpoint import markers
from sdxl_fixes.flags import FlagError, Settings
from sdxl_fixes.loss import HUBER_KINDS, HUBER_SCHEDULES, LOSS_TYPES
from sdxl_fixes.objective import EPSILON_AT_ZERO_SNR
from sdxl_fixes.patching import PatchSet
from sdxl_fixes.schedule import NoiseSchedule
from sdxl_fixes.timesteps import TimestepSampler
from sdxl_fixes.weighting import EpsilonLike, PlusVLike, Weighting


def weightings(args: argparse.Namespace, settings: Settings) -> tuple[Weighting, ...]:
    """Every weighting of the loss that kohya's flags ask for; it multiplies them."""
    found = list(settings.weightings().values())
    if getattr(args, "scale_v_pred_loss_like_noise_pred", False):
        found.append(EpsilonLike())
    if amount := getattr(args, "v_pred_like_loss", None):
        found.append(PlusVLike(amount))
    return tuple(found)


# fix -> (which flags bring it into play, whether they do in this run)
FIXES: dict[str, tuple[str, Callable[[argparse.Namespace, Settings], bool]]] = {
    "schedule": ("--zero_terminal_snr, --terminal_sigma", lambda args, settings: settings.changes_schedule),
    "loss": ("--loss_type huber, smooth_l1", lambda args, settings: settings.loss_type in HUBER_KINDS),
    "weighting": (
        "--min_snr_gamma, --debiased_estimation_loss, --v_pred_like_loss, --scale_v_pred_loss_like_noise_pred",
        lambda args, settings: bool(weightings(args, settings)),
    ),
    "noise": (
        "--ip_noise_gamma_random_strength",
        lambda args, settings: settings.perturbation() is not None and settings.ip_noise_gamma_random_strength,
    ),
    "timesteps": (
        "--stratified_timesteps, --terminal_timestep_share",
        lambda args, settings: bool(settings.stratified_timesteps or settings.terminal_timestep_share),
    ),
    "buckets": ("--chunk_buckets", lambda args, settings: bool(getattr(args, "chunk_buckets", False))),
    "previews": ("--zero_terminal_snr, --terminal_sigma", lambda args, settings: settings.changes_schedule),
    "saving": (
        "--zero_terminal_snr, --terminal_sigma, --v_parameterization",
        lambda args, settings: bool(settings.changes_schedule or getattr(args, "v_parameterization", False)),
    ),
}
EVERY_STEP = ("schedule", "loss", "weighting", "noise", "timesteps", "buckets")  # reached by the end of the first training step
# plugin flags that mean nothing unless their fix is on
FLAG_FIXES = {
    "terminal_sigma": "schedule",
    "huber_l2_gradient": "loss",
    "min_snr_floor": "weighting",
    "stratified_timesteps": "timesteps",
    "terminal_timestep_share": "timesteps",
    "chunk_buckets": "buckets",
}


def parse_fixes(text: str) -> frozenset[str]:
    """``all``, ``none``, names, or ``all,-name``: the fixes that may be switched on. Raises FlagError for an unknown name."""
    chosen: set[str] = set()
    for word in (word.strip() for word in text.split(",")):
        names = {"all": set(FIXES), "none": set[str]()}.get(word.lstrip("-"), {word.lstrip("-")})
        if not names <= set(FIXES):
            raise FlagError(
                f"--fixes: unknown fix {word.lstrip('-')!r}: expected all, none, or some of {', '.join(FIXES)} (-name leaves one out)"
            )
        chosen = chosen - names if word.startswith("-") else chosen | names
    return frozenset(chosen)


@dataclass(frozen=True)
class Run:
    """One training run: the checked settings, the schedule they describe, and the fixes that are on."""

    settings: Settings
    schedule: NoiseSchedule
    prediction_type: str
    on: frozenset[str]
    timesteps: TimestepSampler | None = None
    weightings: tuple[Weighting, ...] = ()
    chunks: Any = None  # buckets.Options, with --chunk_buckets
    step: dict[str, torch.Tensor | None] = field(default_factory=dict)  # passed from one patch to the next within a training step

    @classmethod
    def start(cls, args: argparse.Namespace, patches: PatchSet, chunks: Any = None) -> Run:
        """Read kohya's parsed arguments. Raises FlagError (before any model is loaded) for wrong or contradictory flags and for a
        fix that was asked for but does not fit this version of sd-scripts."""
        allowed = parse_fixes(getattr(args, "fixes", None) or "all")
        settings = Settings.from_args(_known(args))
        wanted = {name for name, (_, in_play) in FIXES.items() if in_play(args, settings)}
        for flag, fix in FLAG_FIXES.items():
            if getattr(args, flag, None) and fix not in allowed:
                raise FlagError(f"--{flag} needs the fix {fix!r}, which --fixes {args.fixes} switches off: drop one of them")
        for fix in sorted(wanted & allowed & set(patches.refused)):
            raise FlagError(
                f"the fix {fix!r}, which your flags ask for, does not fit this sd-scripts ({patches.refused[fix]}): "
                f"--fixes all,-{fix} trains with upstream's own behaviour"
            )
        prediction_type = "v_prediction" if getattr(args, "v_parameterization", False) else "epsilon"
        schedule = settings.schedule()
        if prediction_type == "epsilon" and schedule.residual_signal == 0:
            warnings.warn(EPSILON_AT_ZERO_SNR.replace("v_prediction", "--v_parameterization"), stacklevel=2)
        sampler = settings.timesteps(
            min_timestep=getattr(args, "min_timestep", None) or 0,
            max_timestep=getattr(args, "max_timestep", None),
            seed=getattr(args, "seed", None) or 0,
            rank=int(os.environ.get("RANK", "0")),
            world_size=int(os.environ.get("WORLD_SIZE", "1")),
            accumulation=getattr(args, "gradient_accumulation_steps", None) or 1,
        )
        run = cls(settings, schedule, prediction_type, frozenset(wanted & allowed), sampler, weightings(args, settings), chunks)
        if os.environ.get("RANK", "0") == "0":
            print(run.report(patches, allowed, wanted), file=sys.stderr, flush=True)
        return run

    def report(self, patches: PatchSet, allowed: frozenset[str], wanted: set[str]) -> str:
        """What is on, what is off and why: one line per fix, one per patch that is on."""
        lines = [f"sdxl-fixes {__version__} in kohya-ss/sd-scripts"]
        for fix, (flags, _) in FIXES.items():
            if fix in self.on:
                lines.append(f"  {fix:<10} on   {self._describe(fix)}")
                lines += [f"  {'':<15}{patch.target.partition(':')[2]}: {patch.purpose}" for patch in patches.patches if patch.fix == fix]
            elif fix in patches.refused:
                lines.append(f"  {fix:<10} REFUSED  {patches.refused[fix]}")
            elif fix not in allowed:
                lines.append(
                    f"  {fix:<10} off  by --fixes" + (", though flags ask for it: upstream's own behaviour" if fix in wanted else "")
                )
            else:
                lines.append(f"  {fix:<10} off  no flag asks for it ({flags})")
        return "\n".join(lines)

    def _describe(self, fix: str) -> str:
        if fix == "schedule":
            stock = NoiseSchedule.sdxl()
            return (
                f"{self.prediction_type}, terminal sigma {self.schedule.terminal_sigma:.6g} instead of {stock.terminal_sigma:.4g} "
                f"({100 * self.schedule.residual_signal:.2g} % of the image left instead of {100 * stock.residual_signal:.2g} %)"
            )
        return {
            "loss": repr(self.settings.loss()),
            "weighting": "finite at SNR 0" + (", terminal steps kept" if self.settings.min_snr_floor else ""),
            "noise": repr(self.settings.perturbation()),
            "timesteps": f"stratified={self.settings.stratified_timesteps}, terminal share {self.settings.terminal_timestep_share or 0:g}",
            "buckets": f"aspect x chunk, at most {self.chunks.limit} chunks, {self.chunks.layout} vectors" if self.chunks else "",
            "previews": "sample what is trained",
            "saving": f"markers {', '.join(markers(self.schedule, self.prediction_type)) or 'none (no UI has one for this table)'}",
        }[fix]


def _known(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments without a fork's own losses, which stay the fork's."""
    known = argparse.Namespace(**vars(args))
    if getattr(args, "loss_type", "l2") not in LOSS_TYPES or getattr(args, "huber_schedule", "snr") not in HUBER_SCHEDULES:
        known.loss_type, known.huber_schedule = "l2", "snr"
    return known


class Session:
    """What the patches share within the process: the patch set, and the run once its arguments are known."""

    def __init__(self) -> None:
        self.patches = PatchSet(())
        self.run: Run | None = None

    def on(self, fix: str) -> Run | None:
        """The run if ``fix`` is switched on in it, which also counts it as reached; else None."""
        if self.run is None or fix not in self.run.on:
            return None
        self.patches.reached(fix)
        return self.run

    def check_reached(self) -> None:
        """Raise RuntimeError if a fix that is on has not been reached although a training step is over."""
        missed = [] if self.run is None else [fix for fix in EVERY_STEP if fix in self.run.on and not self.patches.calls.get(fix)]
        if missed:
            raise RuntimeError(
                f"sdxl-fixes: {', '.join(missed)} asked for but never reached in the first training step: this trainer does not call "
                f"what we patch; leave out its flags or give --fixes all,{','.join('-' + fix for fix in missed)}"
            )


SESSION = Session()


def report_flags(parser: Any) -> None:
    """Add ``--fixes``."""
    parser.add_argument(
        "--fixes",
        default=None,
        help=f"which sdxl-fixes may act: all (default), none, or a list of {', '.join(FIXES)}; -name leaves one out",
    )
