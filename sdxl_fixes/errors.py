"""The two kinds of error that this package raises for a training that must not go on, and how errors show
what they found."""

from __future__ import annotations

import contextlib
import errno
import os
import reprlib
from collections.abc import Iterator
from typing import Any

# what helps against an error of the system
_ADVICE = {
    errno.EACCES: "allow it (chmod, chown), or choose another place",
    errno.EPERM: "allow it (chown; chattr -i -a if it is immutable), or choose another place",
    errno.EROFS: "choose another place",
    errno.ENOSPC: "free some space, or choose another place",
    errno.EDQUOT: "free some space, or choose another place",
    errno.EFBIG: "files may not be that large there (file system, ulimit -f): choose another place",
    errno.EIO: "the disk failed: check it, and copy what is on it",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "its symbolic links lead in a circle: mend them",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.EISDIR: "give a file",
}


class FixError(RuntimeError):
    """A fix that was asked for cannot do its work, or would do it wrongly; the message is one sentence for
    the user."""


class FlagError(ValueError):
    """A flag's value is wrong, or two flags contradict each other; the message is one sentence for the
    user."""


def shown(value: Any) -> str:
    """A value in an error: short, in one line."""
    try:
        return " ".join(reprlib.repr(value).split())
    except ValueError:  # more digits than Python turns into text
        return "a number of thousands of digits"


def printable(text: str) -> str:
    """The text in one line that any terminal prints: line ends, control characters and halves of surrogate
    pairs are escaped."""
    return "".join(c if c.isprintable() or c == "\u3000" else repr(c)[1:-1] for c in text)


def plain(error: OSError) -> str:
    """An error of the system in one sentence: which file, what is wrong and, where that is known, what to
    do."""
    if error.errno is None:
        return str(error)
    file = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes | os.PathLike) else ""
    advice = _ADVICE.get(error.errno)
    return f"{file}{error.strerror}{f': {advice}' if advice else ''}"


@contextlib.contextmanager
def about(path: str | os.PathLike[str]) -> Iterator[None]:
    """Errors of the system that name no file (those of open files) are about ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = os.fspath(path)
        raise


def quoted(text: str, limit: int = 120) -> str:
    """A word of a stranger's file: printable, and cut where it is long."""
    return printable(text[:limit]) + ("..." if len(text) > limit else "")
