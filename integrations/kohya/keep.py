"""Where kohya's trainers call the U-Net, and load a state into it, with ``--keep_base``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from .run import SESSION

if TYPE_CHECKING:
    from accelerate import Accelerator


def called(
    original: Callable[..., Any],
    self: torch.nn.Module,
    x: torch.Tensor,
    timesteps: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The U-Net's call; what follows the timesteps is its conditioning, which the base gets, too."""
    if SESSION.run is not None and SESSION.run.keep is not None:
        SESSION.run.keep.called(SESSION.step, original, self, x, *args, **kwargs)
    return original(self, x, timesteps, *args, **kwargs)


def load_state(original: Callable[..., Any], self: Accelerator, *args: Any, **kwargs: Any) -> Any:
    """A resumed training's weights; until then the U-Net is the base."""
    if SESSION.run is not None and SESSION.run.keep is not None:
        SESSION.run.keep.loading(self)
    return original(self, *args, **kwargs)
