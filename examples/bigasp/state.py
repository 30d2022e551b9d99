"""What a checkpoint of train.py says of its training (progress.json), and what goes on with it."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from latents import index
from settings import OURS, WEIGHTED, weight_files

from sdxl_fixes.atomic import replacing
from sdxl_fixes.flags import FLAGS, TrainingFlags
from sdxl_fixes.objective import Objective
from sdxl_fixes.trainers.fixed_loss import dealt

FILE, LOG = "progress.json", "log.jsonl"
SAME = ("seed", "heldout", "train_text_encoder", "precision")


def lasting(
    args: argparse.Namespace, flags: TrainingFlags, objective: Objective, accelerator: Accelerator
) -> dict[str, list[Any]]:
    """What a state is gone on with, or not at all: by its name [what is compared, how it is said]. It is what
    the state's weights were trained on and for, and what of the model's folder is not in it. All other flags
    may change: rates, batches, processes, how often something is done, and what makes it fast."""
    found = {f"--{name}": [getattr(args, name)] * 2 for name in SAME}
    found["--model"] = [weights(Path(args.model)), args.named]
    store = index(args.latents).read_bytes()
    found["--latents"] = [hashlib.sha256(store).hexdigest(), str(args.latents)]
    found["--prediction_type"] = [objective.prediction_type] * 2
    found["the schedule"] = [objective.schedule.to_record(), flags.schedule_words or "as SDXL's own"]
    for name in OURS:
        if FLAGS[name].group not in ("prediction", "schedule"):
            value = getattr(flags, name)
            found[f"--{name}"] = [(FLAGS[name].unset if value is None else value) or 0] * 2
    kind = dealt(accelerator)
    found["the engine"] = [kind if kind in ("FSDP", "DEEPSPEED") else "DDP, or one process"] * 2
    return found


def weights(folder: Path) -> str:
    """Tells a pipeline from another: of each file of weights the size and 64 KiB in its middle."""
    digest = hashlib.sha256()
    for file in (file for name in WEIGHTED for file in weight_files(folder / name)):
        size = file.stat().st_size
        with open(file, "rb") as found:
            found.seek(size // 2)
            digest.update(f"{size}".encode() + found.read(1 << 16))
    return digest.hexdigest()


def plain_flags(args: argparse.Namespace) -> dict[str, int | float | str | bool]:
    """All that were given or hold by default, as trackers and JSON take them."""
    values = {name: value for name, value in vars(args).items() if value is not None}
    return {n: v if isinstance(v, int | float | str | bool) else str(v) for n, v in values.items()}


def read(folder: Path) -> dict[str, Any]:
    """A checkpoint's file. Raises SystemExit where it has none."""
    try:
        found: dict[str, Any] = json.loads((folder / FILE).read_text())
        return {**found, "lasting": found["lasting"]}
    except (OSError, ValueError, KeyError) as error:
        raise SystemExit(
            f"--resume: {folder} has no {FILE} of this train.py ({error}): "
            "begin anew in another --output, with --model and a model's folder"
        ) from error


def refuse_other(folder: Path, before: dict[str, Any], now: dict[str, list[Any]]) -> None:
    """Raise SystemExit where the state in ``folder``, of ``before``, cannot go on as ``now`` says."""
    now = json.loads(json.dumps(now))
    other = [
        f"{name} {told} (this run: {said})"
        for name, (value, said) in now.items()
        for old, told in [before.get(name, (None, "unknown"))]
        if old != value
    ]
    if other:
        raise SystemExit(
            f"--resume: {folder} was trained with {', '.join(other)}: give what it was trained with, or "
            f"begin anew in another --output with --model {folder / 'model'}"
        )


def changed(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The flags that are not as they were, for people."""
    names = [n for n in {**before, **now} if n not in ("resume", "model", "named", "output")]
    return ", ".join(
        f"--{n} {now.get(n, 'none')} (was {before.get(n, 'none')})"
        for n in names
        if before.get(n) != now.get(n)
    )


def cut_log(folder: Path, samples: int) -> int:
    """Take from the log what came after ``samples``, which will be written again, and a line that a kill cut
    off; how many lines. Killed meanwhile, it is as it was."""
    log = folder / LOG
    if not log.exists():
        return 0
    text = log.read_text("utf-8", errors="replace")
    lines = text.splitlines()
    kept = [line for line in lines if _samples(line) <= samples]
    if len(kept) < len(lines) or not text.endswith("\n"):
        with replacing(log) as partial:
            partial.write_text("".join(f"{line}\n" for line in kept), "utf-8")
    return len(lines) - len(kept)


def _samples(line: str) -> float:
    """How many had been seen; after all where the line is not whole."""
    try:
        return float(json.loads(line)["samples"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def set_aside(folder: Path, samples: bool) -> list[str]:
    """Rename the log, and the table of ``samples``, of a training that got to no checkpoint: this one's would
    go on in them. Their new names."""
    names = (LOG, "samples.html")[: 1 + samples]
    found = [path for path in (folder / name for name in names) if path.exists()]
    return [path.rename(_free(path)).name for path in found]


def _free(path: Path) -> Path:
    """``NAME.old``, ``NAME.old2``, ...: the first that nothing has."""
    names = (path.with_name(f"{path.stem}.old{n or ''}{path.suffix}") for n in (0, *range(2, 1000)))
    return next(name for name in names if not name.exists())
