"""What a run says at its start: four lines that a person reads, then what will disappoint."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from sdxl_fixes.checkpoint import Sampling, flow_shift
from sdxl_fixes.flags import TrainingFlags
from sdxl_fixes.log import say, warn
from sdxl_fixes.loss import ScheduledHuber
from sdxl_fixes.names import FLOW
from sdxl_fixes.objective import EPSILON_AT_ZERO_SNR
from sdxl_fixes.schedule import NoiseSchedule
from sdxl_fixes.trainers.fixes import without_effect
from sdxl_fixes.trainers.run import Run
from sdxl_fixes.version import __version__
from sdxl_fixes.weighting import (
    Debiased,
    EpsilonLike,
    FlowMatching,
    MinSNR,
    PlusVLike,
    Product,
    SoftMinSNR,
    Weighting,
)


def tell(
    run: Run,
    may_act: Collection[str],
    dropped: Sequence[str],
    version: str,
    prompts: Iterable[str] = (),
    files: Iterable[str] = (),
) -> None:
    """Say the report, then warn of what ``--fixes`` switched off (``dropped``: flags of ours that have no
    effect now), of flags that do nothing, and of what will disappoint. ``may_act``: the fixes that
    ``--fixes`` allows."""
    say(report(run, version, prompts, files))
    args, fixes = run.args, run.trainer.fixes
    if dropped:
        warn(
            f"--fixes {args.fixes}: {', '.join(f'--{flag}' for flag in dropped)} "
            f"{'has' if len(dropped) == 1 else 'have'} no effect"
        )
    for name, fix in fixes.items():
        if name not in may_act and fix.asked(args):
            warn(f"--fixes {args.fixes}: {name} is upstream's own, though flags ask for it")
    for line in (*without_effect(fixes, args), *disappointments(run)) if may_act else ():
        warn(line)


def report(run: Run, version: str, prompts: Iterable[str] = (), files: Iterable[str] = ()) -> str:
    """The lines. ``version`` says what is known of this version of the trainer; ``prompts`` and ``files`` are
    what only the adapter knows of data and of what is saved."""
    head = f"{__version__} in {run.trainer.name}{f' ({version})' if version else ''}"
    base = [] if run.base is None else [f"  {'base':<9}  {run.base}"]
    if not run.on:
        return "\n".join([f"{head}: no fix is on, it trains as upstream does", *base])
    lines = {
        "objective": _objective(run),
        "weights": [_weights(run)],
        "data": [*prompts, _timesteps(run), _stable_loss(run), _heldout(run)],
    }
    lines["file"] = [*files] or ["as upstream saves it"]
    lines["file"] += [f"beside it the weights' average, decay {run.ema.decay:g}"] if run.ema else []
    return "\n".join(
        [
            head,
            *base,
            *(f"  {name:<9}  {'; '.join(part for part in parts if part)}" for name, parts in lines.items()),
        ]
    )


def _objective(run: Run) -> list[str]:
    parts = [f"{run.prediction_type} on {_schedule(run)}", _loss(run)]
    perturbation = run.flags.perturbation
    if perturbation is not None:
        parts.append(f"input perturbation {'0 to ' if perturbation.random else ''}{perturbation.gamma:g}")
    if run.keep is not None:
        share, base = run.keep.teacher.share, run.keep.base
        parts.append(
            f"{100 * share:g} % of the target the frozen base's own ({base}), data alone at other sigmas"
        )
    return parts


def _schedule(run: Run) -> str:
    stock = NoiseSchedule.sdxl()
    if run.prediction_type == FLOW:
        shift = flow_shift(run.schedule)
        density = "a table of its own" if shift is None else f"shift {shift:g}"
        return f"{density} (told 1000 s, to 1000; nothing of the image left at the end)"
    if run.schedule == stock:
        return (
            f"SDXL's own schedule (sigma to {stock.terminal_sigma:.3g}, {100 * stock.residual_signal:.2g} % "
            "of the image left at the end)"
        )
    zero = run.schedule.zero_terminal
    end = "zero terminal SNR" if zero else f"sigma to {run.schedule.terminal_sigma:.6g}"
    left = "nothing" if zero else f"{100 * run.schedule.residual_signal:.2g} %"
    by = "" if "schedule" in run.on or zero else ", as the base"
    return f"{end}{by} ({left} of the image left; SDXL's own: {100 * stock.residual_signal:.2g} %)"


def _loss(run: Run) -> str:
    loss = run.step_loss.function if "loss" in run.on else None
    if not isinstance(loss, ScheduledHuber):
        return f"{run.flags.loss_type} loss"
    delta = loss.delta(run.schedule)
    gradient = f", l2's gradient per {loss.l2_gradient}" if loss.l2_gradient else ""
    return f"{loss.kind} loss, delta {delta.max():.3g} to {delta.min():.3g} ({loss.schedule}){gradient}"


def _weights(run: Run) -> str:
    if run.weighting is None:
        return "every timestep counts the same"
    by = "" if "weighting" in run.on else ", by the trainer itself"
    return _named(run.weighting) + by


def _named(weighting: Weighting) -> str:
    if isinstance(weighting, Product):
        return " times ".join(map(_named, weighting.parts))
    if isinstance(weighting, MinSNR):
        return f"min-SNR, gamma {weighting.gamma:g}" + (
            ", floor 1 at the last timesteps" if weighting.floor else ", without a floor"
        )
    if isinstance(weighting, SoftMinSNR):
        return f"soft min-SNR, gamma {weighting.gamma:g}"
    if isinstance(weighting, FlowMatching):
        return "weighted as rectified flow's loss"
    if isinstance(weighting, PlusVLike):
        return f"v-like loss added, {weighting.amount:g}"
    return {Debiased: "debiased estimation", EpsilonLike: "v loss scaled like eps"}.get(
        type(weighting), repr(weighting)
    )


def _timesteps(run: Run) -> str:
    sampler = run.timesteps
    if sampler is None:
        return "timesteps drawn uniformly"
    share, flags = run.flags.terminal_timestep_share or 0.0, run.flags
    words = ["timesteps stratified over the optimizer step"] if sampler.stratified else ["timesteps"]
    if sampler.density is not None:
        uniform = flags.timestep_uniform_share
        words.append(f"{sampler.density}" + (f" but for {100 * uniform:g} % uniform" if uniform else ""))
        words.append("importance-weighted" if sampler.weighted else "so the expected loss is another")
    words += [f"{100 * share:g} % above SDXL's last sigma, importance-weighted"] if share else []
    base = sampler.base
    words += [f"sigma times the canvas's side over {base}"] if base else []
    return ", ".join(words)


def _stable_loss(run: Run) -> str:
    kept = run.stable_loss
    return "" if kept is None else f"stable loss of {kept.images} images every {kept.every} steps"


def _heldout(run: Run) -> str:
    return "" if run.heldout is None else f"held-out loss every {run.heldout.every} steps"


def disappointments(run: Run) -> list[str]:
    """Sentences about what these flags will not give."""
    found = []
    epsilon, sigma = run.prediction_type == "epsilon", run.schedule.terminal_sigma
    if epsilon and run.schedule.zero_terminal:
        found.append(EPSILON_AT_ZERO_SNR.replace("v_prediction", run.trainer.v_flag))
    elif epsilon and sigma > 2 * NoiseSchedule.sdxl().terminal_sigma:
        found.append(
            f"epsilon prediction at sigma {sigma:.4g}: a network that hardly feels how large its input is "
            "samples noise until it is well trained, so a short training may do so, and a long one can do "
            f"well; {run.trainer.v_flag} is safe at any sigma"
        )
    if run.keep is not None:
        for name in ("noise_offset", "multires_noise_iterations"):
            if getattr(run.args, name, None):
                found.append(
                    f"--keep_base with --{name}: the base was not trained on such noise, and teaches its own "
                    "prediction all the same"
                )
    parts = run.weighting.parts if isinstance(run.weighting, Product) else (run.weighting,)
    if (
        any(isinstance(part, MinSNR) and not part.floor for part in parts)
        and run.prediction_type != "epsilon"
    ):
        found.append(
            "min-SNR without --min_snr_floor gives the noisy half of the timesteps little weight, the last "
            "ones none at zero terminal SNR: "
            "short trainings learn less there (docs/min-snr.md)"
        )
    return [*found, *_of_draws(run), *_of_stable_loss(run)]


def _of_draws(run: Run) -> list[str]:
    """Sentences about what a density of timesteps will not give."""
    sampler, found = run.timesteps, list[str]()
    if sampler is None or sampler.density is None:
        return found
    if sampler.effective < 0.5:
        found.append(
            f"the importance weights of --timestep_density {run.flags.timestep_density} leave "
            f"{100 * sampler.effective:.2g} % of the samples' worth: a larger --timestep_uniform_share "
            "leaves more"
        )
    last = float(sampler.probabilities[-1]) * len(run.schedule)
    if run.schedule.zero_terminal and sampler.max_timestep == len(run.schedule) and last < 0.01:
        found.append(
            f"--timestep_density {run.flags.timestep_density} hardly draws the last timestep, where sampling "
            f"begins on pure noise ({last:.1g} times as often as uniform draws do): --timestep_uniform_share "
            "0.1 draws it"
        )
    return found


def _of_stable_loss(run: Run) -> list[str]:
    """A sentence where the training ends before its first number."""
    steps = getattr(run.args, "max_train_steps", None)
    by_epochs = getattr(run.args, "max_train_epochs", None)  # kohya's, which overrules the steps
    if by_epochs or not isinstance(steps, int):
        return []
    return [
        f"--{flag} {kept.every}: no number in a training of {steps} steps: give fewer steps"
        for flag, kept in (("stable_loss_steps", run.stable_loss), ("heldout_steps", run.heldout))
        if kept is not None and steps < kept.every
    ]


def lost_above(rate: float) -> float | None:
    """The size of bfloat16 weights above which a step of ``rate`` is lost where they are rounded to nearest:
    of 8 significant bits, a weight w is at least w/512 from where it would round up. None where that is no
    small weight."""
    return 512 * rate if 0 < rate < 1 / 512 else None


def sampling_flags(trained: Sampling) -> str | None:
    """The flags that train on ``trained``; None if no flags do."""
    words = f"--prediction_type {trained.prediction_type}"
    if trained.prediction_type == FLOW:
        shift = flow_shift(trained.schedule)
        return None if shift is None else f"{words} --flow_shift {shift:g}"
    schedule = _schedule_flags(trained.schedule)
    return None if schedule is None else f"{words} {schedule}".strip()


def _schedule_flags(schedule: NoiseSchedule) -> str | None:
    """The flags that make ``schedule`` of SDXL's own: "" for SDXL's own, None if no flags do."""
    if schedule == NoiseSchedule.sdxl():
        return ""
    if schedule == NoiseSchedule.sdxl().zero_terminal_snr():
        return "--zero_terminal_snr"
    if schedule.zero_terminal:
        return None
    last = schedule.changes[-1] if schedule.changes else None
    method, start = ("beta_end", None) if last is None else (last.method, last.start)
    sigma = float(f"{schedule.terminal_sigma:.6g}")
    try:
        made = TrainingFlags(
            terminal_sigma=sigma, terminal_sigma_method=method, terminal_sigma_start=start
        ).schedule()
    except ValueError:
        return None
    words = f"--terminal_sigma {sigma:.6g} --terminal_sigma_method {method}" + (
        "" if start is None else f" --terminal_sigma_start {start}"
    )
    return words if made == schedule else None
