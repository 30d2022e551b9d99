"""Checkpoint folders of a loop of one's own, which a kill at any moment leaves whole: ``checkpoint-N`` is
there as a whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

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
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    yield partial
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        partial.rename(whole)
        for old in checkpoints(folder)[:-keep]:
            old.rename(partial)  # what is half removed is no checkpoint
            shutil.rmtree(partial)
    accelerator.wait_for_everyone()
