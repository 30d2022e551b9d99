"""Flags: stated once, as fields of a dataclass, and from there given to a parser, read from a TOML file, and
written into docs/flags.md.

    @dataclass(frozen=True)
    class Brush:
        width: float = flag(1.0, "in pixels")
        tip: str | None = flag(None, "its form", choices=("round", "flat"), unset="round")

    flags_of(Brush)     # {"width": Flag(...), "tip": Flag(...)}

Every flag has underscores. Where we read the command line, hyphens are taken for them: ``--in-place`` is
``--in_place``.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import types
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

from sdxl_fixes.errors import FlagError

_EXPECTED: Mapping[Any, str] = {
    bool: "true or false, without quotes",
    int: "a whole number",
    float: "a number",
    str: "text in quotes",
}


@dataclasses.dataclass(frozen=True)
class Flag:
    """One flag of a command line, or key of a TOML file.

    kind     bool (a switch), int, float or str
    default  its value where it is not given
    help     what it does
    choices  the values that it may have; empty: any
    group    what it belongs to
    unset    what a default of None comes to, for people
    """

    name: str
    kind: type
    default: Any = None
    help: str = ""
    choices: tuple[Any, ...] = ()
    group: str = ""
    unset: Any = None

    @property
    def taken(self) -> str:
        """What holds where it is not given, for people; "" where that is nothing at all."""
        value = self.unset if self.default is None else self.default
        return "" if value is None or value is False else str(value)

    def add_to(self, parser: argparse._ActionsContainer) -> None:
        """Add it to a parser, or to a group of one."""
        if self.kind is bool:
            parser.add_argument(f"--{self.name}", action="store_true", help=self.help)
            return
        help = f"{self.help} (default {self.taken})" if self.taken else self.help
        choices = self.choices or None
        parser.add_argument(
            f"--{self.name}", type=self.kind, default=self.default, choices=choices, help=help
        )

    def read(self, value: Any) -> Any:
        """``value`` as the command line would have read it. Raises FlagError if it would not take it."""
        found = _of_kind(self.kind, value)
        if found is None or (self.choices and found not in self.choices):
            named = ", ".join(str(choice) for choice in self.choices if choice is not None)
            expected = f"one of {named}" if named else _EXPECTED[self.kind]
            raise FlagError(
                f"--{self.name}: expected {expected}, got {value!r}: correct it, or leave the flag out"
            )
        return found


def flag(
    default: Any, help: str, *, choices: tuple[str, ...] = (), group: str = "", unset: Any = None
) -> Any:
    """A field that is a flag; its name and kind are the field's. The rest as for :class:`Flag`."""
    return dataclasses.field(
        default=default, metadata={"help": help, "choices": choices, "group": group, "unset": unset}
    )


@functools.cache
def flags_of(stated: type) -> Mapping[str, Flag]:
    """The flags that a dataclass states, in its order."""
    fields = [field for field in dataclasses.fields(stated) if "help" in field.metadata]
    # of the flags alone: other fields' types may come from modules that are not imported
    written = types.SimpleNamespace(__annotations__={field.name: field.type for field in fields})
    kinds = typing.get_type_hints(written)
    return types.MappingProxyType(
        {
            field.name: Flag(field.name, _plain(kinds[field.name]), field.default, **field.metadata)
            for field in fields
        }
    )


def _plain(kind: Any) -> type:
    """float of ``float | None``."""
    plain: type = next((part for part in typing.get_args(kind) if part is not type(None)), kind)
    return plain


def add_flags(parser: argparse.ArgumentParser, flags: Mapping[str, Flag], title: str = "sdxl-fixes") -> None:
    """Add ``flags`` to ``parser`` as a group, except those that it has already (which keep their own help and
    defaults)."""
    group = parser.add_argument_group(title)
    for name, stated in flags.items():
        if f"--{name}" not in parser._option_string_actions:
            stated.add_to(group)


def declared(parser: argparse.ArgumentParser, names: Iterable[str]) -> dict[str, Flag]:
    """What ``parser`` says of those of the flags ``names`` that it has; those that take a kind of value which
    :class:`Flag` does not know are left out."""
    known = {
        action.dest: action
        for action in parser._actions
        if action.nargs in (None, 0) and action.type in (None, *_EXPECTED)
    }
    return {
        name: Flag(
            name,
            bool if known[name].nargs == 0 else typing.cast(type, known[name].type or str),
            known[name].default,
            choices=tuple(known[name].choices or ()),
        )
        for name in names
        if name in known
    }


def read_values(args: argparse.Namespace, flags: Mapping[str, Flag]) -> dict[str, Any]:
    """The values that ``args`` has of ``flags`` (None and false are none, also for a number, as trainers' own
    ``if`` takes them), as the command line would have read them: they may come from a TOML file, which
    argparse does not check. Raises FlagError for a value that the command line would not take."""
    given = {name: getattr(args, name, None) for name in flags}
    return {name: flags[name].read(v) for name, v in given.items() if v is not None and v is not False}


def _of_kind(kind: type, value: Any) -> Any:
    """``value``, or what its text says; None if that is not of ``kind``. A number stays as it is, except that
    900.0 is a whole one."""
    if kind is bool or isinstance(value, bool):
        # 1 and 0 are the same, and trainers take them
        return bool(value) if kind is bool and value in (True, False) else None
    if isinstance(value, str):
        try:
            return kind(value)
        except ValueError:
            return None
    if isinstance(value, Real) and kind is int:
        return round(value) if value % 1 == 0 else None
    return value if isinstance(value, Real) and kind is float else None


def underscored(words: Sequence[str], flags: Collection[str]) -> list[str]:
    """The words of a command line with ``--in_place`` for ``--in-place`` where that is one of ``flags``
    (``--in_place``); what follows a bare ``--`` is left alone."""
    end = words.index("--") if "--" in words else len(words)
    return [*(_underscored(word, flags) for word in words[:end]), *words[end:]]


def _underscored(word: str, flags: Collection[str]) -> str:
    name, equals, value = word.partition("=")
    meant = "--" + name[2:].replace("-", "_")
    return meant + equals + value if name.startswith("--") and meant in flags else word


class Parser(argparse.ArgumentParser):
    """The parser of our own commands: hyphens are taken for underscores, and the beginning of a flag is not
    taken for the flag."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **options})

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse's; a command's own parser reads its words by this, too."""
        words = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(underscored(words, self._option_string_actions), namespace)
