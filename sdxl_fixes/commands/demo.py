"""``sdxl-fixes demo``: finetune a tiny SDXL with and without the fixes, and write a report."""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from pathlib import Path
from typing import Any

from sdxl_fixes.atomic import replacing
from sdxl_fixes.demo.plan import Plan


def add_command(commands: Any) -> None:
    """Register it."""
    parser = commands.add_parser(
        "demo", help="offline, on the CPU: finetune a tiny SDXL with and without the fixes and write a report"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=Plan.seed,
        help="pictures, noise and timesteps (default 0)",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=Plan.steps,
        help=f"training steps of each finetune (default {Plan.steps})",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("sdxl-fixes-demo"), metavar="DIR", help="folder for the report"
    )
    parser.add_argument("--json", action="store_true", help="print results.json instead of the table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The command."""
    results = make_report(Plan(seed=args.seed, steps=args.steps), args.output)
    if args.json:
        print(json.dumps(results, indent=2))
    else:
        from sdxl_fixes.demo.report import table

        print(f"{table(results)}\n\nReport: {args.output / 'report.html'}")
    return 0


def make_report(plan: Plan, output: Path) -> dict[str, Any]:
    """Finetune, sample, measure, and write report.html, demo.png and results.json into the folder ``output``.
    Returns results.json. Raises ValueError without the extra, OSError if the folder cannot be written."""
    _check_extra()
    _check_output(output)  # before minutes of work
    from tqdm import tqdm

    from sdxl_fixes.demo.finetune import compare
    from sdxl_fixes.demo.report import write_report

    start = time.perf_counter()
    results = compare(plan, lambda work, name: iter(tqdm(work, desc=f"{name:<38}")))
    return write_report(plan, results, time.perf_counter() - start, output)


def _check_extra() -> None:
    if importlib.util.find_spec("PIL") is None:
        raise ValueError('the demo needs pillow, not installed here: pip install "sdxl-fixes[demo]"')


def _check_output(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        with replacing(output / "results.json.test") as file:
            file.touch()
        (output / "results.json.test").unlink()
    except OSError as error:
        raise OSError(
            f"cannot write into {output} ({error.strerror}): choose another folder with --output"
        ) from error
