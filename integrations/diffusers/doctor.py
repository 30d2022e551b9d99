"""Which fixes fit an example script of diffusers: the patch table, held against its source and the installed
libraries."""

from __future__ import annotations

from pathlib import Path

from sdxl_fixes.trainers.patching import PatchSet

from .anchors import is_sdxl_script, missing, refused
from .install import ARGUMENTS
from .patches import for_script
from .run import FIXES
from .scripts import version


def is_script(path: Path) -> bool:
    """Whether ``path`` is a training script made after diffusers' SDXL examples."""
    return path.is_file() and path.suffix == ".py" and is_sdxl_script(path.read_text(encoding="utf-8"))


def examine(path: Path) -> tuple[str, bool]:
    """The table as text, and whether nothing is wrong with the installed libraries (a fix may have no place
    in a script); of a script that is refused, why."""
    source = path.read_text(encoding="utf-8")
    if why_not := refused(source):
        return f"huggingface/diffusers example {path}: refused, {why_not}", False
    problems = PatchSet((ARGUMENTS, *for_script(source, {"__name__": "__main__"}))).check()
    why = missing(source)
    lines = [f"huggingface/diffusers example {path}: {version(path)}"]
    for fix in ("run", *FIXES):
        mine = {patch: problem for patch, problem in problems.items() if fix in patch.fixes}
        state = "no place" if fix in why else "REFUSED" if any(mine.values()) else "fits"
        lines.append(
            f"{fix:<10} {state:<8} "
            f"{why.get(fix) or (FIXES[fix].text if fix in FIXES else 'the flags themselves')}"
        )
        if fix not in why:
            lines += [
                f"{'':<11}{'x' if problem else ' '} {problem or patch.target + ': ' + patch.purpose}"
                for patch, problem in mine.items()
            ]
    return "\n".join(lines), not any(
        problem and set(patch.fixes) - set(why) for patch, problem in problems.items()
    )
