"""Which fixes fit a checkout of sd-scripts: the patch table, held against its source."""

from __future__ import annotations

from pathlib import Path

from sdxl_fixes.trainers.patching import check_source

from .patches import NEEDED, PATCHES
from .run import FIXES


def examine(path: Path) -> tuple[str, bool]:
    """The table as text, and whether every fix fits. Raises ValueError where there is no sd-scripts."""
    root = path if path.is_dir() else path.parent
    if not path.exists() or not (root / "library" / "train_util.py").is_file():
        raise ValueError(f"{path} is no sd-scripts: expected the folder that holds sdxl_train.py and library/, or a script in it")
    lines = [f"kohya-ss/sd-scripts in {root}: {_version(root)}"]
    if why := check_source(NEEDED, root):
        return "\n".join([*lines, f"nothing can be patched: v0.10.0 or newer is needed ({why})"]), False
    problems = {patch: check_source(patch, root) for patch in PATCHES}
    for fix in ("run", *FIXES):
        mine = [patch for patch in PATCHES if patch.fix == fix]
        refused = any(problems[patch] for patch in mine)
        lines.append(f"{fix:<10} {'REFUSED' if refused else 'fits'}   {FIXES[fix].flags if fix in FIXES else 'the flags themselves'}")
        lines += [f"{'':<11}{'x' if problems[patch] else ' '} {problems[patch] or patch.target + ': ' + patch.purpose}" for patch in mine]
    return "\n".join(lines), not any(problems.values())


def _version(root: Path) -> str:
    """What the source looks like; a checkout has no version file that can be trusted, and may have no git."""
    text = (root / "library" / "train_util.py").read_text(encoding="utf-8")
    if check_source(NEEDED, root) is None:
        return "the 67372a fork or one like it" if "fixed_timesteps" in text else "v0.10.0 or newer"
    return "v0.8.7 to v0.9.1" if "def get_timesteps_and_huber_c(" in text else "older than v0.8.7"
