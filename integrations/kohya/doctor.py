"""Which fixes fit a checkout of sd-scripts: the patch table, held against its source and against what each of
its scripts calls."""

from __future__ import annotations

from pathlib import Path

from sdxl_fixes.trainers.patching import check_source
from sdxl_fixes.trainers.source import called

from . import resume, waits
from .loop import LOOPS, misfit
from .patches import NEEDED, PATCHES
from .run import FIXES
from .scripts import REFUSED, SCRIPTS, version

_EDITED = (
    ("resume", resume.EDIT, "train"),
    ("speed", waits.EDIT, "train"),
    ("speed", waits.LATENTS, "process_batch"),
)


def examine(path: Path) -> tuple[str, bool]:
    """The table as text, and whether every fix that has a place fits. Raises ValueError where there is no
    sd-scripts."""
    root = path if path.is_dir() else path.parent
    if not path.exists() or not (root / "library" / "train_util.py").is_file():
        raise ValueError(
            f"{path} is no sd-scripts: expected the folder that holds sdxl_train.py and "
            "library/, or a script in it"
        )
    lines = [f"kohya-ss/sd-scripts in {root}: {version(root)}"]
    if why := check_source(NEEDED, root):
        return "\n".join([*lines, f"nothing can be patched: v0.10.0 or newer is needed ({why})"]), False
    if path.is_file() and path.name not in (*SCRIPTS, *REFUSED):
        return "\n".join(
            [
                *lines,
                f"{path.name}: not one of the scripts that the fixes are made for ({', '.join(SCRIPTS)})",
            ]
        ), False
    names = (
        [path.name] if path.is_file() else [name for name in (*SCRIPTS, *REFUSED) if (root / name).is_file()]
    )
    fits = []
    for name in names:
        if name in REFUSED:
            lines.append(f"{name}: refused, {REFUSED[name]}")
            fits.append(not path.is_file())
        else:
            table, whole = _script(root, name, path.is_file() or name == names[0])
            lines += table
            fits.append(whole)
    return "\n".join(lines), all(fits)


def problems(root: Path, script: str) -> dict[str, list[str]]:
    """fix -> why it does not work in a script, one sentence for each function that is not there, has another
    shape or is not called."""
    reached = called(root, script)
    found: dict[str, list[str]] = {}
    for patch in PATCHES:
        if patch.only and script not in patch.only:
            continue
        why = check_source(patch, root)
        if (
            why is None
            and not patch.target.startswith("accelerate")
            and patch.path.split(".")[0] not in reached
        ):
            why = f"{patch.path}: {script} does not call it"
        for fix in patch.fixes if why is not None else ():
            found.setdefault(fix, []).append(str(why))
    for fix, edit, name in _EDITED if script in LOOPS else ():
        if name == "process_batch" and LOOPS[script] == script:
            continue  # its batches are in the loop
        if why := misfit(root / LOOPS[script], edit, name):
            found.setdefault(fix, []).append(why)
    return found


def _script(root: Path, script: str, details: bool) -> tuple[list[str], bool]:
    wrong, lines = problems(root, script), [f"{script}:"]
    for fix in ("run", *FIXES):
        no_place = SCRIPTS[script].get(fix)
        state = "no place" if no_place else "REFUSED" if fix in wrong else "fits"
        flags = FIXES[fix].text if fix in FIXES else "the flags themselves"
        lines.append(f"  {fix:<10} {state:<8}  {no_place or flags}".rstrip())
        for patch in PATCHES if details and not no_place else ():
            if fix in patch.fixes and (not patch.only or script in patch.only):
                why = next((why for why in wrong.get(fix, ()) if why.startswith(f"{patch.path}:")), None)
                lines.append(f"  {'':<10} {'x' if why else ' '} {why or f'{patch.path}: {patch.purpose}'}")
        if not details:
            lines += [f"  {'':<10} x {why}" for why in wrong.get(fix, ()) if not no_place]
    return lines, not any(fix in wrong and fix not in SCRIPTS[script] for fix in ("run", *FIXES))
