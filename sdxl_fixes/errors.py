"""The one kind of error that this package raises for a training that must not go on."""

from __future__ import annotations


class FixError(RuntimeError):
    """A fix that was asked for cannot do its work, or would do it wrongly; the message is one sentence for the user."""
