"""``sdxl-fixes inspect``: what a model file is, how it must be sampled, and who gets that right."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path
from typing import Any

from sdxl_fixes.checkpoint import Sampling, flow_shift
from sdxl_fixes.errors import printable
from sdxl_fixes.model_files.model_file import ModelFile
from sdxl_fixes.schedule import NoiseSchedule
from sdxl_fixes.uis.verdicts import Verdict, as_json, verdicts

# names by which models that are distilled for few steps go: nothing in a file tells
_DISTILLED = re.compile(r"turbo|lightning|hyper|lcm|dmd|schnell", re.IGNORECASE)
_STOCK = Sampling(NoiseSchedule.sdxl(), "epsilon")
_STAMP = "--prediction_type and the schedule's flags, or --from a file that says it"


def add_command(commands: Any) -> None:
    """Register it."""
    parser = commands.add_parser("inspect", help="what a model file is, and what each UI will make of it")
    parser.add_argument("path", type=Path, help="a .safetensors file or a folder")
    parser.add_argument("--all", action="store_true", help="a row of every UI, and what in the file says it")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument(
        "--markdown", action="store_true", help='a section "how to load this model" for the model card'
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The command."""
    file, truth, rows = verdicts(args.path)
    if args.json:
        print(as_json(file, truth, rows))
    elif args.markdown:
        print(as_markdown(args.path, file, truth, rows))
    else:
        print(as_text(args.path, file, truth, rows, args.all))
    return 0


def as_text(
    path: Path, file: ModelFile, truth: Sampling | None, rows: list[Verdict], everything: bool = False
) -> str:
    """A paragraph, then a table of the UIs that get it wrong, or of all."""
    lines = [printable(" ".join(paragraph(path, file, truth, rows)))]
    if everything:
        lines += [f"  says: {where}{': ' if what else ''}{what}" for where, what in file.said().items()]
    table = [row for row in rows if everything or (row.right is False if truth else _odd(row))]
    if table:
        lines += ["", f"{'':<42}{'predicts':<17}{'sigma_max':<11}", *(_line(row) for row in table)]
    return "\n".join(lines)


def _odd(row: Verdict) -> bool:
    """Of a file that says nothing: whether the UI takes it for another than SDXL's own all the same."""
    return row.sampling not in (None, _STOCK)


def _line(row: Verdict) -> str:
    predicts = row.sampling.prediction_type if row.sampling else "-"
    sigma = "-" if row.sigma_max is None else f"{row.sigma_max:.6g}"
    mark = {True: "right", False: "WRONG: ", None: ""}[row.right]
    return printable(f"{row.ui:<42}{predicts:<17}{sigma:<11}{mark}{row.missing}".rstrip())


def paragraph(path: Path, file: ModelFile, truth: Sampling | None, rows: list[Verdict]) -> list[str]:
    """Sentences: what the file is, how it must be sampled, who gets that right, what mends the rest."""
    stamp = f"sdxl-fixes stamp {shlex.quote(str(path))}"
    said = [f"{path}: {'folder of a ' if path.is_dir() else ''}{file.contents.what}."]
    said += [f"{file.mended[:1].upper()}{file.mended[1:]}."] if file.mended else []
    said += _unsaid(file, rows, stamp) if truth is None else [f"To be sampled as {truth}."]
    found = file.contradictions(truth) if truth else []
    if found:
        said.append(f"But {'; '.join(found)}: {stamp} --force makes all of it say the same.")
    elif truth is not None and file.record is None and file.is_sdxl is not False:
        said.append(f"It has no record of that: {stamp} writes it, and all that UIs read.")
    if file.is_sdxl is False:
        said.append("It is not of SDXL, and what UIs make of it is not known here.")
    elif file.kind == "lora":
        said.append(_of_lora(truth))
    elif truth is not None:
        said += _of_uis(rows)
    if _DISTILLED.search(path.name):
        said.append("Its name says that it is distilled for few steps: nothing in a file tells that.")
    return said


def _unsaid(file: ModelFile, rows: list[Verdict], stamp: str) -> list[str]:
    """Of a file that does not say how it was trained."""
    others = [row.ui for row in rows if _odd(row)]
    taken = f"every UI but {_listed(others)} takes" if others else "every UI takes"
    spec = file.header.metadata.get("modelspec.prediction_type") == "epsilon"
    stamp += " --force" if spec else ""  # against that word
    what = "It says epsilon, and nothing of its schedule" if spec else "It does not say how it was trained"
    loaded = any(row.sampling is not None for row in rows)
    said = [f"{what}, so {taken} it for SDXL's own ({_STOCK})." if loaded else f"{what}."]
    if (lost := file.lost()) is not None:
        said.append(
            f"That may be lost: {lost}. If its sources were trained otherwise: {stamp} with {_STAMP}."
        )
    elif file.is_sdxl is not False:
        said.append(f"If that is not so: {stamp} with {_STAMP}." if file.kind != "lora" else "")
    return [sentence for sentence in said if sentence]


def _of_lora(truth: Sampling | None) -> str:
    no_reader = "No UI reads a schedule from a LoRA: the checkpoint that it is used with decides"
    if truth in (None, _STOCK):
        return f"{no_reader}."
    return (
        f"{no_reader}. Use it with one that is sampled as that, or in ComfyUI with the node Schedule from "
        "file (sdxl-fixes comfyui install PATH)."
    )


def _of_uis(rows: list[Verdict]) -> list[str]:
    """Who is right by itself, and who is not."""
    right, wrong = _groups(rows)
    if not wrong:
        return ["Every UI that loads it gets that right by itself."]
    others = [ui for uis in wrong.values() for ui in uis]
    said = f"Right by themselves: {_listed(right)}." if right else "No UI gets that right by itself."
    return [said, f"Wrong, with what mends it below: {_listed(others)}."]


def _groups(rows: list[Verdict]) -> tuple[list[str], dict[str, list[str]]]:
    """The UIs that are right by themselves, and those that are not by what mends it."""
    wrong: dict[str, list[str]] = {}
    for row in rows:
        if row.right is False:
            wrong.setdefault(row.missing, []).append(row.ui)
    return [row.ui for row in rows if row.right and " with our " not in row.ui], wrong


def _listed(uis: list[str]) -> str:
    """The names that have commas in them get brackets."""
    return ", ".join(re.sub(", (.*)", r" (\1)", ui) for ui in uis)


def as_markdown(path: Path, file: ModelFile, truth: Sampling | None, rows: list[Verdict]) -> str:
    """The section for a model card. Raises ValueError if the file does not say how it was trained."""
    if truth is None:
        raise ValueError(
            f"{path} does not say how it was trained, so nobody can say how to load it: stamp it first"
        )
    if file.is_sdxl is False:
        raise ValueError(f"{path} is a {file.contents.what}: only SDXL's models are known here")
    schedule, shift = truth.schedule, flow_shift(truth.schedule)
    name = printable(path.name).replace("`", "'")
    lines = ["## How to load this model", "", f"`{name}` predicts **{truth.prediction_type}**. "]
    if shift is not None:
        lines[-1] += f"Its noise schedule is rectified flow, shift {shift:g}."
    elif schedule == _STOCK.schedule:
        lines[-1] += "Its noise schedule is SDXL's own."
    else:
        lines[-1] += (
            f"Its noise schedule ends at **sigma {schedule.terminal_sigma:.6g}** "
            f"({100 * schedule.residual_signal:.2g} % of the image left; SDXL's own ends at "
            f"{_STOCK.schedule.terminal_sigma:.4g})."
        )
    lines += ["", *(_lora_card(truth) if file.kind == "lora" else _card(rows))]
    return "\n".join([*lines, "", "Made by `sdxl-fixes inspect --markdown`."])


def _lora_card(truth: Sampling) -> list[str]:
    base = "SDXL's own" if truth == _STOCK else "a checkpoint that is sampled the same way"
    return [f"- Use it with {base}: the checkpoint decides how a LoRA is sampled."]


def _card(rows: list[Verdict]) -> list[str]:
    """A line of those that need nothing, and one of each way to help the others."""
    right, wrong = _groups([row for row in rows if " with our " not in row.ui])
    lines = [f"- **{_listed(right)}**: nothing to do."] if right else []
    return lines + [f"- **{_listed(uis)}**: {_cell(note)}." for note, uis in wrong.items()]


def _cell(text: str) -> str:
    """Safe in Markdown."""
    return re.sub(r"([|<>`*\[\]\\])", r"\\\1", printable(text))
