"""What this package says: one logger, on standard error, from the main process only; and which process this
is. A program that gave the logger ``sdxl_fixes`` a handler or a level of its own before is obeyed."""

from __future__ import annotations

import logging
import os
import sys
from typing import NoReturn

logger = logging.getLogger("sdxl_fixes")


class _Lines(logging.Handler):
    """Lines that do not tear somebody's progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        word = "WARNING: " if record.levelno == logging.WARNING else ""
        tqdm.write(f"sdxl-fixes: {word}{record.getMessage()}", file=sys.stderr)


if not logger.handlers:
    logger.addHandler(_Lines())
    logger.propagate = False  # trainers put handlers of their own on the root logger
if logger.level == logging.NOTSET:
    logger.setLevel(logging.INFO)


def rank() -> int:
    """This process's number, as launchers set it."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def say(line: str) -> None:
    """Tell the user, once for all processes."""
    if rank() == 0:
        logger.info(line)


def stop(line: str, status: int = 1) -> NoReturn:
    """End this process with a sentence. Every process that stops says why: another may go on."""
    logger.error(line)
    sys.exit(status)


def warn(line: str) -> None:
    """Warn the user, once for all processes."""
    if rank() == 0:
        logger.warning(line)
