"""sdxl_fixes.diffusers: the fixes inside diffusers' SDXL example scripts.

    accelerate launch -m sdxl_fixes.diffusers train_text_to_image_sdxl.py --loss_type huber --terminal_sigma
    300 ...

or, at the top of your own copy of a script, ``install()``.
"""

from __future__ import annotations

from .install import install, uninstall

__all__ = ["install", "uninstall"]
