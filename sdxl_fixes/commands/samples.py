"""``sdxl-fixes samples``: kohya's folder of preview images as one table, a column per checkpoint, a row per
prompt and seed."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from PIL import Image

from sdxl_fixes.sample_table import SampleTable

# [NAME_]e000001_00_YYYYMMDDHHMMSS[_SEED].png, with e000001 an epoch and 000001 a step
_NAME = re.compile(r"(?:.*_)?(?P<when>e?\d{6,})_(?P<prompt>\d{2,})_(?P<time>\d{14})(?:_(?P<seed>\d+))?\.png")


def add_command(commands: Any) -> None:
    """Add ``samples``."""
    parser = commands.add_parser(
        "samples", help="kohya's preview images (OUTPUT/sample) as one HTML table over checkpoints"
    )
    parser.add_argument("folder", type=Path, help="the sample folder of sd-scripts")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("samples.html"),
        help="the table to write (an existing one is continued)",
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="TXT",
        help="the --sample_prompts of the run, to name the rows by its prompts",
    )
    parser.set_defaults(run=_samples)


def _samples(args: argparse.Namespace) -> int:
    if not args.folder.is_dir():
        raise ValueError(
            f"there is no folder {args.folder}: give the one with the preview images, sample in --output_dir"
        )
    names = [] if args.prompts is None else _prompts(args.prompts)
    found = sorted(
        (_place(match), file) for file in args.folder.iterdir() if (match := _NAME.fullmatch(file.name))
    )
    if not found:
        raise ValueError(
            f"{args.folder} holds no image named as sd-scripts names its previews, "
            "[NAME_]e000001_00_20261231235959_SEED.png"
        )
    latest = {place[:-1]: file for place, file in found}  # of a preview that was made twice the later
    cells = [
        (_checkpoint(is_epoch, when), _row(prompt, seed, names), file)
        for (is_epoch, when, prompt, seed), file in latest.items()
    ]
    table = SampleTable(args.output, f"Samples of {args.folder}")
    table.update((checkpoint, row, Image.open(file)) for checkpoint, row, file in cells)
    print(
        f"{args.output}: {len(cells)} images, {len({cell[0] for cell in cells})} checkpoints, "
        f"{len({cell[1] for cell in cells})} rows"
    )
    return 0


def _place(match: re.Match[str]) -> tuple[bool, int, int, str, str]:
    """Whether it is an epoch's, its number, the prompt's number, the seed, the time."""
    when = match["when"]
    return (
        when.startswith("e"),
        int(when.lstrip("e")),
        int(match["prompt"]),
        match["seed"] or "",
        match["time"],
    )


def _checkpoint(is_epoch: bool, number: int) -> str:
    return f"{'epoch' if is_epoch else 'step'} {number}"


def _row(prompt: int, seed: str, names: list[str]) -> str:
    name = names[prompt] if prompt < len(names) else f"prompt {prompt}"
    return f"{name} (seed {seed})" if seed else name


def _prompts(file: Path) -> list[str]:
    """The prompts of a text file as sd-scripts reads it: a line each, without its options."""
    lines = [
        line.strip()
        for line in file.read_text(encoding="utf-8").splitlines()
        if line.strip() and not line.startswith("#")
    ]
    return [line.split(" --")[0] for line in lines]
