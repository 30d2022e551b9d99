"""A trainer's source, read without importing it: where its functions are, what shape they have, which of them
a script calls."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path


@functools.lru_cache(maxsize=16384)
def belongs(file: str, root: str) -> bool:
    """Whether a source file is of the trainer at ``root`` (which may hold an environment with foreign
    packages)."""
    path = Path(file).resolve()
    return path.is_relative_to(root) and "site-packages" not in path.parts


def sources(root: Path) -> Iterator[Path]:
    """The trainer's own modules: its scripts and its packages one level down."""
    for file in sorted([*root.glob("*.py"), *root.glob("*/*.py")]):
        if (
            file.parent == root
            or file.parent.name in ("library", "networks")
            or (file.parent / "__init__.py").is_file()
        ):
            yield file


@functools.lru_cache(maxsize=512)
def _parsed(file: Path, size: int, modified: int) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8-sig"))


def parsed(file: Path) -> ast.Module:
    """The syntax tree of a source file. Raises SyntaxError for one that this Python cannot read."""
    status = file.stat()
    return _parsed(file, status.st_size, status.st_mtime_ns)


def defining(root: Path, name: str) -> list[str]:
    """Modules of the trainer that define a function or class ``name`` at their top."""
    found = []
    for file in sources(root):
        text = file.read_text(encoding="utf-8-sig", errors="replace")
        if f"def {name}(" in text or f"class {name}" in text:
            if isinstance(_defined(parsed(file), name), ast.FunctionDef | ast.ClassDef):
                found.append(module_name(file, root))
    return found


def module_name(file: Path, root: Path) -> str:
    """How the module of ``file`` is imported."""
    return ".".join(file.relative_to(root).with_suffix("").parts)


def defines(root: Path, module: str, name: str) -> bool:
    """Whether a module of the trainer defines ``name`` at its top, or imports it."""
    file = root.joinpath(*module.split(".")).with_suffix(".py")
    return file.is_file() and _defined(parsed(file), name) is not None


def parameters(root: Path, homes: Sequence[str], path: str) -> list[str] | None:
    """Names of the parameters of the function ``path`` (function or Class.method), which is looked for in the
    modules ``homes``, then in all of the trainer; None for one that a module only imports from a library.
    Raises LookupError if it is nowhere."""
    outermost, *rest = path.split(".")
    known = [home for home in homes if root.joinpath(*home.split(".")).with_suffix(".py").is_file()]
    imported = False
    for home in [*known, *defining(root, outermost)]:
        file = root.joinpath(*home.split(".")).with_suffix(".py")
        found: ast.AST | None = _defined(parsed(file), outermost)
        if isinstance(found, ast.ImportFrom):
            imported = True  # where it is defined comes later in the list, or is a library's module
            continue
        for name in rest:
            found = _defined(found, name)
        if isinstance(found, ast.FunctionDef):
            return [a.arg for a in (*found.args.posonlyargs, *found.args.args, *found.args.kwonlyargs)]
    if imported:
        return None
    raise LookupError(f"looked in {', '.join(homes)} and all of {root.name}")


def has_package(root: Path, module: str) -> bool:
    """Whether ``module`` is of the trainer, by the name of its package."""
    return (root / module.split(".")[0]).exists() or (root / f"{module}.py").exists()


def _defined(tree: ast.AST | None, name: str) -> ast.AST | None:
    for node in getattr(tree, "body", ()):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return node
        if isinstance(node, ast.ImportFrom) and name in [alias.asname or alias.name for alias in node.names]:
            return node
    return None


def called(root: Path, script: str) -> frozenset[str]:
    """Names of all functions and classes that a script may come to call, itself or through what it imports of
    the trainer. By name: a name that is called stands for every function of that name there, so this may say
    too much, and never too little."""
    modules = _imported(root, root / script)
    index: dict[str, list[ast.AST]] = {}
    for file in modules:
        for node in ast.walk(parsed(file)):
            for name, meant in _named(node):
                index.setdefault(name, []).append(meant)
    found: set[str] = set()
    waiting: list[ast.AST] = [
        node for node in parsed(root / script).body if not isinstance(node, ast.FunctionDef | ast.ClassDef)
    ]
    while waiting:
        names = _mentioned(waiting.pop()) - found
        found |= names
        for name in names:
            for node in index.get(name, ()):
                # of a class its own code and what python calls by itself; its other methods when they are
                # named
                implicit = [
                    part
                    for part in getattr(node, "body", ())
                    if not isinstance(part, ast.FunctionDef) or _implicit(part.name)
                ]
                waiting += implicit if isinstance(node, ast.ClassDef) else [node]
                waiting += node.bases if isinstance(node, ast.ClassDef) else []
    return frozenset(found)


def _named(node: ast.AST) -> list[tuple[str, ast.AST]]:
    """Names that a statement gives to code: definitions, other names of imports, and names of what may be a
    function."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [(node.name, node)]
    if isinstance(node, ast.ImportFrom):
        return [(alias.asname, ast.Name(alias.name)) for alias in node.names if alias.asname]
    if isinstance(node, ast.Assign) and isinstance(
        node.value, ast.Name | ast.Attribute | ast.Dict | ast.List | ast.Tuple
    ):
        return [(target.id, node.value) for target in node.targets if isinstance(target, ast.Name)]
    return []


def _implicit(name: str) -> bool:
    return name == "forward" or (name.startswith("__") and name.endswith("__"))


def _mentioned(node: ast.AST) -> set[str]:
    nodes = list(ast.walk(node))
    return {n.id for n in nodes if isinstance(n, ast.Name)} | {
        n.attr for n in nodes if isinstance(n, ast.Attribute)
    }


def _imported(root: Path, script: Path) -> list[Path]:
    """The script and every module of the trainer that it imports, directly or not."""
    found, waiting = [script], [script]
    while waiting:
        file = waiting.pop()
        package = file.relative_to(root).parent.parts
        for node in ast.walk(parsed(file)):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                above = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
                module = ".".join(part for part in (above, node.module or "") if part)
                names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
            for name in names:
                path = root.joinpath(*name.split(".")).with_suffix(".py")
                if path.is_file() and path not in found:
                    found.append(path)
                    waiting.append(path)
    return found
