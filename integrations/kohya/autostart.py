"""Opt-in for people whose GUI writes the command line: every plain start of an SDXL trainer of sd-scripts becomes a patched one.

A .pth file in the environment's site-packages holds one line that Python runs at every start. Unless the program about to run is
sdxl_train.py or sdxl_train_network.py that line does nothing (it imports nothing and costs microseconds). Else it starts the launcher,
``python -m sdxl_fixes.kohya SCRIPT ...``, in the program's place: same arguments, environment and, except on Windows, process.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

from sdxl_fixes.files import replacing

NAME = "sdxl_fixes_kohya.pth"
LINE = (
    "import os, sys; a = sys.orig_argv; n = next((i for i, x in enumerate(a) if i and x[:1] != '-'), 0); "
    "n and os.path.basename(a[n]) in ('sdxl_train.py', 'sdxl_train_network.py') and not {'-m', '-c'} & set(a[1:n]) "
    "and __import__('importlib.util').util.find_spec('sdxl_fixes') and ("
    "print('sdxl-fixes: ' + a[n] + ' is started patched (sdxl-fixes kohya disable stops this)', file=sys.stderr, flush=True), "
    "b := [sys.executable, *a[1:n], '-m', 'sdxl_fixes.kohya', *a[n:]], "
    "os.execv(b[0], b) if os.name != 'nt' else os._exit(__import__('subprocess').call(b)))\n"
)


def enable() -> str:
    """Write the file; returns a sentence for the user. Raises OSError if the environment is read-only."""
    file = _file()
    with replacing(file) as partial:  # its name does not end with .pth, so no starting python reads half of it
        partial.write_text(LINE, encoding="utf-8")
    return (
        f"enabled: sdxl_train.py and sdxl_train_network.py start patched in this environment ({file}); sdxl-fixes kohya disable undoes it"
    )


def disable() -> str:
    """Remove the file; returns a sentence for the user."""
    existed = _file().exists()
    _file().unlink(missing_ok=True)
    return "disabled: trainers start unpatched" if existed else "it was not enabled"


def status() -> str:
    """Whether the file is there."""
    return f"enabled ({_file()})" if _file().exists() else "not enabled"


def _file() -> Path:
    return Path(sysconfig.get_path("purelib")) / NAME
