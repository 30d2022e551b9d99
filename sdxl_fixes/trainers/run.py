"""A patched trainer's run: which fixes are on and what they share. The same for every adapter, which tells its trainer's side of it."""

from __future__ import annotations

import argparse
import functools
import os
import runpy
import sys
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from sdxl_fixes import __version__
from sdxl_fixes.checkpoint import markers
from sdxl_fixes.flags import FLAGS, FlagError, Settings
from sdxl_fixes.loss import Loss, ScheduledHuber
from sdxl_fixes.objective import EPSILON_AT_ZERO_SNR, Objective
from sdxl_fixes.schedule import NoiseSchedule
from sdxl_fixes.tables import Table
from sdxl_fixes.timesteps import TimestepSampler
from sdxl_fixes.trainers.patching import PatchSet
from sdxl_fixes.trainers.stable_loss import IMAGES, StableLoss
from sdxl_fixes.validation import Validation
from sdxl_fixes.weighting import Product, Weighting


@dataclass(frozen=True)
class Fix:
    """One fix of a trainer.

    flags       which flags bring it into play, for the report
    wanted      whether they do in a run
    describe    what it does in a run that has it on, for the report
    every_step  whether it must have been reached by the end of the first training step
    """

    flags: str
    wanted: Callable[[argparse.Namespace, Settings], bool]
    describe: Callable[[Run], str]
    every_step: bool = False


@dataclass(frozen=True)
class Trainer:
    """What an adapter says of its trainer.

    name        for reports and errors
    v_flag      how its user asks for v-prediction
    fixes       by name, in the report's order
    flag_fixes  flags of ours that mean nothing unless their fix is on
    """

    name: str
    v_flag: str
    fixes: Mapping[str, Fix]
    flag_fixes: Mapping[str, str]


@dataclass(frozen=True)
class Run:
    """One training run: the checked settings, the schedule they describe, and the fixes that are on."""

    trainer: Trainer
    args: argparse.Namespace
    settings: Settings
    schedule: NoiseSchedule
    prediction_type: str
    on: frozenset[str]
    timesteps: TimestepSampler | None = None
    weightings: tuple[Weighting, ...] = ()
    stable_loss: StableLoss | None = None
    step: dict[str, Any] = field(default_factory=dict)  # passed from one patch to the next within a training step

    @classmethod
    def start(
        cls,
        trainer: Trainer,
        args: argparse.Namespace,
        settings: Settings,
        patches: PatchSet,
        prediction_type: str,
        schedule: NoiseSchedule,
        weightings: tuple[Weighting, ...] = (),
        resumed: bool = False,
        **timestep_range: int | None,
    ) -> Run:
        """Decide from the trainer's parsed arguments, and print the report. Raises FlagError (before any model is loaded) for
        contradictory flags and for a fix that was asked for but does not fit this version of the trainer."""
        allowed = parse_fixes(getattr(args, "fixes", None) or "all", trainer.fixes)
        wanted = {name for name, fix in trainer.fixes.items() if fix.wanted(args, settings)}
        for flag, fix in trainer.flag_fixes.items():
            if getattr(args, flag, None) not in (None, False, FLAGS.get(flag, {}).get("default")) and fix not in allowed:
                raise FlagError(f"--{flag} needs the fix {fix!r}, which --fixes {args.fixes} switches off: drop one of them")
        for fix in sorted(wanted & allowed & set(patches.refused)):
            raise FlagError(
                f"the fix {fix!r}, which your flags ask for, does not fit this {trainer.name.rpartition('/')[2]} "
                f"({patches.refused[fix]}): --fixes all,-{fix} trains with upstream's own behaviour"
            )
        if prediction_type == "epsilon" and schedule.residual_signal == 0:
            warnings.warn(EPSILON_AT_ZERO_SNR.replace("v_prediction", trainer.v_flag), stacklevel=3)
        sampler = settings.timesteps(
            schedule,
            seed=getattr(args, "seed", None) or 0,
            rank=int(os.environ.get("RANK", "0")),
            world_size=int(os.environ.get("WORLD_SIZE", "1")),
            accumulation=getattr(args, "gradient_accumulation_steps", None) or 1,
            **timestep_range,
        )
        on = frozenset(wanted & allowed)
        run = cls(trainer, args, settings, schedule, prediction_type, on, sampler, weightings)
        if "validation" in on:
            run = replace(run, stable_loss=run._stable_loss(resumed))
        if os.environ.get("RANK", "0") == "0":
            print(run.report(patches, allowed, wanted), file=sys.stderr, flush=True)
        return run

    def report(self, patches: PatchSet, allowed: frozenset[str], wanted: set[str]) -> str:
        """What is on, what is off and why: one line per fix, one per patch that is on."""
        lines = [f"sdxl-fixes {__version__} in {self.trainer.name}"]
        for name, fix in self.trainer.fixes.items():
            if name in self.on:
                lines.append(f"  {name:<10} on   {fix.describe(self)}")
                lines += [f"  {'':<15}{patch.target.partition(':')[2]}: {patch.purpose}" for patch in patches.patches if patch.fix == name]
            elif name in patches.refused:
                lines.append(f"  {name:<10} REFUSED  {patches.refused[name]}")
            elif name not in allowed:
                lines.append(
                    f"  {name:<10} off  by --fixes" + (", though flags ask for it: upstream's own behaviour" if name in wanted else "")
                )
            else:
                lines.append(f"  {name:<10} off  no flag asks for it ({fix.flags})")
        return "\n".join(lines)

    def _stable_loss(self, resumed: bool) -> StableLoss:
        weighting = Product(self.weightings) if self.weightings else None
        with warnings.catch_warnings():  # of epsilon at zero SNR, which was said
            warnings.simplefilter("ignore", UserWarning)
            objective = Objective(self.schedule, self.prediction_type, self.settings.loss(), weighting)
        return StableLoss(
            Validation(objective),
            self.settings.stable_loss_steps or 1,
            self.settings.stable_loss_images or IMAGES,
            int(os.environ.get("RANK", "0")),
            int(os.environ.get("WORLD_SIZE", "1")),
            getattr(self.args, "output_dir", None),
            resumed,
        )

    def sample_weights(self, timesteps: torch.Tensor) -> torch.Tensor | None:
        """What the step will multiply each sample's loss by: the weights of all flags and of the timestep sampler, [B]; None for 1."""
        chosen = self.weightings if "weighting" in self.on else ()
        parts = [weight_table(weighting, self.schedule, self.prediction_type)(timesteps) for weighting in chosen]
        importance = self.timesteps.weights(timesteps) if self.timesteps and "timesteps" in self.on else None
        parts += [] if importance is None else [importance]
        return functools.reduce(torch.mul, parts) if parts else None


# What the report says of the fixes that every trainer has.
def describe_schedule(run: Run) -> str:
    stock = NoiseSchedule.sdxl()
    return (
        f"{run.prediction_type}, terminal sigma {run.schedule.terminal_sigma:.6g} instead of {stock.terminal_sigma:.4g} "
        f"({100 * run.schedule.residual_signal:.2g} % of the image left instead of {100 * stock.residual_signal:.2g} %)"
    )


def describe_loss(run: Run) -> str:
    return repr(run.settings.loss())


def describe_weighting(run: Run) -> str:
    if all(weighting.table(run.schedule, run.prediction_type)[-1] > 0 for weighting in run.weightings):
        return "finite at SNR 0" + (", terminal steps kept" if run.settings.min_snr_floor else "")
    return "finite, but 0 at the last timestep, which is then not learnt; min-SNR with --min_snr_floor learns it (docs/evidence/min-snr.md)"


def describe_timesteps(run: Run) -> str:
    return f"stratified={run.settings.stratified_timesteps}, terminal share {run.settings.terminal_timestep_share or 0:g}"


def wants_stable_loss(args: argparse.Namespace, settings: Settings) -> bool:
    return bool(settings.stable_loss_steps)


def describe_validation(run: Run, trained_text: bool = False) -> str:
    images = run.settings.stable_loss_images or IMAGES
    embeddings = "; their text embeddings stay as first seen, though the text encoder is trained" if trained_text else ""
    return f"stable loss of the first {images} images, every {run.settings.stable_loss_steps} steps{embeddings}"


def describe_previews(run: Run) -> str:
    return "sample what is trained"


def describe_saving(run: Run) -> str:
    stock_epsilon = run.schedule == NoiseSchedule.sdxl() and run.prediction_type == "epsilon"
    no_marker = "none needed" if stock_epsilon else "none (no UI has one for this table)"
    return f"the record, and markers: {', '.join(markers(run.schedule, run.prediction_type)) or no_marker}"


def parse_fixes(text: str, known: Collection[str]) -> frozenset[str]:
    """``all``, ``none``, names, or ``all,-name``: the fixes that may be switched on. Raises FlagError for an unknown name."""
    chosen: set[str] = set()
    for word in (word.strip() for word in text.split(",")):
        names = {"all": set(known), "none": set[str]()}.get(word.lstrip("-"), {word.lstrip("-")})
        if not names <= set(known):
            raise FlagError(
                f"--fixes: unknown fix {word.lstrip('-')!r}: expected all, none, or some of {', '.join(known)} (-name leaves one out)"
            )
        chosen = chosen - names if word.startswith("-") else chosen | names
    return frozenset(chosen)


def add_fixes_flag(parser: Any, known: Collection[str]) -> None:
    """Add ``--fixes``."""
    parser.add_argument(
        "--fixes",
        default=None,
        help=f"which sdxl-fixes may act: all (default), none, or a list of {', '.join(known)}; -name leaves one out",
    )


@functools.lru_cache(maxsize=4)
def delta_table(loss: Loss | ScheduledHuber, schedule: NoiseSchedule) -> Table | None:
    """Delta of every timestep; None for a loss that has none."""
    delta = loss.delta(schedule)
    return None if delta is None else Table(delta)


@functools.lru_cache(maxsize=8)
def weight_table(weighting: Weighting, schedule: NoiseSchedule, prediction_type: str) -> Table:
    """Weight of every timestep."""
    return Table(weighting.table(schedule, prediction_type))


class Session:
    """What the patches of a trainer share within the process: the patch set, and the run once its arguments are known."""

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
        fixes = {} if self.run is None else self.run.trainer.fixes
        missed = [name for name, fix in fixes.items() if fix.every_step and name in self.run.on and not self.patches.calls.get(name)]  # type: ignore[union-attr]
        if missed:
            raise RuntimeError(
                f"sdxl-fixes: {', '.join(missed)} asked for but never reached in the first training step: this trainer does not call "
                f"what we patch; leave out its flags or give --fixes all,{','.join('-' + fix for fix in missed)}"
            )


def run_script(script: Path, install: Callable[[], None], session: Session) -> None:
    """Run an unmodified training script, whose path is the first argument of this process, with the adapter's patches installed. What the
    user can put right ends the process with one sentence."""
    sys.path.insert(0, str(script.resolve().parent))  # what python itself does for a script; runpy does not
    sys.argv = sys.argv[1:]
    try:
        install()
        runpy.run_path(str(script), run_name="__main__")
    except FlagError as error:
        print(f"sdxl-fixes: {error}", file=sys.stderr, flush=True)
        sys.exit(2)  # argparse's own status for wrong flags
    except RuntimeError as error:
        if str(error).startswith("sdxl-fixes: "):
            sys.exit(str(error))
        raise
    session.check_reached()
