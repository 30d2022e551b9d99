"""Keeps a plain start of sd-scripts' SDXL trainers from ignoring our flags: the launcher is started in its
place.

``python sdxl_train.py --config_file my.toml`` would train upstream's way under keys of ours, and say nothing:
upstream takes from a TOML file what it knows and ignores the rest. So ``sdxl_fixes_kohya.pth``, whose line
Python runs at every start, calls :func:`start` if the program has such a name, before it runs. Both files lie
in site-packages, wheel and editable installs bring them, and ``pip uninstall`` takes them. All of this is the
standard library's, since ``import sdxl_fixes`` takes seconds.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

PTH = "sdxl_fixes_kohya.pth"
SCRIPTS = (
    *("sdxl_train.py", "sdxl_train_network.py", "sdxl_train_textual_inversion.py", "sdxl_train_leco.py"),
    *("sdxl_train_control_net.py", "sdxl_train_control_net_lllite.py"),
)
FLAGS = (  # what sdxl_fixes.kohya adds to upstream's own; tests/test_autostart.py compares
    *("fixes", "match_base", "prediction_type", "flow_shift"),
    *("terminal_sigma", "terminal_sigma_method", "terminal_sigma_start"),
    *("huber_l2_gradient", "min_snr_floor", "stratified_timesteps", "terminal_timestep_share"),
    *("timestep_density", "timestep_density_weighted", "timestep_uniform_share", "resolution_shift"),
    *("logit_mean", "logit_std", "mode_scale", "laplace_mean", "laplace_scale", "beta_alpha", "beta_beta"),
    *(
        "flow_weighting",
        "keep_base",
        "stable_loss_steps",
        "speed",
        "stable_loss_images",
        *("heldout_steps", "heldout_dir", "heldout_split", "ema_decay", "ema_evaluated"),
        "chunk_buckets",
        "chunk_layout",
        "exact_resume",
    ),
)


def start() -> None:
    """Put the launcher in this process's place if its program is a trainer of sd-scripts which is given flags
    of ours.

    Such a run never returns from here: an environment that lost the launcher ends it with status 2. Any other
    program is left alone.
    """
    script, *words = sys.argv  # before the program runs, argv[0] of python -m and -c is just that
    try:
        if os.path.basename(script) not in SCRIPTS or not _is_kohyas(Path(script)):
            return
        config = _config(words)
        used = {"the command line": _flags(words), config: _keys(Path(config)) if config else set()}
    except OSError:  # the trainer cannot read it either, and says so
        return
    names = [name for name in FLAGS if any(name in found for found in used.values())]
    if not names:
        return
    places = [str(place) for place, found in used.items() if found.intersection(FLAGS)]
    sentence = (
        f"sdxl-fixes: {' and '.join(places)} {'use' if places[1:] else 'uses'} flags of ours "
        f"({', '.join(names)})"
    )
    if not _launcher_exists():
        print(
            f"{sentence}, but sdxl_fixes is not installed here: install it again, or leave them out",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)  # here SystemExit would be a fatal error of Python's with a traceback
    if os.environ.get("RANK", "0") == "0":  # as sdxl_fixes.log, which would import the package
        name = os.path.basename(script)
        print(
            f"{sentence}: {name} is started as python -m sdxl_fixes.kohya does", file=sys.stderr, flush=True
        )
    _become([sys.executable, *_options(), "-m", "sdxl_fixes.kohya", script, *words])


def installed() -> bool:
    """Whether plain starts are guarded in this environment: whether the .pth file lies where Python looks for
    such files."""
    import site

    folders = [*site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])]
    return any(os.path.isfile(os.path.join(folder, PTH)) for folder in folders)


def _is_kohyas(script: Path) -> bool:
    """Whether sd-scripts' library lies beside it: by the name of its oldest module or, should upstream move
    that, by what we patch."""
    # as Python itself, which puts the folder of what a link points to on its path
    library = script.resolve().parent / "library"
    modules = list(library.glob("*.py"))
    return library / "train_util.py" in modules or any(
        b"add_custom_train_arguments" in module.read_bytes() for module in modules
    )


def _flags(words: list[str]) -> set[str]:
    # the launcher takes hyphens, too
    return {word.partition("=")[0][2:].replace("-", "_") for word in words if word.startswith("--")}


def _config(words: list[str]) -> str | None:
    """The --config_file as upstream resolves it: the last one, with .toml added where that is missing."""
    file = ""
    for number, word in enumerate(words, start=1):
        name, equals, value = word.partition("=")
        # argparse takes beginnings of a name
        if name.startswith("--conf") and "--config_file".startswith(name):
            file = value if equals else "".join(words[number : number + 1])
    return (file if file.endswith(".toml") else f"{file}.toml") if file else None


def _keys(file: Path) -> set[str]:
    """The keys that are not false, with those of sections among them, as upstream merges them."""
    text = file.read_bytes().decode("utf-8-sig", "replace")
    try:
        import tomllib  # Python 3.11

        table = tomllib.loads(text)
    except (ImportError, ValueError):  # what is wrong with it, upstream's reader says
        return set(re.findall(r"""^[ \t]*["']?(\w+)["']?[ \t]*=(?![ \t]*false\b)""", text, re.MULTILINE))
    merged = {}
    for key, value in table.items():
        merged.update(value if isinstance(value, dict) else {key: value})
    return {key for key, value in merged.items() if value is not False}


def _launcher_exists() -> bool:
    """Whether the package is there, and not just the folder that an uninstall may leave (which Python takes
    for a namespace)."""
    from importlib.util import find_spec

    spec = find_spec("sdxl_fixes")
    return spec is not None and spec.origin is not None


def _options() -> list[str]:
    """The interpreter's own options, such as ``-u -X utf8``: what stands before the program."""
    count = len(sys.orig_argv) - len(sys.argv)
    options = sys.orig_argv[1:count] if sys.orig_argv[count:] == sys.argv else []
    return options[:-1] if options[-1:] == ["--"] else options  # -- ends them, and -m is one


def _become(command: list[str]) -> None:
    """Run ``command`` in this process's place; where that is not possible, on Windows, as its child, and end
    as it ends."""
    if os.name != "nt":
        os.execv(command[0], command)
    import signal
    import subprocess

    signal.signal(signal.SIGINT, lambda *_: None)  # the child has it too, and ends as it sees fit
    status = subprocess.Popen(command).wait()
    os._exit(status if 0 <= status < 256 else 1)  # a crash there has a status too large for _exit
