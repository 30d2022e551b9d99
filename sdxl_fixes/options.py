"""Values of a user's file, checked: each of a wrong kind is one sentence that names the place, the key, the
value and what was expected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdxl_fixes.errors import shown


def text(where: str, options: Mapping[str, Any], key: str) -> str | None:
    """The text under ``key``, None without one. Raises ValueError for anything else."""
    value = options.get(key)
    if not (value is None or isinstance(value, str)):
        raise ValueError(f"{where}: {key} is {shown(value)}: expected text")
    return value


def flag(where: str, options: Mapping[str, Any], key: str) -> bool:
    """Whether ``key`` is true; false without it. Raises ValueError for anything but true and false."""
    value = options.get(key, False)
    if not isinstance(value, bool):
        raise ValueError(f"{where}: {key} is {shown(value)}: expected true or false")
    return value


def whole(where: str, key: str, value: Any, least: int, most: int) -> int:
    """``value``, which stands under ``key``, if it is a whole number from ``least`` to ``most``. Raises
    ValueError if it is not."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{where}: {key} is {shown(value)}: expected a whole number in {least}..{most}")
    return value


def number(where: str, options: Mapping[str, Any], key: str, least: float, most: float) -> float:
    """The number under ``key``, 0 without one, if it lies in ``least`` to ``most``. Raises ValueError if it
    does not."""
    value = options.get(key, 0)
    if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{where}: {key} is {shown(value)}: expected a number in {least:g}..{most:g}")
    return value


def tables(where: str, value: Any) -> list[dict[str, Any]]:
    """``value`` if it is a list of tables (TOML) or objects (JSON). Raises ValueError if it is not."""
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise ValueError(f"{where} is {shown(value)}: expected an array of tables")
    return value
