"""Rescaled classifier-free guidance (arXiv:2305.08891 section 3.4), also for pipelines that have no
``guidance_rescale``.

Guidance raises the contrast of the prediction; on a schedule with zero terminal SNR nothing brings it down
again, and images overexpose.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def rescale_guidance(guided: torch.Tensor, conditional: torch.Tensor, rescale: float = 0.7) -> torch.Tensor:
    """``guided`` with the standard deviation of ``conditional`` (both [B, C, H, W], any prediction type),
    mixed with itself by ``rescale``: 0 changes nothing, 0.7 is the paper's (equations 14 to 16). A constant
    ``guided`` has no deviation to rescale and stays as it is. Arithmetic is float32 or better."""
    if not 0 <= rescale <= 1:
        raise ValueError(f"rescale must lie in [0, 1], got {rescale}")
    precise = torch.promote_types(guided.dtype, torch.float32)
    wanted, spread = (one.to(precise).flatten(1).std(1) for one in (conditional, guided))
    factor = torch.where(spread > 0, rescale * wanted / spread + (1 - rescale), 1.0)
    return (guided.to(precise) * factor.reshape(-1, *[1] * (guided.ndim - 1))).to(guided.dtype)


@contextmanager
def rescaled_guidance(pipe: Any, rescale: float = 0.7) -> Iterator[Any]:
    """Within it, ``pipe`` (any diffusers pipeline with a ``unet`` and a ``scheduler``) generates with
    rescaled guidance; afterwards its scheduler steps as before, also after an error and within another.

    The U-Net's last output holds [unconditional, conditional], as in diffusers' SDXL pipelines; without
    guidance nothing changes.
    """
    last: list[torch.Tensor] = []

    def remember(module: Any, given: Any, output: Any) -> None:
        last[:] = [output[0]]

    scheduler, step = pipe.scheduler, pipe.scheduler.step
    own = vars(scheduler).get("step")  # what somebody set; None where it is the class's

    @functools.wraps(step)
    def rescaled(model_output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if last and last[0].shape[0] == 2 * model_output.shape[0]:
            model_output = rescale_guidance(model_output, last[0].chunk(2)[1], rescale)
        elif last and last[0].shape[0] != model_output.shape[0]:
            raise ValueError(
                f"the U-Net returned {last[0].shape[0]} predictions for {model_output.shape[0]} samples: "
                "guidance can be rescaled for "
                "pipelines that ask for two, unconditional and conditional"
            )
        return step(model_output, *args, **kwargs)

    hook = pipe.unet.register_forward_hook(remember)
    scheduler.step = rescaled
    try:
        yield pipe
    finally:
        hook.remove()
        del scheduler.step
        if own is not None:
            scheduler.step = own
