"""A number per sample, shaped to meet the samples; a schedule's float64 numbers as float32 tensors on the
device that asks for them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch


def append_dims(values: torch.Tensor, ndim: int) -> torch.Tensor:
    """``values`` [B] as [B, 1, ...] with ``ndim`` dimensions."""
    return values.reshape(-1, *[1] * (ndim - 1))


class Table:
    """One number per timestep. Calling it looks timesteps up: copied to a device once, then without a host
    sync."""

    def __init__(self, values: npt.ArrayLike, dtype: npt.DTypeLike = np.float32) -> None:
        self._host = torch.from_numpy(np.array(values, dtype=dtype))
        self._on: dict[torch.device, torch.Tensor] = {}

    def __call__(self, index: torch.Tensor, ndim: int = 1) -> torch.Tensor:
        """Values at ``index`` (integers, shape [B]) as float32 (or ``dtype``) of shape [B, 1, ...] with
        ``ndim`` dimensions."""
        return append_dims(self.on(index.device)[index], ndim)

    def on(self, device: torch.device) -> torch.Tensor:
        """The whole table, float32 (or ``dtype``), shape [T]."""
        table = self._on.get(device)
        if table is None:
            table = self._on[device] = self._host.to(device)
        return table
