"""docs/evidence/finetuning.md and its plots, as a function of the runs that benchmarks/finetuning.py has recorded."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import finetuning
import lab
import numpy as np
import pairing
import style

from sdxl_fixes.atomic import replacing

Line = dict[str, Any]
Columns = dict[str, tuple[Callable[[Line], float], int]]  # column -> (where in a line, digits)
Arms = dict[tuple[str, str], dict[int, Line]]  # (experiment, arm) -> seed -> line
SAMPLES: Columns = {
    "slope": (lambda line: line["dpmpp_2m"]["slope"], 2),
    "night": (lambda line: line["dpmpp_2m"]["night"], 2),
    "contrast": (lambda line: line["dpmpp_2m"]["contrast"], 3),
    "distance": (lambda line: line["dpmpp_2m"]["distance"], 2),
    "features": (lambda line: line["dpmpp_2m"]["features"], 2),
    "object, %": (lambda line: 100 * line["dpmpp_2m"]["object"], 0),
    "place, %": (lambda line: 100 * line["dpmpp_2m"]["place"], 0),
}
ANCESTRAL: Columns = {
    "slope, euler_a": (lambda line: line["euler_a"]["slope"], 2),
    "contrast, euler_a": (lambda line: line["euler_a"]["contrast"], 3),
    "features, euler_a": (lambda line: line["euler_a"]["features"], 2),
}
ERRORS: Columns = {
    "error": (lambda line: line["error"], 4),
    "error at 999": (lambda line: line["error_last"], 4),
    "scale, middle": (lambda line: line["scale_middle"], 3),
    "scale, 999": (lambda line: line["scale_last"], 3),
    "gain at 999": (lambda line: line["gain"], 4),
}
FRAME = (-0.5, 2.0)  # of the slopes that a plot shows: what lies outside is written at its edge
PAIRED = ("slope", "night", "features", "object, %")  # whose paired changes are shown
SHOWN = {
    "terminal": "Where the schedule ends",
    "min-SNR": "Min-SNR",
    "Huber": "Huber",
    "pairing": "Noise paired with its picture",
    "perturbation": "Input perturbation",
    "timesteps": "Which timesteps are drawn",
}


def cell(values: Sequence[float], digits: int) -> str:
    """``0.98 ± 0.03``; of one seed the value alone."""
    return lab.show(values, digits) if len(values) > 1 else f"{values[0]:.{digits}f}"


def changed(values: Sequence[float], digits: int) -> str:
    """``+0.05 ± 0.03``, bold where the interval excludes 0; of one seed the value alone."""
    return lab.change(values, digits) if len(values) > 1 else f"{values[0]:+.{digits}f}"


def by_arm(lines: Sequence[Line], steps: int) -> Arms:
    """(experiment, arm) -> seed -> line, of the runs of so many steps, in the arms' order."""
    found: Arms = {}
    for arm in finetuning.ARMS:
        mine = {
            line["seed"]: line
            for line in lines
            if (line["experiment"], line["arm"], line["steps"]) == (arm.experiment, arm.name, steps)
        }
        if mine:
            found[arm.experiment, arm.name] = dict(sorted(mine.items()))
    return found


def reference(found: Arms, experiment: str, name: str) -> tuple[str, dict[int, Line]]:
    """The arm that an arm is compared with, and its lines by seed ({} where it has not run)."""
    arm = next(arm for arm in finetuning.ARMS if (arm.experiment, arm.name) == (experiment, name))
    wanted = finetuning.REFERENCE[experiment](arm)
    return wanted, next((lines for (_, other), lines in found.items() if other == wanted), {})


def rows_of(found: Arms, experiment: str) -> list[tuple[str, dict[int, Line]]]:
    """An experiment's arms with those that they are compared with."""
    mine = [name for kind, name in found if kind == experiment]
    wanted = [reference(found, experiment, name)[0] for name in mine]
    names = dict.fromkeys([*(name for name in wanted if name not in mine), *mine])
    every = {name: lines for (_, name), lines in found.items()}
    return [(name, every[name]) for name in names if name in every]


def table(rows: Sequence[tuple[str, dict[int, Line]]], columns: Columns, truth: Line | None) -> list[str]:
    lines = [f"| arm | seeds | {' | '.join(columns)} |", "|---|---|" + "---|" * len(columns)]
    if truth is not None:
        lines.append(
            f"| *pictures* | | {' | '.join(f'{get(truth):.{digits}f}' for get, digits in columns.values())} |"
        )
    for name, seeds in rows:
        cells = [cell([get(line) for line in seeds.values()], digits) for get, digits in columns.values()]
        lines.append(f"| {name} | {len(seeds)} | {' | '.join(cells)} |")
    return lines


def changes(found: Arms, experiment: str) -> list[str]:
    """Against the arm that differs in one thing, seed by seed."""
    lines = [f"| arm | against | seeds | {' | '.join(PAIRED)} |", "|---|---|---|" + "---|" * len(PAIRED)]
    for (kind, name), mine in found.items():
        wanted, theirs = reference(found, kind, name)
        both = [seed for seed in mine if seed in theirs]
        if kind != experiment or wanted == name or not both:
            continue
        cells = []
        for column in PAIRED:
            get, digits = SAMPLES[column]
            cells.append(changed([get(mine[seed]) - get(theirs[seed]) for seed in both], digits))
        lines.append(f"| {name} | {wanted} | {len(both)} | {' | '.join(cells)} |")
    return lines if len(lines) > 2 else []


def in_short(runs: Sequence[Line]) -> list[str]:
    """All arms in one table: the paired changes of feature distance and slope, a pair of columns for each
    length; [] where nothing can be compared."""
    lengths = sorted({line["steps"] for line in runs if line["steps"]})
    rows: dict[tuple[str, str], dict[int, list[str]]] = {}
    for steps in lengths:
        found = by_arm(runs, steps)
        for (experiment, name), mine in found.items():
            wanted, theirs = reference(found, experiment, name)
            both = [seed for seed in mine if seed in theirs]
            if wanted == name or not both:
                continue
            cells = [str(len(both))]
            for column in ("features", "slope"):
                get, digits = SAMPLES[column]
                cells.append(changed([get(mine[k]) - get(theirs[k]) for k in both], digits))
            rows.setdefault((name, wanted), {})[steps] = cells
    lengths = [steps for steps in lengths if any(steps in row for row in rows.values())]
    if not rows:
        return []
    heads = [f"seeds | features, {steps:,} steps | slope, {steps:,} steps" for steps in lengths]
    lines = [f"| arm | against | {' | '.join(heads)} |", "|---|---|" + "---|---|---|" * len(lengths)]
    for (name, wanted), row in rows.items():
        cells = [cell for steps in lengths for cell in row.get(steps, ["", "", ""])]
        lines.append(f"| {name} | {wanted} | {' | '.join(cells)} |")
    return lines


def _of_captions(runs: Sequence[Line]) -> str:
    """How far a slope moves with other captions and other starting noise; "" where nobody measured it."""
    errors = [line["dpmpp_2m"]["slope_data"] for line in runs if "slope_data" in line["dpmpp_2m"]]
    return (
        f"Other captions and other starting noise move a slope by a standard error of {np.median(errors):.3f} (bootstrap within "
        f"a run, median of {len(errors)} runs; largest {max(errors):.3f})."
        if errors
        else ""
    )


def page(record: Sequence[Line]) -> str:
    """The whole page."""
    truth = next((line for line in record if line["experiment"] == "truth"), None)
    runs = [line for line in record if line["experiment"] != "truth"]
    share = truth["brightness_share"] if truth else math.nan
    energy = truth["energy"] if truth else math.nan
    lines = [
        "# The fixes on a finetuned checkpoint, measured",
        "",
        f"Generated by `benchmarks/finetuning.py page`; mean and 95 % interval (Student) over training seeds, as many as the "
        f"tables say (of two it is 12.7 standard errors to each side: read the dots in the plots); seed 0 chose the learning rate "
        f"and is in none. {runs[0]['versions'] if runs else ''}.",
        "",
        "Every run starts from tiny-sdxl: SDXL's U-Net class, 9.6 million parameters, trained from scratch as SDXL was "
        "(epsilon, stock schedule) on 32 things in 14 places, 64 x 64 pixels, latents of 8 x 8 x 48. It is finetuned on "
        f"pictures of the same world, {finetuning.STEPS} steps of {finetuning.BATCH}, four or sixteen times as many, or none; "
        "AdamW, learning rate "
        f"{finetuning.RATE:g}, falling to 0 in the second half. Arms of a seed share pictures, noise and timesteps. Arms in v "
        "start from the epsilon checkpoint as users do, so they also learn another prediction; their control is v on the "
        "stock schedule (14.6). Told the scale: the output is multiplied by the root mean square of the input over its "
        "expected value. Under one caption the brightness of the background varies with a standard deviation of 0.25 (in -1 "
        "to 1): where captions say all of it, 400 steps of v on the stock schedule look as good as zero terminal SNR (seen "
        "with 0.06, one seed: benchmarks/results/finetuning-shade-0.06.jsonl). A network this small on a world this simple shows mechanisms and signs, not how strong an "
        "effect is in SDXL.",
        "",
        "Samples: 224 captions, 25 steps of `dpmpp_2m` without guidance on the schedule that was trained (112 with `euler_a`). "
        '**slope**: of the background\'s brightness got over asked, 1 is right. **night**: mean background of "at night" and "on '
        'black", -1 is black. **contrast**: spread of brightness inside a picture. **distance**: energy distance of latents. '
        "**features**: energy distance of the features of a classifier that was trained on the world's pictures; 0 is right "
        "for both (a little below it with one sample of each caption, as the pictures' own row). **object, place**: share that "
        "the classifier takes for what was asked. **error**: unweighted, held out, "
        "over ten timesteps and at 999 (compare it within a prediction type and schedule). **scale**: output for 1.1 times "
        "the input over the output; 1.1 follows its input, 1 is blind to how large it is. **gain**: the share of a shift of "
        "the mean brightness, one standard deviation of noise at the last timestep, that the network takes for noise.",
    ]
    if summary := in_short(runs):
        lines += [
            "",
            "## In short",
            "",
            "Each arm against the arm that differs in one thing, paired by seed. Distance of features: negative is nearer to "
            "the world's pictures; slope: towards 1 is better. Bold: the interval excludes 0. Of one seed there is none.",
            "",
            *summary,
        ]
    if spread := _of_captions(runs):
        lines += ["", spread]
    for experiment, title in SHOWN.items():
        if not any(line["experiment"] == experiment for line in runs):
            continue
        lines += ["", f"## {title}"]
        if experiment == "pairing":
            lines += ["", *_closed_form(share, energy)]
        for steps in sorted({line["steps"] for line in runs if line["experiment"] == experiment}):
            found = by_arm(runs, steps)
            rows = rows_of(found, experiment)
            columns = SAMPLES | ANCESTRAL if experiment in finetuning.ANCESTRAL else SAMPLES
            lines += ["", f"### {title}, {steps} steps", "", *table(rows, columns, truth)]
            lines += ["", *table(rows, ERRORS, None)]
            paired = changes(found, experiment)
            lines += (
                ["", "Paired changes, bold where the interval excludes 0:", "", *paired] if paired else []
            )
        lines += ["", f"![Slope and feature distance](finetuning-{_slug(experiment)}.png)"]
    seconds = sum(line["seconds"] for line in runs)
    lines += ["", f"{len(runs)} runs, {seconds / 3600:.1f} hours of one core.", ""]
    return lab.wrapped(lines)


def _slug(experiment: str) -> str:
    return experiment.lower()


def _closed_form(share: float, energy: float) -> list[str]:
    """What the chosen noise says of the brightness, by the formula of benchmarks/pairing.py."""
    many = (2, 4, 8, 64)
    return [
        "Noise that is the nearest of k draws to its picture (arXiv:2406.12303) points towards it: in many dimensions by "
        "E[largest of k] x sqrt(e / (e + 1/2)) standard deviations, e the mean square of a latent value. A straight line then reads "
        "this much of the brightness's variance from noise that zero terminal SNR promises to be pure, and that generation "
        "draws unpaired (`benchmarks/pairing.py`, tested against simulation):",
        "",
        f"| share of brightness in the latents' energy | e | {' | '.join(f'k = {k}' for k in many)} |",
        "|---|---|" + "---|" * len(many),
        *(
            f"| {100 * part:.1f} % ({name}) | {size:.1f} | {' | '.join(f'{100 * pairing.leak(k, part, size):.1f} %' for k in many)} |"
            for name, part, size in (("an example", 0.057, 1.0), ("this world", share, energy))
            if not math.isnan(part)
        ),
    ]


# ---------------------------------------------------------------- plots


def plot(record: Sequence[Line], experiment: str) -> Any:
    """A row for each arm: slope and feature distance, a dot for each seed and a bar for their mean, in a
    colour for each length."""
    runs = [line for line in record if line["experiment"] != "truth"]
    lengths = sorted({line["steps"] for line in runs if line["experiment"] == experiment})
    names = list(
        dict.fromkeys(name for steps in lengths for name, _ in rows_of(by_arm(runs, steps), experiment))
    )
    figure, axes = style.figure(1.4 + 0.38 * len(names), columns=2, sharey=True)
    panels = {"slope": "Brightness got over asked (1 is right)", "features": "Feature distance (0 is right)"}
    for axis, (column, title) in zip(axes, panels.items(), strict=True):
        get = SAMPLES[column][0]
        axis.grid(axis="x")
        axis.set_title(title)
        axis.axvline(1 if column == "slope" else 0, color=style.SOFT, linewidth=1, linestyle=":")
        for offset, steps in enumerate(lengths):
            colour = style.COLOURS[offset]
            for row, (name, seeds) in enumerate(rows_of(by_arm(runs, steps), experiment)):
                values = np.array([get(line) for line in seeds.values()])
                height = names.index(name) + 0.22 * (offset - (len(lengths) - 1) / 2)
                shown = values if column == "features" else np.clip(values, *FRAME)
                axis.plot(shown, [height] * len(shown), "o", color=colour, markersize=3, alpha=0.5)
                label = None if row else f"{steps:,} steps"
                axis.plot(shown.mean(), height, "|", color=colour, markersize=11, mew=2, label=label)
                if values.mean() != shown.mean():
                    high = bool(values.mean() > 1)
                    text, side = f" {values.mean():.1f} ", "right" if high else "left"
                    axis.text(FRAME[high], height, text, ha=side, va="center", fontsize=8)
    if experiment == "terminal":
        axes[1].set_xscale("symlog", linthresh=1)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    style.above(figure)
    return figure


def write(record: Sequence[Line]) -> None:
    """Page and plots into docs/evidence."""
    with replacing(lab.DOCS / "finetuning.md") as file:
        file.write_text(page(record), encoding="utf-8")
    for experiment in SHOWN:
        if any(line["experiment"] == experiment for line in record):
            style.save(plot(record, experiment), lab.DOCS / f"finetuning-{_slug(experiment)}.png")
