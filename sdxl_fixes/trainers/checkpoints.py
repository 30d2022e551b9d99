"""Checkpoint folders of a loop of one's own, which a kill or a power cut at any moment leaves whole:
``checkpoint-N`` is there as a whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sdxl_fixes.atomic import flush, flush_names

if TYPE_CHECKING:
    from accelerate import Accelerator

_NAME = "checkpoint-"


def checkpoints(folder: Path) -> list[Path]:
    """The whole ones in ``folder``, by number, the last at the end."""
    numbers = {path: path.name.removeprefix(_NAME) for path in folder.glob(f"{_NAME}*")}
    found = [path for path, number in numbers.items() if number.isdecimal()]
    return sorted(found, key=lambda path: int(numbers[path]))


@contextmanager
def checkpoint(folder: Path, number: int, accelerator: Accelerator, keep: int) -> Iterator[Path]:
    """A new folder for every process to write to, which becomes ``checkpoint-NUMBER`` when the block ends in
    all of them; the last ``keep`` stay. To be entered by all processes."""
    partial, whole = folder / "checkpoint.part", folder / f"{_NAME}{number}"
    if accelerator.is_main_process:
        for stale in folder.glob("checkpoint*.part"):
            _remove(stale)
        partial.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()
    yield partial
    flush(partial)  # by every process, which on a file system of several machines wrote its own files
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        flush(partial)
        os.rename(partial, whole)
        flush_names(folder)
        for old in checkpoints(folder)[:-keep]:
            removed = old.with_name(f"{old.name}.part")  # what is half removed is no checkpoint
            os.rename(old, removed)
            _remove(removed)
    accelerator.wait_for_everyone()


def _remove(folder: Path) -> None:
    """A folder and all in it, but for .nfs files: NFS so keeps what is removed while it is open, and removes
    it when it is closed."""
    shutil.rmtree(folder, ignore_errors=True)
    if any(not path.is_dir() and not path.name.startswith(".nfs") for path in folder.rglob("*")):
        shutil.rmtree(folder)  # raises what is in the way
