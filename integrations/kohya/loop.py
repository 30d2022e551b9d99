"""Kohya's long functions, compiled once more with a few of their expressions asking an object of ours.

Step, epoch, losses and latents are local variables there, which nothing outside can reach. Every expression
that an edit needs must be there exactly once, or the run stops. Nothing is copied, and a run that asks for no
edit runs upstream's own function.
"""

from __future__ import annotations

import ast
import copy
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sdxl_fixes.errors import FixError
from sdxl_fixes.trainers.source import parsed

from .run import SESSION

LOOPS: Mapping[str, str] = {"sdxl_train.py": "sdxl_train.py", "sdxl_train_network.py": "train_network.py"}


class Asked(Protocol):
    """What an edited function asks; ``edited`` says that it does."""

    edited: bool

    def reset(self) -> None:
        """No training."""


@dataclass(frozen=True)
class Edit:
    """A change of a function.

    flag     the flag that it is for, with its dashes
    held     the object that the function asks, under the name ``name`` among its globals
    change   makes it, and returns how often each of what it needs was there
    without  what leaving the flag out comes to, as the end of a sentence
    wrong    what the loop would do if it did not ask, as the end of a sentence
    """

    flag: str
    held: Asked
    name: str
    change: Callable[[ast.FunctionDef], dict[str, int]]
    without: str = ""
    wrong: str = ""


def changed(function: Callable[..., Any], edits: Sequence[Edit]) -> Callable[..., Any]:
    """``function`` with the edits made. Raises FixError if it is not as they know it."""
    code = getattr(function, "__code__", None)
    file, line, name = (
        ("", 0, "train") if code is None else (code.co_filename, code.co_firstlineno, code.co_name)
    )
    node, edit, wrong = _definition(Path(file), name, line, edits)
    if node is None:
        raise FixError(
            f"{edit.flag} does not fit this {Path(file).name} ({wrong}): leave the flag out{edit.without}"
        )
    module = ast.fix_missing_locations(ast.Module([node], []))
    scope: dict[str, Any] = {}
    for edit in edits:
        function.__globals__[edit.name] = edit.held
    exec(compile(module, file, "exec"), function.__globals__, scope)
    for edit in edits:
        edit.held.edited = True
    made: Callable[..., Any] = scope[node.name]
    return made


def misfit(file: Path, edit: Edit, name: str = "train") -> str | None:
    """Why the function ``name`` in ``file`` is none that the edit knows, or None."""
    return _definition(file, name, 0, [edit])[2]


def _definition(
    file: Path, name: str, line: int, edits: Sequence[Edit]
) -> tuple[ast.FunctionDef | None, Edit, str | None]:
    """The edited definition of ``name`` in ``file`` (the one at ``line``, if given); or None, the edit that
    does not fit, and why."""
    try:
        tree = parsed(file)
    except (OSError, SyntaxError) as error:
        return None, edits[0], f"{name}: expected its source in {file.name}, found {error}"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == name and line in (0, node.lineno):
            node = copy.deepcopy(node)
            for edit in edits:
                wrong = [f"`{what}` once, found {n} times" for what, n in edit.change(node).items() if n != 1]
                if wrong:
                    return None, edit, f"{name}: expected {', '.join(wrong)}"
            return node, edits[0], None
    return None, edits[0], f"{name}: expected its definition in {file.name}, found none"


def swap(edits: Sequence[Edit]) -> None:
    """Have the loop of sdxl_train.py edited, whose ``train`` is the running script's: its arguments are
    known, and it is not called yet."""
    if not edits or SESSION.script_name() != "sdxl_train.py":
        return
    for edit in edits:
        edit.held.reset()
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        function = frame.f_globals.get("train")
        if Path(frame.f_code.co_filename).name == "sdxl_train.py" and isinstance(
            function, types.FunctionType
        ):
            frame.f_globals["train"] = changed(function, edits)
            return
        frame = frame.f_back


def check(edits: Sequence[Edit]) -> None:
    """Raise FixError if a loop runs that was not edited."""
    script = SESSION.script_name()
    for edit in edits:
        if script in LOOPS and not edit.held.edited:
            raise FixError(
                f"{edit.flag}: {script} does not start its training as we know it, so it would {edit.wrong}: "
                "leave the flag out"
            )


def expression(text: str) -> ast.expr:
    """The syntax of an expression."""
    return ast.parse(text, mode="eval").body


def call(name: str, method: str, *values: ast.expr, keywords: Sequence[ast.keyword] = ()) -> ast.Call:
    """The syntax of ``name.method(*values, **keywords)``."""
    function = ast.Attribute(ast.Name(name, ast.Load()), method, ast.Load())
    return ast.Call(function, list(values), list(keywords))
