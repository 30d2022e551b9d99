"""What tests of installations share."""

import os
import subprocess
import venv
from pathlib import Path

import torch

LIBRARIES = str(Path(torch.__file__).parents[1])  # torch and the rest, for a fresh environment to borrow


def call(*command, **kwargs):
    """The words that ``command`` prints; it must succeed."""
    process = subprocess.run([str(x) for x in command], capture_output=True, text=True, **kwargs)
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-2000:]
    return process.stdout.split()


def fresh_python(folder, with_pip=True):
    """A fresh environment's python."""
    venv.create(folder, with_pip=with_pip)
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
