"""Patches: replace a function of somebody else's code wherever it went, only if it has the shape we know, and
put it back exactly.

A patch is of a function, not of a name in a module. Trainers move their functions and leave re-exports behind
that nobody calls; so a target is looked for in the modules where it is known to have lived, else in all of
the trainer's source, and replaced in its defining module and in every other module of the trainer that holds
it, under whatever name.

A patch serves fixes (``schedule``, ``loss``, ...). A fix is applied whole or refused whole: half a fix would
be the very disagreement that this package exists to remove.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from sdxl_fixes.errors import FixError
from sdxl_fixes.trainers.source import belongs, defines, defining, has_package, parameters


@dataclass(frozen=True)
class Patch:
    """One replaced function.

    fixes        names of the fixes it serves; one of them is enough to apply it
    target       "package.module:function" or "package.module:Class.method"; several modules, newest first,
                 are separated by "|"
    parameters   names of the target's first parameters, as known (a classmethod's without cls; none for a
                 builtin, which tells no names); a target that has others is refused
    replacement  called as replacement(original, *args, **kwargs) in the target's place; args begin with self
                 or cls
    purpose      what it changes, for reports
    exact        whether the target may have no further parameters (its replacement would ignore them)
    only         file names of the trainer's scripts that call it; empty: all do
    """

    fixes: tuple[str, ...]
    target: str
    parameters: tuple[str, ...]
    replacement: Callable[..., Any]
    purpose: str
    exact: bool = False
    only: tuple[str, ...] = ()

    @property
    def homes(self) -> list[str]:
        """Modules where the target is known to be defined, or to be called from."""
        return self.target.partition(":")[0].split("|")

    @property
    def path(self) -> str:
        """The target's name in its module: function or Class.method."""
        return self.target.partition(":")[2]

    def mismatch(self, found: Sequence[str]) -> str | None:
        """Why a target with parameters ``found`` does not fit, or None."""
        known = tuple(found) if self.exact else tuple(found[: len(self.parameters)])
        if known == self.parameters:
            return None
        return f"{self.path}: expected parameters ({', '.join(self.parameters)}), found ({', '.join(found)})"

    def absent(self, why: object) -> str:
        """What to say where there is no such function."""
        return (
            f"{self.path}: expected a function with parameters ({', '.join(self.parameters)}), found "
            f"none ({why})"
        )


@dataclass
class _Applied:
    owner: Any
    name: str
    original: Any  # as found in the owner's own __dict__; None where it was inherited
    inherited: bool
    replacement: Any


@dataclass
class PatchSet:
    """A table of patches, applied and undone together.

    root   the trainer's folder: modules of it that hold a target get the replacement, too, and unknown homes
           are searched there
    calls  called with the patch at every call of a replaced function, before the replacement runs

    Raises ValueError for two rows of one (target, replacement): each would wrap the other and do the work
    twice.
    """

    patches: Sequence[Patch]
    root: Path | None = None
    calls: Callable[[Patch], None] | None = None
    refused: dict[str, str] = field(default_factory=dict)  # fix -> why
    # script, fix -> why, where others may do without
    refused_in: dict[tuple[str, str], str] = field(default_factory=dict)
    _applied: list[_Applied] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._root = None if self.root is None else str(self.root)
        seen = set()
        for patch in self.patches:
            if (patch.target, patch.replacement) in seen:
                raise ValueError(
                    f"{patch.target} has two rows with one replacement: give one row all of its fixes"
                )
            seen.add((patch.target, patch.replacement))

    @property
    def applied(self) -> bool:
        return bool(self._applied)

    def check(self) -> dict[Patch, str | None]:
        """For every patch why it does not fit here, or None. Imports the targets' modules, changes
        nothing."""
        return {patch: self._mismatch(patch) for patch in self.patches}

    def apply(self, fixes: Collection[str] | None = None) -> None:
        """Apply the patches of ``fixes`` (None: of all); a fix with a patch that does not fit is recorded in
        ``refused`` instead.

        Applying again first undoes. Either everything that fits is applied or, on an error, nothing.
        """
        self.undo()
        self.refused, self.refused_in = {}, {}
        found = self.check()  # which imports all modules that the targets are in
        for patch, why in found.items():
            for fix in patch.fixes if why is not None else ():
                if patch.only:
                    self.refused_in |= {(script, fix): str(why) for script in patch.only}
                else:
                    self.refused.setdefault(fix, str(why))
        modules = self._modules()
        try:
            for patch, why in found.items():
                wanted = {
                    fix for fix in patch.fixes if fix not in self.refused and (fixes is None or fix in fixes)
                }
                if wanted and why is None:
                    self._replace(patch, modules)
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        """Put every original back, newest first. Raises FixError, naming the target, if somebody replaced
        ours meanwhile."""
        wrappers = {
            id(entry.replacement): entry for entry in self._applied if isinstance(entry.owner, ModuleType)
        }
        while self._applied:
            entry = self._applied[-1]
            if inspect.getattr_static(entry.owner, entry.name, None) is not entry.replacement:
                raise FixError(
                    f"cannot undo the patch of {entry.name}: {_name(entry.owner)}.{entry.name} was replaced "
                    "again by somebody else; undo theirs first"
                )
            if entry.inherited:
                delattr(entry.owner, entry.name)
            else:
                setattr(entry.owner, entry.name, entry.original)
            self._applied.pop()
        for module in self._modules() if wrappers else ():  # that imported one from where it was replaced
            for name, value in list(vars(module).items()):
                while id(value) in wrappers:
                    value = wrappers[id(value)].original
                    setattr(module, name, value)

    def _mismatch(self, patch: Patch) -> str | None:
        try:
            owner, name = self._resolve(patch)
            found = _parameters(getattr(owner, name))
        # RuntimeError: diffusers' failed lazy import
        except (ImportError, AttributeError, TypeError, RuntimeError) as error:
            return patch.absent(error)
        return patch.mismatch(found)

    def _resolve(self, patch: Patch) -> tuple[Any, str]:
        """Owner (module or class) and name of the target, where it is defined."""
        *owners, name = patch.path.split(".")
        outermost = (*owners, name)[0]
        module = self._home(patch, outermost)
        owner: Any = module
        for part in owners:
            owner = getattr(owner, part)
        getattr(owner, name)
        return owner, name

    def _home(self, patch: Patch, name: str) -> ModuleType:
        failure: Exception = AttributeError(f"no module has a {name}")
        known = list(patch.homes)
        if self.root is not None and not any(defines(self.root, home, name) for home in known):
            known += defining(self.root, name)
        for home in known:
            try:
                module = importlib.import_module(home)
                found = getattr(module, name)
            except (ImportError, AttributeError) as error:
                failure = error
                continue
            origin = sys.modules.get(getattr(found, "__module__", None) or "")
            defined = origin is not None and self._ours(origin) and getattr(origin, name, None) is found
            return origin if defined and origin is not None else module
        raise failure

    def _replace(self, patch: Patch, modules: Sequence[ModuleType]) -> None:
        """Where it is defined, and in every one of the trainer's ``modules`` that is bound to it under any
        name."""
        owner, name = self._resolve(patch)
        found = inspect.getattr_static(owner, name)
        original = found.__func__ if isinstance(found, classmethod) else getattr(owner, name)
        calls = self.calls

        @functools.wraps(original)
        def replacement(*args: Any, **kwargs: Any) -> Any:
            if calls is not None:
                calls(patch)
            return patch.replacement(original, *args, **kwargs)

        made = classmethod(replacement) if isinstance(found, classmethod) else replacement
        inherited = name not in vars(owner)
        places = [(owner, name)]
        if isinstance(owner, ModuleType):
            places += [
                (module, held)
                for module in modules
                for held, value in list(vars(module).items())
                if value is found and (module, held) != (owner, name)
            ]
        for holder, held in places:
            self._applied.append(_Applied(holder, held, None if inherited else found, inherited, made))
            setattr(holder, held, made)

    def _modules(self) -> list[ModuleType]:
        """The trainer's modules that are loaded."""
        return [
            module
            for module in list(sys.modules.values())
            if isinstance(module, ModuleType) and self._ours(module)
        ]

    def _ours(self, module: ModuleType) -> bool:
        file = vars(module).get("__file__")  # not getattr: lazy modules would start importing
        return self._root is not None and isinstance(file, str) and belongs(file, self._root)


def check_source(patch: Patch, root: Path) -> str | None:
    """Why a patch's target does not fit a checkout at ``root``, or None: as PatchSet.check, without importing
    anything. Of a library's own function the parameters are known only when it is imported."""
    if not any(has_package(root, home) for home in patch.homes):
        return None
    try:
        found = parameters(root, patch.homes, patch.path)
    except LookupError as error:
        return patch.absent(error.args[0])
    return None if found is None else patch.mismatch(found)


def _parameters(function: Any) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(function).parameters)
    except ValueError:  # a builtin that does not tell
        return ()


def _name(owner: Any) -> str:
    return str(getattr(owner, "__qualname__", getattr(owner, "__name__", owner)))
