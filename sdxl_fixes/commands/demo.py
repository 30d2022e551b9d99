"""``sdxl-fixes demo``: train a tiny SDXL with and without the fixes, and write a report."""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from pathlib import Path
from typing import Any

from sdxl_fixes.atomic import replacing
from sdxl_fixes.demo.settings import DemoSettings


def add_command(commands: Any) -> None:
    """Register it."""
    parser = commands.add_parser(
        "demo", help="offline, on the CPU: train a tiny SDXL with and without the fixes and write a report"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=DemoSettings.seed,
        help="initial weights, photos, noise and timesteps (default 0)",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=DemoSettings.steps,
        help=f"training steps on the stock schedule (default {DemoSettings.steps})",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("sdxl-fixes-demo"), metavar="DIR", help="folder for the report"
    )
    parser.add_argument("--json", action="store_true", help="print results.json instead of the table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The command."""
    results = make_report(DemoSettings(seed=args.seed, steps=args.steps), args.output)
    if args.json:
        print(json.dumps(results, indent=2))
    else:
        from sdxl_fixes.demo.report import table

        print(f"{table(results)}\n\nReport: {args.output / 'report.html'}")
    return 0


def make_report(settings: DemoSettings, output: Path) -> dict[str, Any]:
    """Train, sample, measure, and write report.html, demo.png and results.json into the folder ``output``.
    Returns results.json. Raises ValueError without the extras, OSError if the folder cannot be written."""
    _check_extras()
    _check_output(output)  # before four minutes of work
    from tqdm import tqdm

    from sdxl_fixes.demo.experiment import compare
    from sdxl_fixes.demo.report import write_report

    start = time.perf_counter()
    results = compare(settings, lambda work, name: iter(tqdm(work, desc=f"{name:<34}")))
    return write_report(settings, results, time.perf_counter() - start, output)


def _check_extras() -> None:
    names = {"matplotlib": "matplotlib", "skimage": "scikit-image"}
    missing = [name for module, name in names.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ValueError(
            f'the demo needs {" and ".join(missing)}, not installed here: pip install "sdxl-fixes[demo]"'
        )


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
