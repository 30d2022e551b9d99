"""Every scheduler beside diffusers' own, on data whose ideal samples are known and in time per step
(generation.py: on trained models).

python benchmarks/schedulers.py docs/schedulers.md     the page and its picture (a minute)

python benchmarks/schedulers.py --cost     time per step, ours over diffusers', side by side
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import gaussian
import numpy as np
import style
import torch

from sdxl_fixes import NoiseSchedule
from sdxl_fixes.schedulers import SAMPLERS, config_for
from sdxl_fixes.spacing import timesteps

STOCK = NoiseSchedule.sdxl()
SCHEDULES = {
    "14.6": STOCK,
    "100 beta_end": STOCK.with_terminal_sigma(100, "beta_end"),
    "300 beta_end": STOCK.with_terminal_sigma(300, "beta_end"),
    "300 rescale": STOCK.with_terminal_sigma(300, "rescale"),
    "300 last": STOCK.with_terminal_sigma(300, "last"),
    "4096 tail": STOCK.with_terminal_sigma(4096, "tail"),
    "20000 beta_end": STOCK.with_terminal_sigma(20000, "beta_end"),
    "20000 rescale": STOCK.with_terminal_sigma(20000, "rescale"),
    "inf (ZTSNR)": STOCK.zero_terminal_snr(),
}
NOISY = ("ddpm", "euler_a", "dpmpp_2m_sde")
BEST_FIRST = ("dpmpp_2m", "unipc", "dpmpp_2m_sde", "heun", "euler", "ddim", "euler_a", "ddpm")
SCALES = (0.25, 1.0, 8.0, 64.0)
HEAD = "| | fine detail | detail | structure | brightness | mean brightness lost |"
RULE = "|---|---:|---:|---:|---:|---:|"
NAMES = ("fine detail", "detail", "structure", "brightness")  # of SCALES
Found = tuple[list[float], float] | str


def stock(name: str, schedule: NoiseSchedule, prediction_type: str, spacing: str = "trailing") -> Any:
    """diffusers' class, told the schedule as well as it can be."""
    ours, settings = SAMPLERS[name]
    cls = getattr(diffusers, ours.__name__)
    config = {**config_for(cls, schedule, prediction_type, settings), "timestep_spacing": spacing}
    config |= {"steps_offset": 1} if spacing == "leading" else {}  # as SDXL's own config has them
    return cls.from_config(config)


def measured(
    make: Callable[[], Any], schedule: NoiseSchedule, prediction_type: str, steps: int, name: str
) -> Found:
    """Spread over the truth at each of SCALES, and the brightness lost in percent; or why there is none."""
    samples = 20000 if name in NOISY else 2
    try:
        scheduler = make()
        between = prediction_type == "flow_prediction" and not hasattr(scheduler, "noise_schedule")
        mean, spread = gaussian.sampled(
            scheduler, schedule, prediction_type, steps, samples, scales=SCALES, between=between
        )
    except (ValueError, IndexError, RuntimeError) as error:
        return "refused" if "SNR 0" in str(error) else type(error).__name__
    if not (torch.isfinite(mean).all() and torch.isfinite(spread).all()):
        return "NaN"
    return spread.tolist(), lost(mean)


def lost(mean: torch.Tensor) -> float:
    """How much of the mean brightness, in percent."""
    return round(100 * (1 - float(mean[-1]) / gaussian.MEAN_OVER_SCALE), 1) + 0.0  # no -0.0


def row(label: str, found: Found) -> str:
    if isinstance(found, str):
        return f"| {label} | {found} |" + " |" * len(SCALES)
    spreads, gone = found
    return f"| {label} | {' | '.join(f'{spread:.2f}' for spread in spreads)} | {gone:.1f} % |"


def compared(prediction_type: str, schedule: NoiseSchedule, steps: int) -> dict[str, dict[str, Found]]:
    """Of each sampler, the best first, what ours gives and what diffusers' gives, where there is one."""
    found = {}
    for name in BEST_FIRST:
        makes = {"ours": lambda name=name: schedule.scheduler(name, prediction_type)}
        theirs = flow_class(name, schedule) if prediction_type == "flow_prediction" else None
        if prediction_type != "flow_prediction":
            makes["diffusers"] = lambda name=name: stock(name, schedule, prediction_type)
        elif theirs is not None:
            makes["diffusers"] = theirs
        found[name] = {
            whose: measured(make, schedule, prediction_type, steps, name) for whose, make in makes.items()
        }
    return found


def table(prediction_type: str, schedule: NoiseSchedule, found: dict[str, dict[str, Found]]) -> list[str]:
    """Markdown: the ideal, then each sampler, ours and diffusers'."""
    mean, spread = gaussian.ideal(schedule, prediction_type == "flow_prediction", SCALES)
    lines = [HEAD, RULE, row("*ideal*", (spread.tolist(), lost(mean)))]
    for name, kinds in found.items():
        lines += [row(f"{name}, {whose}", result) for whose, result in kinds.items()]
    return lines


def worst(found: Found) -> tuple[float, str]:
    """The spread that is furthest from right, as a factor, and what it is the spread of."""
    assert not isinstance(found, str), found
    rounded = [round(value, 2) for value in found[0]]
    return max(zip(rounded, NAMES, strict=True), key=lambda pair: abs(math.log(pair[0])))


def verdict(found: Found) -> str:
    """``0.63: brightness very flat``, or ``right``."""
    value, what = worst(found)
    bounds = ((1.5, "explodes"), (1.05, "too strong"), (0.95, ""), (0.84, "a little flat"), (0.7, "flat"))
    word = next((word for bound, word in bounds if value >= bound), "very flat")
    return f"**right** ({value:.2f})" if not word else f"{value:.2f}: {what} {word}"


def answer(found: dict[int, dict[str, dict[str, Found]]]) -> list[str]:
    """Which sampler, and how many steps: its worst spread in words. ``found`` by number of steps."""
    lines = ["| sampler | ours | diffusers' |", "|---|---|---|"]
    for name, kinds in found[25].items():
        lines.append(f"| `{name}` | {verdict(kinds['ours'])} | {verdict(kinds['diffusers'])} |")
    lines += ["", "## How many steps", "", "The worst of the four spreads again:", ""]
    counts = sorted(found)
    lines += [
        f"| sampler | {' | '.join(f'{steps} steps' for steps in counts)} |",
        "|---|" + "---:|" * len(counts),
    ]
    for whose in ("ours", "diffusers"):
        for name in found[25]:
            cells = " | ".join(f"{worst(found[steps][name][whose])[0]:.2f}" for steps in counts)
            lines.append(f"| `{name}`, {whose} | {cells} |")
    return lines


def plot(found: dict[str, dict[str, Found]]) -> Any:
    """A dot for each spread of each sampler; what lies beyond the axis is said in words at its edge."""
    figure, axes = style.figure(3.6, 2, sharey=True)
    places = range(len(found))[::-1]
    for axis, whose in zip(axes, ("ours", "diffusers"), strict=True):
        for number, (what, colour) in enumerate(
            zip(NAMES, (style.PALE, style.DARK, style.OCHRE, style.ACCENT), strict=True)
        ):
            values = [kinds[whose][0][number] for kinds in found.values()]  # type: ignore[index]
            axis.scatter(values, places, color=colour, label=what, s=42, zorder=3)
        for place, kinds in zip(places, found.values(), strict=True):
            if beyond := ", ".join(f"{value:.2f}" for value in kinds[whose][0] if value > 1.2):  # type: ignore[operator]
                axis.text(1.19, place, f"{beyond} →", ha="right", va="bottom", fontsize=8, color=style.SOFT)
        axis.axvline(1, color=style.SOFT, linewidth=1)
        axis.set(xlim=(0.5, 1.2), title="ours" if whose == "ours" else "diffusers', trailing")
        axis.set_xlabel("spread of the samples over the true one (1 is right, less is flat)", fontsize=8)
    axes[0].set_yticks(places, list(found))
    style.above(figure)
    return figure


def flow_class(name: str, schedule: NoiseSchedule) -> Callable[[], Any] | None:
    """diffusers' own sampler of rectified flow that is the same method."""
    shift = schedule.made.options["shift"]
    if name == "euler":
        return lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    if name not in ("dpmpp_2m", "unipc"):
        return None
    cls = getattr(diffusers, SAMPLERS[name][0].__name__)
    return lambda: cls(use_flow_sigmas=True, flow_shift=shift, prediction_type="flow_prediction")


def ends() -> list[str]:
    """Brightness over the schedules: spread over the ideal's, for a few samplers."""
    shown = (("dpmpp_2m", "ours"), ("dpmpp_2m", "diffusers"), ("heun", "diffusers"))
    lines = [
        "| terminal sigma | a perfect sampler loses | "
        + " | ".join(f"`{name}`, {whose}" for name, whose in shown)
        + " |",
        "|---|" + "---:|" * (1 + len(shown)),
    ]
    for label, schedule in SCHEDULES.items():
        mean, ideal = gaussian.ideal(schedule, False, SCALES)
        cells = []
        for name, whose in shown:
            make = (
                (lambda name=name, schedule=schedule: schedule.scheduler(name, "v_prediction"))
                if whose == "ours"
                else (lambda name=name, schedule=schedule: stock(name, schedule, "v_prediction"))
            )
            found = measured(make, schedule, "v_prediction", 25, name)
            cells.append(found if isinstance(found, str) else f"{found[0][-1] / float(ideal[-1]):.2f}")
        lines.append(f"| {label} | {lost(mean):.1f} % | {' | '.join(cells)} |")
    return lines


def epsilon() -> list[str]:
    """What epsilon changes: nothing at a finite sigma, and everything at SNR 0."""
    furthest, schedule = 0.0, STOCK.with_terminal_sigma(300, "rescale")
    for name in SAMPLERS:
        spreads = [
            torch.tensor(measured(lambda k=k, n=name: schedule.scheduler(n, k), schedule, k, 25, name)[0])
            for k in ("epsilon", "v_prediction")
        ]
        furthest = max(furthest, float((spreads[0] - spreads[1]).abs().max()))
    zero, found = STOCK.zero_terminal_snr(), []
    for name in BEST_FIRST:
        told = measured(lambda n=name: stock(n, zero, "epsilon"), zero, "epsilon", 25, name)
        found.append(f"{name} {told if isinstance(told, str) else f'{told[1]:.0f} %'}")
    return [
        f"At a finite sigma (300, `rescale`) no spread of ours differs from v_prediction's by more than "
        f"{furthest:.0e}.",
        "At SNR 0 the sample says nothing about the image. Ours refuse; brightness that diffusers' classes "
        "lose there at 25 steps:",
        f"{', '.join(found)}.",
    ]


def spacings() -> list[str]:
    """Spread that a first-order sampler keeps, by spacing and scale, in closed form."""
    lines = [f"| 25 steps | {' | '.join(NAMES)} |", "|---|" + "---:|" * len(SCALES)]
    for label, schedule in {"zero terminal SNR": STOCK.zero_terminal_snr(), "14.6": STOCK}.items():
        for spacing in ("first_order", "log_sigma", "trailing"):
            for names, fresh in (("ddim, euler", False), ("ddpm, euler_a", True)):
                cells = [first_order(schedule, spacing, scale, fresh) for scale in SCALES]
                text = " | ".join(f"{cell:.2f}" for cell in cells)
                lines.append(f"| {label}, {spacing}, {names} | {text} |")
    return lines


def first_order(schedule: NoiseSchedule, spacing: str, scale: float, fresh: bool, steps: int = 25) -> float:
    """The share of a Gaussian's spread that 25 first-order steps keep (sdxl_fixes/spacing.py)."""
    phi = np.arctan(np.append(schedule.sigmas[timesteps(schedule, steps, spacing)], 0) / scale)
    c = np.cos(phi) ** 2
    noisy = math.sqrt(1 - float((np.diff(c) ** 2 / (1 - c[:-1])).sum()))
    return noisy if fresh else float(np.cos(np.diff(phi)).prod())


def bound(steps: int) -> float:
    """The most that fresh noise at every step leaves of one scale: the least sum (w - w')^2/w from 1 to 0."""
    least = 1.0
    for _ in range(steps - 1):
        least -= least**2 / 4
    return math.sqrt(1 - least)


def best_mean(low: float, high: float, steps: int, fresh: bool) -> float:
    """The most that any spacing keeps of scales from ``low`` to ``high`` from SNR 0, in the mean over log
    scale, to leading order in 1/steps: the loss at scale a is the integral of g(u - log a)/rho, least in the
    mean for rho like the root of g's mean (Cauchy and Schwarz)."""
    v = np.linspace(-30, 30, 60001)
    g = np.cosh(v) ** -2 / 8 if not fresh else np.cosh(v) ** -4 * (1 + np.exp(-2 * v)) / 8
    passed = np.cumsum(g) * (v[1] - v[0])
    width = math.log(high / low)
    mean = (passed - np.interp(v - width, v, passed)) / width
    return math.exp(-float((np.sqrt(mean.clip(0)).sum() * (v[1] - v[0])) ** 2) / steps)


def differing(spacing: str) -> int:
    """At how many of 1 to 1000 step counts ours and diffusers' DDPM take another timestep or number of
    them."""
    count = 0
    for steps in range(1, 1001):
        theirs = diffusers.DDPMScheduler(timestep_spacing=spacing)  # in whole numbers
        theirs.set_timesteps(steps)
        count += theirs.timesteps.tolist() != timesteps(STOCK, steps, spacing).tolist()
    return count


def page(found: dict[int, dict[str, dict[str, Found]]]) -> str:
    """docs/schedulers.md. ``found``: of zero terminal SNR, by number of steps."""
    zero = STOCK.zero_terminal_snr()
    flat = [kinds["diffusers"][0][-1] for name, kinds in found[25].items() if name != "heun"]
    lines = [
        "# Which sampler",
        "",
        "**Take `dpmpp_2m` or `unipc`, 25 steps or more**, made by `schedule.scheduler(name, "
        "prediction_type)`: they return what a",
        "perfect sampler returns. Samplers of first order (`euler`, `ddim`) leave everything a little flat, "
        "those that draw noise at every step",
        "(`euler_a`, `ddpm`) more so; more steps help. diffusers' own classes return "
        f"{100 * min(flat):.0f} to {100 * max(flat):.0f} % of the spread of the brightness",
        "under zero terminal SNR, and its Heun explodes.",
        "",
        "![Spread of the samples by sampler, ours and diffusers', at 25 steps](schedulers.png)",
        "",
        "Zero terminal SNR, v-prediction, 25 steps: the worst of four spreads over the true one, where 1 is "
        "right and less is flat.",
        "",
        *answer(found),
        "",
        "## How it is measured",
        "",
        f"Generated by `benchmarks/schedulers.py` with diffusers {diffusers.__version__}; the method is in "
        "`benchmarks/gaussian.py`.",
        "Data whose perfect model is known in closed form, so nothing but the scheduler can be wrong. Fine "
        "detail has a quarter of the spread of",
        "a latent value, detail its own, structure 8 times that; brightness is the mean of a 128 x 128 "
        "canvas. *diffusers* is its own class, told",
        "the schedule as well as it can be, with trailing spacing. The *ideal* sampler is exact from the "
        "first step to the last: what it loses is",
        "the schedule's own flaw. Samplers that draw noise: 20,000 samples, about 1 %.",
        "",
        "## Brightness by terminal sigma",
        "",
        "What the schedule itself loses of the mean brightness, and the spread of the brightness over the "
        "ideal's (v-prediction, 25 steps).",
        "`last` cannot be sampled by anybody: between sigma 14.6 and 300 there is no trained timestep to go "
        "to.",
        "",
        *ends(),
        "",
        "## epsilon",
        "",
        *epsilon(),
        "",
        "## Spacings of first-order samplers",
        "",
        "Share of the spread that is kept, in closed form.",
        "",
        *spacings(),
        "",
        f"No spacing can do much better. At a single scale 25 steps of DDIM or Euler keep at most "
        f"cos(pi/50)^25 = {math.cos(math.pi / 50) ** 25:.3f},",
        f"with fresh noise at every step {bound(25):.3f} (`sdxl_fixes/spacing.py`). Of all scales from 1 to "
        "128 together, from pure noise,",
        f"the best spacing there is keeps {best_mean(1, 128, 25, False):.2f} and "
        f"{best_mean(1, 128, 25, True):.2f} in the mean, of scales from 1/4 to 128 "
        f"{best_mean(0.25, 128, 25, False):.2f} and {best_mean(0.25, 128, 25, True):.2f} (to leading",
        "order). `first_order`, the default of `ddpm`, `ddim`, `euler` and `euler_a`, is the latter's for "
        "`ddim` and `euler`.",
        "`trailing` keeps more at scales 1 to 4 and loses brightness and fine detail. Samplers of second "
        "order lose",
        "next to nothing with `log_sigma`, their default.",
        "",
        f"Ours round halves of `trailing` and `linspace` otherwise than diffusers' own: at "
        f"{differing('trailing')} and {differing('linspace')} of the numbers",
        "of steps from 1 to 1000 a timestep differs by one, or diffusers' list has one too many.",
    ]
    lines += [
        "",
        "## All numbers",
        "",
        "The last column is how much of the mean brightness is lost (-1 % is too much).",
    ]
    for steps, kinds in found.items():
        lines += ["", f"### Zero terminal SNR, {steps} steps", "", *table("v_prediction", zero, kinds)]
    lines += ["", "### SDXL's own schedule, to 14.6, 25 steps", ""]
    lines += table("v_prediction", STOCK, compared("v_prediction", STOCK, 25))
    lines += [
        "",
        "### Rectified flow",
        "",
        "*diffusers* is FlowMatchEulerDiscreteScheduler for `euler`, use_flow_sigmas for the solvers. Both "
        "take times of their own, even",
        "before the shift; use_flow_sigmas begins below pure noise and tells the network whole timesteps.",
    ]
    for shift in (3.0, 6.0):
        schedule = NoiseSchedule.flow(shift)
        kinds = compared("flow_prediction", schedule, 25)
        lines += ["", f"#### Shift {shift:g}, 25 steps", "", *table("flow_prediction", schedule, kinds)]
    return "\n".join(lines) + "\n"


def cost() -> None:
    """Median microseconds of a step on SDXL's latents at 1024 x 1024, the two in turn; the U-Net, some 10^5
    times that, is left out."""
    schedule = STOCK.zero_terminal_snr()
    x, output = torch.randn(2, 1, 4, 128, 128)
    for name in SAMPLERS:
        pair: dict[str, list[float]] = {"diffusers": [], "ours": []}
        made = {
            "diffusers": stock(name, schedule, "v_prediction"),
            "ours": schedule.scheduler(name, "v_prediction"),
        }
        for _ in range(20):
            for label, scheduler in made.items():
                scheduler.set_timesteps(25)
                for t in scheduler.timesteps:
                    start = time.perf_counter()
                    scheduler.step(output, t, scheduler.scale_model_input(x, t))
                    pair[label].append(time.perf_counter() - start)
        theirs, ours = (1e6 * statistics.median(times) for times in pair.values())
        print(f"{name:<14} diffusers {theirs:7.0f} us   ours {ours:7.0f} us   ratio {ours / theirs:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("page", nargs="?", type=Path, metavar="MD")
    parser.add_argument("--cost", action="store_true")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.page:
        zero = STOCK.zero_terminal_snr()
        found = {steps: compared("v_prediction", zero, steps) for steps in (10, 25, 50)}
        args.page.write_text(page(found), encoding="utf-8")
        style.save(plot(found[25]), args.page.with_suffix(".png"))
    if args.cost:
        cost()


if __name__ == "__main__":
    main()
