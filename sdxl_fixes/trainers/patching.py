"""Patches: replace a function of somebody else's module, only if it has the shape we know, and put it back exactly.

A patch belongs to a fix (``schedule``, ``loss``, ...). A fix is applied whole or refused whole: half a fix would be the very
disagreement that this package exists to remove.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Patch:
    """One replaced function.

    fix          name of the fix it belongs to
    target       "package.module:attribute" or "package.module:Class.attribute"
    parameters   names of the target's first parameters, as known (a classmethod's without cls; none for a builtin, which tells no
                 names); a target that has others is refused
    exact        whether the target may have no further parameters (its replacement would ignore them)
    replacement  called as replacement(original, *args, **kwargs) in the target's place; args begin with self or cls
    purpose      what it changes, for reports
    """

    fix: str
    target: str
    parameters: tuple[str, ...]
    replacement: Callable[..., Any]
    purpose: str
    exact: bool = False

    def mismatch(self, found: Sequence[str]) -> str | None:
        """Why a target with parameters ``found`` does not fit, or None."""
        known = tuple(found) if self.exact else tuple(found[: len(self.parameters)])
        if known == self.parameters:
            return None
        return f"{self.target}: expected parameters ({', '.join(self.parameters)}), found ({', '.join(found)})"


@dataclass
class _Applied:
    owner: Any
    name: str
    original: Any  # as found in the owner's own __dict__; None where it was inherited
    inherited: bool
    replacement: Any


@dataclass
class PatchSet:
    """A table of patches, applied and undone together. ``calls`` counts, per fix, how often :meth:`reached` said it did its work."""

    patches: Sequence[Patch]
    refused: dict[str, str] = field(default_factory=dict)  # fix -> why
    calls: dict[str, int] = field(default_factory=dict)
    _applied: list[_Applied] = field(default_factory=list)

    @property
    def applied(self) -> bool:
        return bool(self._applied)

    def check(self) -> dict[Patch, str | None]:
        """For every patch why it does not fit here, or None. Imports the targets' modules, changes nothing."""
        return {patch: _mismatch(patch) for patch in self.patches}

    def apply(self, fixes: Collection[str] | None = None) -> None:
        """Apply the patches of ``fixes`` (None: of all); a fix with a patch that does not fit is recorded in ``refused`` instead.

        Applying again first undoes. Either everything that fits is applied or, on an error, nothing.
        """
        self.undo()
        self.refused, self.calls = {}, {}
        for patch, why in self.check().items():
            if why is not None:
                self.refused.setdefault(patch.fix, why)
        try:
            for patch in self.patches:
                if patch.fix not in self.refused and (fixes is None or patch.fix in fixes):
                    self._applied.append(_replace(patch))
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        """Put every original back, newest first. Raises RuntimeError, naming the target, if somebody replaced ours meanwhile."""
        while self._applied:
            entry = self._applied[-1]
            if inspect.getattr_static(entry.owner, entry.name, None) is not entry.replacement:
                raise RuntimeError(
                    f"cannot undo the patch of {entry.name}: {_name(entry.owner)}.{entry.name} was replaced again by somebody else; "
                    "undo theirs first"
                )
            if entry.inherited:
                delattr(entry.owner, entry.name)
            else:
                setattr(entry.owner, entry.name, entry.original)
            self._applied.pop()

    def reached(self, fix: str) -> None:
        """Count one piece of work done by ``fix``."""
        self.calls[fix] = self.calls.get(fix, 0) + 1


def _resolve(target: str) -> tuple[Any, str]:
    module, _, path = target.partition(":")
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    getattr(owner, name)
    return owner, name


def _mismatch(patch: Patch) -> str | None:
    try:
        owner, name = _resolve(patch.target)
        found = _parameters(getattr(owner, name))
    except (ImportError, AttributeError, TypeError, RuntimeError) as error:  # RuntimeError: diffusers' failed lazy import
        return f"{patch.target}: expected a function with parameters ({', '.join(patch.parameters)}), found none ({error})"
    return patch.mismatch(found)


def _parameters(function: Any) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(function).parameters)
    except ValueError:  # a builtin that does not tell
        return ()


def _replace(patch: Patch) -> _Applied:
    owner, name = _resolve(patch.target)
    found = inspect.getattr_static(owner, name)
    original = found.__func__ if isinstance(found, classmethod) else getattr(owner, name)

    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return patch.replacement(original, *args, **kwargs)

    made = classmethod(replacement) if isinstance(found, classmethod) else replacement
    inherited = name not in vars(owner)
    entry = _Applied(owner, name, None if inherited else vars(owner)[name], inherited, made)
    setattr(owner, name, made)
    return entry


def _name(owner: Any) -> str:
    return str(getattr(owner, "__qualname__", getattr(owner, "__name__", owner)))


def check_source(patch: Patch, root: Path) -> str | None:
    """As :meth:`PatchSet.check`, for a checkout at ``root``: reads its source without importing it."""
    module, _, path = patch.target.partition(":")
    file = root.joinpath(*module.split(".")).with_suffix(".py")
    if not file.is_file():
        return f"{patch.target}: there is no {file.relative_to(root)}"
    found: ast.AST | None = ast.parse(file.read_text(encoding="utf-8"))
    for name in path.split("."):
        found = _defined(found, name)
    if isinstance(found, ast.ImportFrom):
        return None  # a library's own function: its parameters are known when it is imported
    if not isinstance(found, ast.FunctionDef):
        return f"{patch.target}: expected a function with parameters ({', '.join(patch.parameters)}), found none"
    parameters = [a.arg for a in (*found.args.posonlyargs, *found.args.args, *found.args.kwonlyargs)]
    return patch.mismatch(parameters)


def _defined(tree: ast.AST | None, name: str) -> ast.AST | None:
    for node in getattr(tree, "body", ()):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return node
        if isinstance(node, ast.ImportFrom) and name in [alias.asname or alias.name for alias in node.names]:
            return node
    return None
