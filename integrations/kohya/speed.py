"""--speed fused and compile: both are torch's own, put where kohya's trainers can use them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from sdxl_fixes.errors import FixError

from .run import SESSION
from .speed_flags import parts

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.optim import Optimizer

BACKEND: Any = "inductor"
# kinds of blocks (2 widths, with and without gradients) times shapes, until torch takes shapes as they come
_COMPILED_AT_MOST = 64
_compiled: dict[Callable[..., Any], Callable[..., Any]] = {}


def prepare_optimizer(
    original: Callable[..., Any], self: Accelerator, optimizer: Optimizer, *args: Any, **kwargs: Any
) -> Any:
    """Raises FixError for an optimizer that is not fused, though kohya was told to make it so."""
    if _on("fused"):
        if not all(group.get("fused") for group in optimizer.param_groups):
            raise FixError(
                f"--speed fused: {type(optimizer).__name__} was not made with fused=True: leave fused out"
            )
        reached("fused")
    return original(self, optimizer, *args, **kwargs)


def load_state(original: Callable[..., Any], self: Accelerator, *args: Any, **kwargs: Any) -> Any:
    """A state's optimizer steps as this run's flags say, not as those of the run that saved it."""
    result = original(self, *args, **kwargs)
    for optimizer in self._optimizers if _on("fused") else ():
        for group in optimizer.param_groups:
            group["fused"], group["foreach"] = True, None
            for parameter in group["params"]:
                state = optimizer.state.get(parameter, {})
                if "step" in state:  # which a fused kernel reads on the device
                    state["step"] = state["step"].to(parameter.device)
    return result


def block(original: Callable[..., Any], self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A transformer block, compiled: all blocks of one width share the code. What torch cannot compile as a
    whole stops the training there, since a part of it would be slow without a word."""
    if not _on("compile"):
        return original(self, *args, **kwargs)
    reached("compile")
    if original not in _compiled:
        _compiled[original] = _compile(original)
    known = torch._dynamo.exc.TorchDynamoException
    try:
        return _compiled[original](self, *args, **kwargs)
    # the second: of more kinds than that, in newer versions
    except (known, getattr(torch._dynamo.exc, "FailOnRecompileLimitHit", known)) as error:
        first = f"they are of more than {_COMPILED_AT_MOST} kinds"
        if isinstance(error, known):
            first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise FixError(
            f"--speed compile: torch cannot compile a transformer block here ({first}): leave compile out"
        ) from error


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    import torch._dynamo

    if torch.__version__ < "2.5":  # which makes the code for every block by itself
        raise FixError("--speed compile needs torch 2.5 or newer: update it, or leave compile out")
    torch._dynamo.config.cache_size_limit = _COMPILED_AT_MOST
    made: Callable[..., Any] = torch.compile(function, backend=BACKEND, fullgraph=True)
    return made


def reached(part: str) -> None:
    """A part does its work."""
    for mark in ("speed", part):
        SESSION.reached(mark)


def _on(part: str) -> bool:
    run = SESSION.on("speed")
    return run is not None and part in parts(run.args)
