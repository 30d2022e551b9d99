"""``sdxl-fixes schedule``: a schedule beside SDXL's own, as text, JSON and picture."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sdxl_fixes.atomic import replacing
from sdxl_fixes.command_line import add_flags
from sdxl_fixes.errors import shown
from sdxl_fixes.flags import SCHEDULE_FLAGS, TrainingFlags
from sdxl_fixes.model_files.model_file import read_sampling
from sdxl_fixes.schedule import NoiseSchedule

FIGURES = {
    "residual_signal": "share of the image still visible at the last timestep",
    "terminal_sigma": "sigma of the last timestep",
    "terminal_snr": "SNR of the last timestep",
    "first_sigma": "sigma of the first timestep",
    "middle_sigma": "sigma in the middle",
    "share_above_sdxl": "share of timesteps above SDXL's last sigma, 14.6",
}


def add_command(commands: Any) -> None:
    """Register it."""
    parser = commands.add_parser("schedule", help="table and plot of a noise schedule beside SDXL's own")
    add_flags(parser, SCHEDULE_FLAGS)
    parser.add_argument(
        "--base", choices=("sdxl", "linear", "cosine", "flow"), default="sdxl", help="schedule to start from"
    )
    add_flow_shift(parser)
    parser.add_argument(
        "--from",
        dest="file",
        type=Path,
        metavar="PATH",
        help="read a scheduler_config.json, a schedule record, what --json printed, a diffusers folder, or "
        "a model file",
    )
    parser.add_argument(
        "--width", type=int, help="with --height: end at the sigma that fits this canvas, in pixels"
    )
    parser.add_argument("--height", type=int, help="see --width")
    parser.add_argument(
        "--json", action="store_true", help="print JSON, with the schedule's record, instead of a table"
    )
    parser.add_argument("--plot", type=Path, metavar="PNG", help="also write a picture (needs matplotlib)")
    parser.set_defaults(run=run)


def add_flow_shift(parser: argparse.ArgumentParser) -> None:
    """Named as the trainers' flag, but ``shift`` in the Namespace: any prediction may be made on flow's noise
    levels here."""
    parser.add_argument(
        "--flow_shift",
        dest="shift",
        type=float,
        metavar="FLOW_SHIFT",
        help="shift of --base flow (default 1)",
    )


def flow_of(shift: float | None) -> NoiseSchedule:
    """Rectified flow's schedule. Raises ValueError, naming the flag, for a shift that makes none."""
    try:
        return NoiseSchedule.flow(1.0 if shift is None else shift)
    except ValueError as error:
        raise ValueError(f"--flow_shift {shift:g}: {error}") from error


def run(args: argparse.Namespace) -> int:
    """The command."""
    if (args.width is None) != (args.height is None):
        raise ValueError("--width and --height belong together: give both or neither")
    if args.width is not None and (args.terminal_sigma is not None or args.zero_terminal_snr):
        raise ValueError(
            "--width and --height choose the terminal sigma: leave --terminal_sigma and "
            "--zero_terminal_snr out"
        )
    if args.file is not None and args.base != "sdxl":
        raise ValueError("--from and --base are two schedules to start from: give one of them")
    if args.shift is not None and args.base != "flow":
        raise ValueError("--flow_shift belongs to --base flow: give both, or neither")
    makers: dict[str, Callable[[], NoiseSchedule]] = {
        "sdxl": NoiseSchedule.sdxl,
        "linear": NoiseSchedule.linear,
        "cosine": NoiseSchedule.cosine,
        "flow": lambda: flow_of(args.shift),
    }
    base = makers[args.base]() if args.file is None else _read_schedule(args.file)
    schedule = TrainingFlags.from_args(args).schedule(base)
    if args.width is not None:
        schedule = _for_canvas(schedule, args.width, args.height, args.terminal_sigma_method)
    if args.plot is not None:
        plot(schedule, args.plot)
    print(as_json(schedule) if args.json else as_text(schedule))
    return 0


def _read_schedule(file: Path) -> NoiseSchedule:
    said = read_sampling(file, "epsilon")  # whatever is predicted on it
    if said is None:
        raise ValueError(f"{file} does not say how it was trained: give another --from")
    return said.schedule


def _for_canvas(schedule: NoiseSchedule, width: int, height: int, method: str | None) -> NoiseSchedule:
    try:
        if method is None:
            return schedule.for_resolution(width, height)
        return schedule.for_resolution(width, height, method=method)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"--width {shown(width)} --height {shown(height)}: {error}") from error


def figures(schedule: NoiseSchedule) -> dict[str, float]:
    """The numbers of FIGURES for one schedule."""
    return {
        "residual_signal": schedule.residual_signal,
        "terminal_sigma": schedule.terminal_sigma,
        "terminal_snr": float(schedule.snr[-1]),
        "first_sigma": float(schedule.sigmas[0]),
        "middle_sigma": float(schedule.sigmas[(len(schedule) - 1) // 2]),
        "share_above_sdxl": float(schedule.above(NoiseSchedule.sdxl().terminal_sigma).mean()),
    }


def as_text(schedule: NoiseSchedule) -> str:
    """Two tables: the figures, and sigma and residual signal along the timesteps."""
    stock = NoiseSchedule.sdxl()
    mine, theirs = figures(schedule), figures(stock)
    lines = [repr(schedule), "", f"{'':<54}{'SDXL':>12}{'this':>12}"]
    for name, meaning in FIGURES.items():
        unit = "%" if name in ("residual_signal", "share_above_sdxl") else ""
        lines.append(f"{meaning:<54}" + "".join(f"{_cell(x[name], unit):>12}" for x in (theirs, mine)))
    lines += [
        "",
        f"{'timestep':<10}{'sigma SDXL':>14}{'sigma this':>14}{'signal SDXL':>14}{'signal this':>14}",
    ]
    for t in _timesteps(len(schedule)):
        other = t if len(stock) == len(schedule) else round(t * (len(stock) - 1) / (len(schedule) - 1))
        sigmas = (stock.sigmas[other], schedule.sigmas[t])
        signals = (stock.sqrt_alphas_cumprod[other], schedule.sqrt_alphas_cumprod[t])
        lines.append(
            f"{t:<10}"
            + "".join(f"{_cell(x):>14}" for x in sigmas)
            + "".join(f"{_cell(x, '%'):>14}" for x in signals)
        )
    return "\n".join(lines)


def as_json(schedule: NoiseSchedule) -> str:
    """The figures of both and the schedule's record, strict JSON (infinity is "inf")."""

    def plain(schedule: NoiseSchedule) -> dict[str, float | str]:
        return {name: value if math.isfinite(value) else "inf" for name, value in figures(schedule).items()}

    content = {"sdxl": plain(NoiseSchedule.sdxl()), "this": plain(schedule), "record": schedule.to_record()}
    return json.dumps(content, allow_nan=False)


def plot(schedule: NoiseSchedule, file: Path) -> None:
    """Write a PNG: sigma and residual signal over the timesteps, beside SDXL's. Raises ValueError without
    matplotlib, OSError if the file cannot be written (nothing half-written stays behind)."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError('a picture needs matplotlib: pip install "sdxl-fixes[plot]"') from error
    figure = Figure(figsize=(10, 4), layout="constrained")
    draw(figure.subplots(1, 2), schedule)
    with replacing(file) as partial:
        figure.savefig(partial, format="png", dpi=120)


def draw(axes: Any, schedule: NoiseSchedule) -> None:
    """Draw both schedules into two matplotlib axes."""
    for name, drawn in (("SDXL", NoiseSchedule.sdxl()), ("this", schedule)):
        u = [t / (len(drawn) - 1) * (len(schedule) - 1) for t in range(len(drawn))]
        for axis, table in zip(axes, (drawn.sigmas, drawn.sqrt_alphas_cumprod), strict=True):
            axis.plot(u, table, label=f"{name}, ends at {_cell(float(table[-1]))}")
    for axis, name, scale in zip(
        axes, ("sigma", "residual signal, sqrt(alphas_cumprod)"), ("log", "linear"), strict=True
    ):
        axis.set(title=name, xlabel="timestep", yscale=scale)
        axis.grid(alpha=0.3)
        axis.legend()


def _timesteps(count: int) -> list[int]:
    return sorted(
        {
            *range(0, count, max(1, count // 10)),
            *(t for t in (count - 50, count - 10, count - 2, count - 1) if t >= 0),
        }
    )


def _cell(value: float, unit: str = "") -> str:
    if unit == "%":
        return f"{100 * value:.3g} %"
    return f"{value:.5g}"
