"""sdxl_fixes.kohya: the fixes inside kohya-ss/sd-scripts, from its own command line.

    accelerate launch -m sdxl_fixes.kohya sdxl_train.py --terminal_sigma 300 --loss_type huber ...

or, from code, ``install()`` before the script is executed.
"""

from __future__ import annotations

from .install import install, uninstall

__all__ = ["install", "uninstall"]
