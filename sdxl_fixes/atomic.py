"""Files that are written whole or not at all, and the names of what lies beside a file meanwhile."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NAME_MAX = 255  # bytes of a name, where the file system does not say; Windows counts 255 UTF-16 units


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of ``path`` in one move when the block ends. If it fails,
    ``path`` is as it was and nothing is left behind. A symbolic link stays and its target is replaced; the
    mode stays."""
    target = real(path)
    partial = companion(target, f".{os.getpid()}.part")
    try:
        yield partial
        with contextlib.suppress(FileNotFoundError):
            shutil.copymode(target, partial)
        os.replace(partial, target)
    except OSError as error:
        if error.filename is not None and os.fspath(error.filename) == str(partial):
            error.filename = str(path)  # the name that was asked for
        raise
    finally:
        partial.unlink(missing_ok=True)


def flush(folder: Path) -> None:
    """Wait until all that is in ``folder``, and its names, are on the disk: without it a move may outlast a
    power cut that the moved files' contents do not. What another process removes meanwhile is passed over."""
    for path, _, files in os.walk(folder, topdown=False):
        for name in files:
            with contextlib.suppress(FileNotFoundError):
                _flush(os.path.join(path, name), os.O_RDWR if os.name == "nt" else os.O_RDONLY)
        flush_names(Path(path))


def flush_names(folder: Path) -> None:
    """Wait until the names in ``folder`` are on the disk, where a file system can."""
    if os.name == "nt":  # which opens no folder
        return
    try:
        _flush(os.fspath(folder), os.O_RDONLY)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # what network file systems say
            raise


def _flush(path: str, mode: int) -> None:
    file = os.open(path, mode)
    try:
        os.fsync(file)
    finally:
        os.close(file)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """No other process is in a block of ``folder`` meanwhile, where the system locks folders; elsewhere
    nothing is locked."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    file = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a network file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)  # which also unlocks


def real(path: Path) -> Path:
    """``path`` with its links followed, as far as they lead (Path.resolve raises RuntimeError at a loop)."""
    return Path(os.path.realpath(path))


def companion(path: Path, suffix: str, name: str | None = None) -> Path:
    """What lies beside ``path``: its name, or ``name``, with ``suffix``. Where that is too long for the file
    system, the name is cut, and 12 digits of its SHA-256 tell it from others that begin alike."""
    name = path.name if name is None else name
    limit = NAME_MAX
    with contextlib.suppress(OSError, ValueError, AttributeError):  # no such folder, no such call
        limit = min(limit, os.pathconf(path.parent, "PC_NAME_MAX"))  # FAT says 1530
    if len(os.fsencode(name + suffix)) > limit:
        suffix = f"~{hashlib.sha256(os.fsencode(name)).hexdigest()[:12]}{suffix}"
        while name and len(os.fsencode(name + suffix)) > limit:
            name = name[:-1]
    return path.with_name(name + suffix)
