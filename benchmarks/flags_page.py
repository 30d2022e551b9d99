"""Makes docs/flags.md: python benchmarks/flags_page.py > docs/flags.md. What it says is the flags' own."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping

from sdxl_fixes.cli import make_parser
from sdxl_fixes.command_line import Flag
from sdxl_fixes.diffusers.flags import FLAGS_HERE
from sdxl_fixes.diffusers.run import FIXES as SCRIPT_FIXES
from sdxl_fixes.flags import FLAGS
from sdxl_fixes.kohya.flags import OURS
from sdxl_fixes.kohya.run import FIXES as KOHYA_FIXES
from sdxl_fixes.trainers.fixes import Fix

HEAD = """# Flags

Made by `python benchmarks/flags_page.py` from the flags themselves.

A flag is written with underscores, and may be written with hyphens where we read it: `--terminal-sigma` is `--terminal_sigma`. Our
own commands take no abbreviations. In kohya a flag may also be a key of the TOML `--config_file`, where it is checked as on the
command line. "fix" is the name that `--fixes` knows and that `sdxl-fixes doctor` prints; docs with more on each:
[schedule](zero-terminal-snr.md), [loss](huber.md), [weighting](min-snr.md), [noise](input-perturbation.md),
[timesteps](timesteps.md), [keep](conversion.md), [validation, heldout, ema](validation.md), [buckets](buckets.md),
[resume](kohya.md#exact-resume), [speed](kohya.md#speed).
"""
KOHYA = """## With kohya-ss/sd-scripts

`accelerate launch -m sdxl_fixes.kohya sdxl_train.py FLAGS` ([more](kohya.md)). "kohya's" flags have kohya's name and
meaning; the fix serves them (`--loss_type l1`, and `--ip_noise_gamma` without a random strength, stay upstream's own). "ours"
sd-scripts does not have.
"""
SCRIPTS = """
## With diffusers' example scripts

`accelerate launch -m sdxl_fixes.diffusers train_text_to_image_sdxl.py FLAGS` ([more](diffusers.md)). A flag that the script has
itself (`--snr_gamma` and `--prediction_type` in some) keeps its name, and is served by the fix; the others are ours.
"""
COMMANDS = """
## Commands
"""
# of kohya's own flags, those that we serve and have no words for
OF_KOHYA = {
    "scale_v_pred_loss_like_noise_pred": Flag(
        "scale_v_pred_loss_like_noise_pred", bool, False, "weight v-prediction's loss like epsilon's"
    ),
    "v_pred_like_loss": Flag(
        "v_pred_like_loss", float, None, "add so much of a v-like loss to epsilon's loss"
    ),
}
HEADINGS = ("flag", "values", "default", "what it does", "fix", "whose")


def page() -> str:
    """The Markdown."""
    kohya = {**FLAGS, **OF_KOHYA, **OURS}
    lines = [HEAD, KOHYA, *_trainer(kohya, KOHYA_FIXES, OURS, "kohya's")]
    lines += [SCRIPTS, *_trainer(FLAGS_HERE, SCRIPT_FIXES, FLAGS_HERE, "")]
    return "\n".join([*lines, COMMANDS, *_commands(make_parser())])


def _trainer(
    flags: Mapping[str, Flag], fixes: Mapping[str, Fix], ours: Collection[str], theirs: str
) -> list[str]:
    """The table of a trainer: the flags that its fixes know, and ``--fixes`` itself."""
    rows = [
        (flags[name], fix)
        for fix, row in fixes.items()
        for name in dict.fromkeys((*row.flags, *row.needs, *row.options))
    ]
    headings = HEADINGS if theirs else HEADINGS[:-1]
    return _table(
        headings,
        [
            (*_cells(row), fix, *(["ours" if row.name in ours else theirs] if theirs else []))
            for row, fix in [*rows, (flags["fixes"], "all")]
        ],
    )


def _cells(row: Flag) -> tuple[str, str, str, str]:
    """Flag, values, default and help."""
    values = ", ".join(f"`{choice}`" for choice in row.choices) or {
        bool: "",
        int: "whole number",
        float: "number",
        str: "text",
    }.get(row.kind, "")
    return f"`--{row.name}`", values, row.taken or "off", row.help


def _commands(parser: argparse.ArgumentParser) -> list[str]:
    """A table for every command."""
    chosen = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    lines: list[str] = []
    for said in chosen._choices_actions:
        command = chosen.choices[said.dest]
        rows = [_argument(action) for action in command._actions if action.dest != "help"]
        lines += [f"### sdxl-fixes {said.dest}", "", f"{_capital(said.help or '')}.", ""]
        lines += [*_table(("argument", "values", "default", "what it does"), rows), ""]
    return lines[:-1]


def _argument(action: argparse.Action) -> tuple[str, str, str, str]:
    name = ", ".join(f"`{word}`" for word in action.option_strings) or f"`{action.metavar or action.dest}`"
    kind = getattr(action.type, "__name__", "")
    plain = {"int": "whole number", "float": "number", "Path": "path"}.get(kind, "text")
    values = ", ".join(f"`{choice}`" for choice in action.choices or ()) or plain
    help, _, stated = (action.help or "").partition(" (default ")
    off = action.default is None or action.default is False
    default = stated.removesuffix(")") if off else str(action.default)
    taken = default if default else "off" if action.option_strings else "needed"
    return name, "" if action.nargs == 0 else values, taken, help


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _table(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    lines = [headings, ("---",) * len(headings), *rows]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines]


if __name__ == "__main__":
    print(page())
