"""The made-up sd-scripts of tests/data, laid out as a version or a mutilation has it, run in this process."""

import re
import runpy
import shutil
import sys
from pathlib import Path

import torch

SOURCE = Path(__file__).parents[1] / "data" / "made_up_sd_scripts"
MOVED = (
    "args",
    "checkpoint_io",
    "dataset",
    "logging_util",
    "loss",
    "model_io",
    "sampling",
)  # what v0.11 took out of train_util


def build(folder: Path, layout: str = "0.11") -> Path:
    """A copy of the trainer in ``folder``: v0.11's modules, or v0.10's one train_util."""
    root = folder / "sd-scripts"
    shutil.copytree(SOURCE, root, ignore=shutil.ignore_patterns("__pycache__"))
    if layout == "0.10":
        (root / "library" / "train_util.py").write_text(
            "\n\n".join((root / "library" / f"{name}.py").read_text() for name in MOVED)
        )
        for name in MOVED:
            (root / "library" / f"{name}.py").unlink()
        for file in root.rglob("*.py"):
            file.write_text(
                re.sub(rf"library\.({'|'.join(MOVED)}) as", "library.train_util as", file.read_text())
            )
    return root


def edit(root: Path, file: str, *changes: tuple[str, str]) -> None:
    """Replace text in a file of the trainer; every text must be there."""
    text = (root / file).read_text()
    for before, after in changes:
        assert before in text, f"{file} has no {before!r}"
        text = text.replace(before, after)
    (root / file).write_text(text)


def forget() -> None:
    """The trainer's modules, so that another copy can be imported."""
    for name in [
        name
        for name in sys.modules
        if name.split(".")[0] in ("library", "train_network", "training", "sdxl_train")
    ]:
        del sys.modules[name]


def steps(root: Path) -> list[dict[str, torch.Tensor]]:
    """What the last run recorded of its steps."""
    return torch.load(root / "out" / "steps.pt")


def run(root: Path, script: str, *flags: str, how: str = "module") -> None:
    """Run a script of the trainer in this process: ``how`` is module (what the launcher does), install or
    unpatched."""
    import sdxl_fixes.kohya
    from sdxl_fixes.kohya.__main__ import main

    (root / "out").mkdir(exist_ok=True)
    arguments, before = (
        [str(root / script), "--output_dir", str(root / "out"), *flags],
        (list(sys.argv), list(sys.path)),
    )
    sys.path.insert(0, str(root))
    if any(
        str(root) not in str(getattr(sys.modules.get(name), "__file__", root))
        for name in ("library", "train_network", "training")
    ):
        forget()
    try:
        sys.argv = ["sdxl_fixes.kohya", *arguments] if how == "module" else arguments
        if how == "module":
            main()
        else:
            if how == "install":
                sdxl_fixes.kohya.install()
            runpy.run_path(arguments[0], run_name="__main__")
    finally:
        sdxl_fixes.kohya.uninstall()
        sys.argv, sys.path[:] = before
