"""The example scripts that were tried, and with which releases of diffusers. Data; which fix fits a script is
told by its source."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import diffusers

# file name -> releases of diffusers that tests/diffusers/real ran it with
TESTED: Mapping[str, tuple[str, ...]] = {
    "train_text_to_image_sdxl.py": ("0.42.1",),
    "train_text_to_image_lora_sdxl.py": ("0.42.1",),
    "train_dreambooth_lora_sdxl.py": ("0.42.1",),
    "train_dreambooth_lora_sdxl_advanced.py": ("0.42.1",),
    "train_controlnet_sdxl.py": ("0.42.1",),
    "train_instruct_pix2pix_sdxl.py": ("0.42.1",),
    "textual_inversion_sdxl.py": ("0.42.1",),
    "train_t2i_adapter_sdxl.py": ("0.42.1",),
    "train_sdxl_lpl.py": ("0.42.1",),
}


def version(script: str | Path) -> str:
    """What is known of a script with the installed diffusers."""
    releases = TESTED.get(Path(script).name)
    if releases is None:
        return "not tested"
    here = "" if diffusers.__version__ in releases else f", here is {diffusers.__version__}"
    return f"tested with diffusers {' and '.join(releases)}{here}"
