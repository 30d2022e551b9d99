"""The ``sdxl-fixes`` command."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from sdxl_fixes.command_line import Parser, add_flags
from sdxl_fixes.commands import samples, stamp
from sdxl_fixes.commands.schedule import as_json, as_text, plot
from sdxl_fixes.errors import shown
from sdxl_fixes.flags import SCHEDULE_FLAGS, TrainingFlags
from sdxl_fixes.model_files.model_file import read_sampling
from sdxl_fixes.schedule import NoiseSchedule
from sdxl_fixes.uis import install
from sdxl_fixes.version import __version__


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status. Wrong input is one sentence on standard error and status
    2."""
    args = make_parser().parse_args(argv)
    try:
        return int(args.run(args))
    except (ValueError, OSError) as error:
        print(f"sdxl-fixes {args.command}: {error}", file=sys.stderr)
        return 2


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="sdxl-fixes", description="One noise schedule for SDXL training.")
    parser.add_argument("--version", action="version", version=f"sdxl-fixes {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_schedule(commands)
    _add_doctor(commands)
    stamp.add_commands(commands)
    install.add_commands(commands)
    samples.add_commands(commands)
    _add_demo(commands)
    _add_buckets(commands)
    return parser


def _add_schedule(commands: Any) -> None:
    parser = commands.add_parser("schedule", help="table and plot of a noise schedule beside SDXL's own")
    add_flags(parser, SCHEDULE_FLAGS)
    parser.add_argument(
        "--base", choices=("sdxl", "linear", "cosine", "flow"), default="sdxl", help="schedule to start from"
    )
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
    parser.set_defaults(run=_schedule)


def _schedule(args: argparse.Namespace) -> int:
    if (args.width is None) != (args.height is None):
        raise ValueError("--width and --height belong together: give both or neither")
    if args.width is not None and (args.terminal_sigma is not None or args.zero_terminal_snr):
        raise ValueError(
            "--width and --height choose the terminal sigma: leave --terminal_sigma and "
            "--zero_terminal_snr out"
        )
    if args.file is not None and args.base != "sdxl":
        raise ValueError("--from and --base are two schedules to start from: give one of them")
    makers = {
        "sdxl": NoiseSchedule.sdxl,
        "linear": NoiseSchedule.linear,
        "cosine": NoiseSchedule.cosine,
        "flow": NoiseSchedule.flow,
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


def _add_doctor(commands: Any) -> None:
    parser = commands.add_parser("doctor", help="which fixes fit a trainer's version, and why not")
    parser.add_argument("path", type=Path, help="a trainer's script, or the folder of sd-scripts")
    parser.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    from sdxl_fixes.diffusers import doctor as diffusers
    from sdxl_fixes.kohya import doctor as kohya

    report, fits = (diffusers if diffusers.is_script(args.path) else kohya).examine(args.path)
    print(report)
    if not diffusers.is_script(args.path):
        print(_plain_starts())
    return 0 if fits else 1


def _plain_starts() -> str:
    from _sdxl_fixes_autostart import installed

    started = (
        "are started with the fixes"
        if installed()
        else ("ignore them and say nothing: install sdxl-fixes with pip")
    )
    return f"plain starts under keys of ours in a --config_file {started}"


def _add_demo(commands: Any) -> None:
    from sdxl_fixes.demo import experiment as demo

    parser = commands.add_parser(
        "demo", help="offline, on the CPU: train a tiny SDXL with and without the fixes and write a report"
    )
    demo.add_arguments(parser)
    parser.set_defaults(run=demo.run)


def _add_buckets(commands: Any) -> None:
    from sdxl_fixes.commands import buckets as buckets_report

    parser = commands.add_parser(
        "buckets", help="what a data set's aspect buckets cost in padding, and what chunk buckets save"
    )
    buckets_report.add_arguments(parser)
    parser.set_defaults(run=buckets_report.run)


if __name__ == "__main__":
    sys.exit(main())
