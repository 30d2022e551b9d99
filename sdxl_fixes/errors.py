"""The two kinds of error that this package raises for a training that must not go on, and how errors show
what they found."""

from __future__ import annotations

import reprlib
from typing import Any


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


def quoted(text: str, limit: int = 120) -> str:
    """A word of a stranger's file: printable, and cut where it is long."""
    return printable(text[:limit]) + ("..." if len(text) > limit else "")
