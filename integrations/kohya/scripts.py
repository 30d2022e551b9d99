"""The scripts of sd-scripts that train SDXL, what has a place in each, and the versions that were tested.
Data; nothing is decided here."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

_NO_DATASET = "it reads a control data set, whose batches are not made by prompts"
_BESIDES = "its U-Net is told the control image, which the stable loss does not keep"
_NO_AVERAGE = "it saves its models in ways that nobody has tried with an average"
_OTHER_LOOP = "its training loop is another, which cannot be told where to begin"
_NOT_FAST = "its training loop is another, in which nobody has counted what waits"
_CONTROL = {
    "resume": _OTHER_LOOP,
    "speed": _NOT_FAST,
    "buckets": _NO_DATASET,
    "validation": _BESIDES,
    "heldout": "its U-Net is told a control image, which a held-out picture has not",
    "ema": _NO_AVERAGE,
    "keep": "it trains no U-Net, but what is added to one",
}

# script -> fix -> why it has no place there
SCRIPTS: Mapping[str, Mapping[str, str]] = {
    "sdxl_train.py": {},
    "sdxl_train_network.py": {},
    "sdxl_train_textual_inversion.py": {
        "resume": _OTHER_LOOP,
        "speed": _NOT_FAST,
        "buckets": "it changes the captions after they were counted",
        "validation": "it trains the very text embeddings that the stable loss would keep",
        "heldout": "it trains the very text embeddings that the held-out loss would keep",
        "ema": _NO_AVERAGE,
        "keep": "it trains text embeddings, and no U-Net",
    },
    "sdxl_train_control_net.py": _CONTROL,
    "sdxl_train_control_net_lllite.py": {**_CONTROL, "previews": "it makes none"},
}
# scripts that look as if they were ours -> why they are not
REFUSED: Mapping[str, str] = {
    "sdxl_train_leco.py": "it noises no pictures and compares predictions with each other, so no fix of "
    "training has a place in it",
    "sdxl_train_control_net_lllite_old.py": "upstream's own script stops before it trains: take "
    "sdxl_train_control_net_lllite.py",
    "sdxl_train_control_lora.py": "it is a fork's own script, which nobody has tried with the fixes",
}

# digest of a checkout's sources -> what it is; tests/kohya/real/matrix.py runs each
TESTED: Mapping[str, str] = {
    "f9b24efd4f609db6": "v0.10.1",  # 48d368f
    "7b45eb8bc93068f5": "v0.10.6",  # d05b2b1
    "e0a698ae1027e16e": "v0.11.1",  # c162e90
}

_READ = (
    *SCRIPTS,
    *("train_network.py", "train_textual_inversion.py"),
    *(
        f"library/{name}.py"
        for name in ("train_util", "loss", "args", "dataset", "sampling", "model_io", "logging_util")
    ),
    *(
        f"library/{name}.py"
        for name in (
            "custom_train_functions",
            "config_util",
            "strategy_sdxl",
            "sdxl_model_util",
            "sdxl_train_util",
        )
    ),
    *(f"library/{name}.py" for name in ("sdxl_original_unet", "sdxl_lpw_stable_diffusion")),
)


def digest(root: Path) -> str:
    """What the sources that the fixes depend on are, however the checkout was had (git, a zip, either kind of
    line ending)."""
    found = hashlib.sha256()
    for name in _READ:
        file = root / name
        if file.is_file():
            found.update(name.encode() + b"\0" + file.read_bytes().replace(b"\r\n", b"\n"))
    return found.hexdigest()[:16]


def version(root: Path) -> str:
    """What is known of a checkout: its version if it was tested, else that it was not."""
    known = TESTED.get(digest(root))
    return (
        f"{known}, tested"
        if known
        else (f"a version that was not tested; tested are {', '.join(TESTED.values())}")
    )
