"""``sdxl-fixes stamp``."""

from __future__ import annotations

import argparse
import contextlib
import os
from pathlib import Path
from typing import Any

from sdxl_fixes.atomic import real, replacing
from sdxl_fixes.checkpoint import MODELSPEC, Sampling
from sdxl_fixes.command_line import add_flags
from sdxl_fixes.commands.schedule import add_flow_shift, flow_of
from sdxl_fixes.errors import about, plain, printable
from sdxl_fixes.flags import SCHEDULE_FLAGS, TrainingFlags
from sdxl_fixes.model_files.kinds import KINDS
from sdxl_fixes.model_files.model_file import SCHEDULER_CONFIG, beside, read_sampling
from sdxl_fixes.model_files.stamp import (
    Stamped,
    a1111_yaml,
    model_files,
    scheduler_config_ready,
    stamp_file,
)
from sdxl_fixes.names import PREDICTION_TYPES
from sdxl_fixes.schedule import NoiseSchedule

MODELSPEC_ONLY = tuple(word for word in MODELSPEC if word not in PREDICTION_TYPES)
WAYS = {
    "header": "written into the header's room",
    "insert": "blocks inserted at the start of the file",
    "copy": "copied with a new header, and put in the old one's place",
}


def add_command(commands: Any) -> None:
    """Register it."""
    parser = commands.add_parser(
        "stamp", help="write into a model file how to sample it, so that UIs load it right"
    )
    parser.add_argument(
        "path",
        type=Path,
        help="a .safetensors file (checkpoint, U-Net, LoRA), or a diffusers or sharded folder",
    )
    parser.add_argument(
        "--prediction_type",
        choices=(*PREDICTION_TYPES, *MODELSPEC_ONLY),
        help="what the model predicts; v and x0 are modelspec's and SwarmUI's words for v_prediction and "
        "sample, v-zsnr also says --zero_terminal_snr",
    )
    add_flags(parser, SCHEDULE_FLAGS)
    parser.add_argument(
        "--base",
        choices=("sdxl", "linear", "cosine", "flow"),
        help="schedule to start from (default: sdxl; for flow, flow)",
    )
    add_flow_shift(parser)
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="PATH",
        help="take it from a scheduler_config.json, a schedule record, a diffusers folder, or another "
        "stamped file, instead of flags",
    )
    parser.add_argument("--force", action="store_true", help="stamp although the file says something else")
    parser.add_argument(
        "--in_place",
        action="store_true",
        help="change the file itself (ext4, XFS) instead of a copy of it: it needs room for a journal of its "
        "header alone, and one killed at a bad moment is unreadable until inspect or stamp mends it",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="write the stamped file here and leave PATH alone"
    )
    parser.add_argument("--check", action="store_true", help="hash the tensors before and after")
    parser.add_argument(
        "--yaml", action="store_true", help="also write the YAML that tells A1111 up to 1.10 v-prediction"
    )
    parser.add_argument("--dry_run", action="store_true", help="say what would be done")
    parser.set_defaults(run=stamp)


def stamp(args: argparse.Namespace) -> int:
    """The command."""
    _spell_out(args)
    sampling = sampling_from_args(args)
    yaml = a1111_yaml(sampling) if args.yaml else None
    if args.output is not None and args.path.is_dir():
        raise ValueError("--output belongs to one file: copy the folder first, then stamp the copy")
    if args.output is not None and args.output.exists() and not args.force:
        raise ValueError(f"{args.output} exists already: choose another name, or give --force to replace it")
    if yaml is not None:
        _check_yaml(beside(args.output or args.path, ".yaml"), yaml, args.force)
    if args.path.is_dir():
        said = _stamp_folder(args, sampling)
    else:
        said = _stamp_file(args, sampling, yaml)
    with about("standard output"):  # when all is done, so that one which takes nothing stops nothing
        print(sampling, *map(printable, said), sep="\n")
    return 0


def _stamp_folder(args: argparse.Namespace, sampling: Sampling) -> list[str]:
    files, config = model_files(args.path), args.path / "scheduler" / SCHEDULER_CONFIG
    # refuse before anything is written
    first = [stamp_file(file, sampling, force=args.force, dry_run=True) for file in files]
    # a scheduler of SDXL's own is what every tool writes, and says nothing
    found = None if args.force else read_sampling(args.path)
    if found not in (None, sampling, Sampling(NoiseSchedule.sdxl(), "epsilon")):
        raise ValueError(
            f"{config} says {found}; the stamp would say {sampling}: give --force if the stamp is right"
        )
    said: list[str] = []
    with contextlib.ExitStack() as ready:
        written = None
        if config.parent.is_dir() and not args.dry_run:
            written = ready.enter_context(scheduler_config_ready(config, sampling))
        for number, done in enumerate(first):
            try:
                said += _lines(done, stamp_file(done.path, sampling, **_options(args)))
            except OSError as error:
                more = f"; {number} of {len(files)} files are stamped: then give the same command again"
                raise OSError(plain(error) + more * (number > 0)) from error
    return [*said, f"{config}: {written}"] if written else said


def _stamp_file(args: argparse.Namespace, sampling: Sampling, yaml: str | None) -> list[str]:
    # refuse before anything is written
    first = stamp_file(args.path, sampling, force=args.force, output=args.output, dry_run=True)
    path, said = args.output or args.path, []
    with contextlib.ExitStack() as ready:
        if first.kind not in ("lora", "shard") and not args.dry_run:
            config = beside(path, "." + SCHEDULER_CONFIG)
            said.append(f"{config}: {ready.enter_context(scheduler_config_ready(config, sampling))}")
        if yaml is not None and first.kind != "lora" and not args.dry_run:
            file = beside(path, ".yaml")
            with about(file):
                ready.enter_context(replacing(file)).write_text(yaml, encoding="utf-8")
            said.append(f"{file}: written")
        done = stamp_file(args.path, sampling, output=args.output, **_options(args))
    return _lines(first, done) + said


def _options(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in ("force", "in_place", "check", "dry_run")}


def _spell_out(args: argparse.Namespace) -> None:
    """Put our names in place of modelspec's word."""
    if args.prediction_type in MODELSPEC_ONLY:
        args.prediction_type, zero_snr = MODELSPEC[args.prediction_type]
        args.zero_terminal_snr = args.zero_terminal_snr or zero_snr


def sampling_from_args(args: argparse.Namespace) -> Sampling:
    """How the model was trained: by flags, by --from, or by what the file says itself. Raises ValueError if
    nothing says it."""
    flags = [
        "flow_shift" if name == "shift" else name
        for name in (*SCHEDULE_FLAGS, "base", "shift")
        if not (getattr(args, name) is None or getattr(args, name) is False)
    ]
    if args.source is None and (flags or args.prediction_type):
        if args.prediction_type is None:
            raise ValueError(
                f"--{flags[0]} tells the schedule; tell also what the model predicts, with --prediction_type"
            )
        if args.shift is not None and args.base not in (None, "flow"):
            raise ValueError(f"--flow_shift belongs to --base flow, not to --base {args.base}: leave it out")
        flow = (
            args.base == "flow"
            or args.shift is not None
            or (args.base is None and args.prediction_type == "flow_prediction")
        )
        makers = {"linear": NoiseSchedule.linear, "cosine": NoiseSchedule.cosine}
        base = flow_of(args.shift) if flow else makers.get(args.base, NoiseSchedule.sdxl)()
        return Sampling(TrainingFlags.from_args(args).schedule(base), args.prediction_type)
    if flags:
        raise ValueError(f"--from and --{flags[0]} are two sources for one schedule: give one of them")
    source = args.source or args.path
    said = read_sampling(source, args.prediction_type)
    if said is None:
        other = "say it with --prediction_type and the schedule's flags, or with --from"
        other = "give another --from" if args.source else other
        raise ValueError(f"{source} does not say how it was trained: {other}")
    if args.prediction_type not in (None, said.prediction_type):
        raise ValueError(
            f"{source} says {said.prediction_type}, --prediction_type "
            f"{args.prediction_type}: leave one of them out"
        )
    return said


def _check_yaml(old: Path, yaml: str, force: bool) -> None:
    """Raise ValueError if what is there is no file, or says anything but ``yaml`` and is not to be
    replaced."""
    if os.path.lexists(old) and not old.is_file() and real(old).exists():
        raise ValueError(f"{old} is not a regular file: move it away")
    if not force and old.is_file() and old.read_text("utf-8", errors="replace") != yaml:
        raise ValueError(
            f"{old} exists already and says something else: move it away, or give --force to replace it"
        )


def _lines(first: Stamped, done: Stamped) -> list[str]:
    """What was done to one file, for people; ``first`` knows what the first look found and mended."""
    way, marks = WAYS.get(done.way, done.way), ", ".join(done.markers) or "none"
    return [
        f"{done.path}: {KINDS[done.kind][0]}; {way}; markers: {marks}",
        *(f"  {note}" for note in dict.fromkeys((*first.notes, *done.notes))),
    ]
