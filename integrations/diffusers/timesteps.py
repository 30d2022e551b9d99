"""The scripts' timestep draw, torch.randint(0, T, (B,)): stratified, terminal-weighted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .run import SESSION


def randint(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The run's own sampler for the script's call of that shape; every other call is torch's."""
    run = SESSION.run
    if (
        run is None
        or run.timesteps is None
        or len(args) != 3
        or args[:2] != (0, len(run.schedule))
        or len(args[2]) != 1
    ):
        return original(*args, **kwargs)
    if not SESSION.called_by_script():
        return original(*args, **kwargs)
    SESSION.reached("timesteps")
    return run.timesteps.draw(args[2][0], kwargs.get("device", "cpu"))
