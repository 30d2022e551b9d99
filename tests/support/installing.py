"""What tests of installations share."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import torch

LIBRARIES = str(Path(torch.__file__).parents[1])  # torch and the rest, for a fresh environment to borrow


def call(*command, **kwargs):
    """The words that ``command`` prints; it must succeed."""
    process = subprocess.run([str(x) for x in command], capture_output=True, text=True, **kwargs)
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-2000:]
    return process.stdout.split()


def fresh_python(folder):
    """A fresh environment's python."""
    venv.create(folder)
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def pip(python, *words):
    """This environment's pip at work in another, which then needs none."""
    return call(sys.executable, "-m", "pip", "--python", python, *words)


PROBE = f"""
import sys
sys.path.append({LIBRARIES!r})  # appended, so that no .pth file there is run
import sdxl_fixes, sdxl_fixes.kohya, sdxl_fixes.diffusers, sdxl_fixes.kohya.patches, importlib.metadata as m
files = [module.__file__ for module in (sdxl_fixes, sdxl_fixes.kohya, sdxl_fixes.diffusers)]
print(*files, m.version("sdxl-fixes"), sep="\\n")
"""


def packages(python, cwd):
    """The folders of sdxl_fixes, its kohya and its diffusers that a start in ``cwd`` imports."""
    *files, version = call(python, "-c", PROBE, cwd=cwd, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})
    assert version == "0.1.0"
    return [Path(file).parent for file in files]
