"""A patched trainer's run: what its flags describe, built once, and the fixes that are on. The same for every
adapter."""

from __future__ import annotations

import argparse
import contextlib
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sdxl_fixes.checkpoint import Sampling
from sdxl_fixes.errors import FlagError
from sdxl_fixes.flags import STABLE_LOSS_IMAGES, TrainingFlags
from sdxl_fixes.log import rank, world_size
from sdxl_fixes.names import FLOW
from sdxl_fixes.noise import InputPerturbation
from sdxl_fixes.objective import Objective
from sdxl_fixes.schedule import NoiseSchedule
from sdxl_fixes.teacher import Teacher
from sdxl_fixes.timesteps import TimestepSampler
from sdxl_fixes.trainers.base import Base
from sdxl_fixes.trainers.ema import Average
from sdxl_fixes.trainers.fixes import Fix
from sdxl_fixes.trainers.heldout import HeldOut
from sdxl_fixes.trainers.keep import Keep
from sdxl_fixes.trainers.noising import Noising
from sdxl_fixes.trainers.stable_loss import StableLoss
from sdxl_fixes.trainers.step import StepLoss
from sdxl_fixes.validation import Validation
from sdxl_fixes.weighting import Product, Weighting

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Trainer:
    """What an adapter says of its trainer.

    name    for reports and errors
    v_flag  how its user asks for v-prediction
    fixes   by name, in the report's order
    """

    name: str
    v_flag: str
    fixes: Mapping[str, Fix]


@dataclass(frozen=True)
class Run:
    """One training run: the checked flags, the schedule they describe, the fixes that are on, and what they
    work with."""

    trainer: Trainer
    args: argparse.Namespace
    flags: TrainingFlags
    schedule: NoiseSchedule
    prediction_type: str
    on: frozenset[str]
    weighting: Weighting | None
    step_loss: StepLoss
    noising: Noising
    perturbation: InputPerturbation | None
    timesteps: TimestepSampler | None
    stable_loss: StableLoss | None
    heldout: HeldOut | None
    keep: Keep | None
    ema: Average | None
    # "step" or "start" -> marks that must have been seen
    due: Mapping[str, frozenset[str]] = field(default_factory=dict)
    options: Any = None  # the adapter's own
    base: Base | None = None  # that decided

    @property
    def evaluated(self) -> list[StableLoss | HeldOut]:
        """The losses that are computed every so many steps."""
        return [kept for kept in (self.stable_loss, self.heldout) if kept is not None]

    def numbers(self, step: int, accelerator: Accelerator) -> dict[str, float]:
        """What is to be logged of them after optimizer step ``step``, in every process."""
        found: dict[str, float] = {}
        with contextlib.ExitStack() as stack:
            if (
                self.ema is not None
                and self.flags.ema_evaluated
                and any(step % kept.every == 0 for kept in self.evaluated)
            ):
                stack.enter_context(self.ema.applied())
            for kept in self.evaluated:
                found |= kept.step(step, accelerator) or {}
        return found

    def fixes_of(self, mark: str) -> list[str]:
        """The fixes that a mark of work belongs to."""
        fixes = self.trainer.fixes
        return [name for name in self.on if mark in (name, *fixes[name].parts.values(), *fixes[name].first)]


def prepare(
    trainer: Trainer,
    args: argparse.Namespace,
    on: frozenset[str],
    refused: Mapping[str, str],
    flags: TrainingFlags,
    trained: Sampling,
    weightings: tuple[Weighting, ...] = (),
    resumed: bool = False,
    timestep_range: tuple[int, int | None] = (0, None),
    options: Any = None,
    base: Base | None = None,
    teacher: Sampling | None = None,
) -> Run:
    """The run of the fixes ``on``. Raises FlagError, before any model is loaded, for one that does not fit
    this version (``refused``: fix -> why) and for values that make no sense together. ``base`` is the
    model that decides, ``teacher``, which the fix keep needs, how the one that is trained on is sampled."""
    for fix in sorted(on & set(refused)):
        raise FlagError(
            f"the fix {fix!r}, which your flags ask for, does not fit this {trainer.name.rpartition('/')[2]} "
            f"({refused[fix]}): --fixes all,-{fix} trains with upstream's own behaviour"
        )
    schedule, prediction_type = trained.schedule, trained.prediction_type
    for fix in ("schedule", "loss", "weighting") if prediction_type == FLOW else ():
        if fix not in on and fix in trainer.fixes and trainer.fixes[fix].asked(args):
            raise FlagError(
                f"{FLOW} needs the fix {fix!r}, since the trainer's own code knows epsilon and v-prediction "
                f"only: take it into --fixes, or leave out {trainer.fixes[fix].text}"
            )
    watching = {"validation": "--stable_loss_steps", "heldout": "--heldout_steps"}
    if (asked := [flag for fix, flag in watching.items() if fix in on]) and (compiler := _compiler(args)):
        raise FlagError(f"{asked[0]} cannot see what a compiled U-Net is given: leave it out, or {compiler}")
    sampler = flags.timesteps(
        schedule,
        seed=getattr(args, "seed", None) or 0,
        rank=rank(),
        world_size=world_size(),
        accumulation=getattr(args, "gradient_accumulation_steps", None) or 1,
        min_timestep=timestep_range[0],
        max_timestep=timestep_range[1],
    )
    weighting = Product(weightings) if len(weightings) > 1 else next(iter(weightings), None)
    if (
        {"loss", "weighting"} & on == {"loss"}
        and weighting is not None
        and flags.huber_l2_gradient == "batch"
    ):
        raise FlagError(
            "--huber_l2_gradient batch must know the weights of the loss, and --fixes leaves them to the "
            "trainer: switch weighting on, "
            "too, or take --huber_l2_gradient sample"
        )
    perturbation = flags.perturbation if "noise" in on else None
    loss = flags.loss if "loss" in on else None
    known = argparse.Namespace(**{**vars(args), "trains_flow": prediction_type == FLOW})
    try:
        step_loss = StepLoss(schedule, prediction_type, loss, weighting if "weighting" in on else None)
    except ValueError as error:  # other weightings are of every prediction and SNR
        raise FlagError(f"--flow_weighting: {error}") from error
    due: dict[str, frozenset[str]] = {
        when: frozenset(
            mark
            for name in on
            if trainer.fixes[name].due == when
            for mark in (name, *trainer.fixes[name].marks(known))
        )
        for when in ("step", "start")
    }
    due["start"] |= {mark for name in on for mark in trainer.fixes[name].first}
    return Run(
        trainer=trainer,
        args=args,
        flags=flags,
        schedule=schedule,
        prediction_type=prediction_type,
        on=on,
        weighting=weighting,
        step_loss=step_loss,
        noising=Noising(trained, perturbation),
        perturbation=perturbation,
        timesteps=sampler if "timesteps" in on else None,
        stable_loss=_stable_loss(args, flags, trained, weighting, resumed) if "validation" in on else None,
        heldout=_heldout(flags, trained, weighting) if "heldout" in on else None,
        keep=_keep(flags, teacher, trained) if "keep" in on else None,
        ema=Average(flags.ema_decay) if "ema" in on and flags.ema_decay else None,
        due=due,
        options=options,
        base=base,
    )


def _compiler(args: argparse.Namespace) -> str:
    """What has the whole U-Net compiled, as a flag; "" where nothing has. A trainer's own flag overrules the
    launcher's environment."""
    if hasattr(args, "torch_compile"):
        return "--torch_compile" if args.torch_compile else ""
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    return "" if backend == "no" else f"--dynamo_backend {backend} of accelerate launch"


def _keep(flags: TrainingFlags, base: Sampling | None, new: Sampling) -> Keep:
    assert base is not None and flags.keep_base is not None
    if base == new:
        raise FlagError(
            f"--keep_base converts a model, and the base is sampled already as your flags train, {base}: "
            "leave it out, or give the flags of what it shall become"
        )
    try:
        parts = (base.schedule, base.prediction_type, new.schedule, new.prediction_type)
        return Keep(Teacher(*parts, flags.keep_base), base)
    except ValueError as error:
        raise FlagError(f"--keep_base: {error}") from error


def _stable_loss(
    args: argparse.Namespace,
    flags: TrainingFlags,
    trained: Sampling,
    weighting: Weighting | None,
    resumed: bool,
) -> StableLoss:
    return StableLoss(
        _validation(flags, trained, weighting),
        flags.stable_loss_steps or 1,
        flags.stable_loss_images or STABLE_LOSS_IMAGES,
        rank(),
        world_size(),
        getattr(args, "output_dir", None),
        resumed,
    )


def _heldout(flags: TrainingFlags, trained: Sampling, weighting: Weighting | None) -> HeldOut:
    validation = _validation(flags, trained, weighting)
    return HeldOut(validation, flags.heldout_steps or 1, rank(), world_size())


def _validation(flags: TrainingFlags, trained: Sampling, weighting: Weighting | None) -> Validation:
    with warnings.catch_warnings():  # of epsilon at zero SNR, which the report says
        warnings.simplefilter("ignore", UserWarning)
        return Validation(Objective(trained.schedule, trained.prediction_type, flags.loss, weighting))
