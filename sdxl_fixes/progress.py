"""A progress bar where tqdm is installed, and none where it is not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def bar(items: Iterable[T], title: str, shown: bool, total: int | None = None) -> Iterator[T]:
    """``items`` with a bar on standard error, if ``shown``."""
    if shown:
        try:
            from tqdm import tqdm

            return iter(tqdm(items, desc=title, total=total))
        except ImportError:
            pass  # a bar is a comfort
    return iter(items)
