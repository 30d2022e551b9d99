"""An exponential moving average of the trained weights beside a training: diffusers' EMAModel over the
parameters of the trainer's optimizers, in float32.

After update n (the first is 1) the average is d s + (1 - d) p of the average s before and the weights p, with
d = min(decay, n/(9 + n)), and p itself after the first: the usual rise from no memory at all.
"""

from __future__ import annotations

import contextlib
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sdxl_fixes.atomic import replacing
from sdxl_fixes.errors import FixError
from sdxl_fixes.log import rank, say, warn
from sdxl_fixes.trainers.fixed_loss import dealt

if TYPE_CHECKING:
    from accelerate import Accelerator

FILE = "sdxl_fixes_ema.pt"  # in a state's folder


class Average:
    """The average with ``decay``, once the optimizers are known."""

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.parameters: list[torch.nn.Parameter] = []
        self._model: Any = None  # diffusers' EMAModel
        self._loaded: dict[str, Any] | None = None  # of a resumed state
        self._written: list[tuple[Path, Path]] = []  # model files of this run, and their averages

    def update(self, accelerator: Accelerator) -> None:
        """An optimizer step was made. Raises FixError where a process lacks a part of the weights."""
        if self._model is None:
            self._begin(accelerator)
        self._model.step(self.parameters)

    @property
    def begun(self) -> bool:
        """Whether there is an average yet."""
        return self._model is not None

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The trained models have the average's weights within. Those of the training wait in the CPU's
        memory, and come back to the last bit."""
        if self._model is None:
            yield
            return
        self._model.store(self.parameters)
        try:
            self._model.copy_to(self.parameters)
            yield
        finally:
            self._model.restore(self.parameters)

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The average of the trained parameter whose memory ``tensor`` is, in its shape and dtype. Raises
        FixError if it is none."""
        for parameter, average in zip(self.parameters, self._model.shadow_params, strict=True):
            if parameter.data_ptr() == tensor.data_ptr() and parameter.shape == tensor.shape:
                found: torch.Tensor = average.to(tensor.dtype, copy=True)
                return found
        raise FixError(
            f"--ema_decay: a tensor of shape {list(tensor.shape)} is saved that is no trained weight, so the "
            "average cannot be saved (the model itself is): leave the flag out"
        )

    def beside(self, file: str | Path) -> Path:
        """Where the average of the model in ``file`` goes (``NAME-ema``), remembered."""
        path = Path(file)
        made = path.with_name(f"{path.stem}-ema{path.suffix}")
        self._written.append((path, made))
        return made

    def tidy(self) -> None:
        """Remove the averages, files or folders, whose model the trainer has removed meanwhile."""
        for model, average in self._written:
            if not model.exists():
                _remove(average)
        self._written = [pair for pair in self._written if pair[0].exists()]

    def save(self, folder: str | Path) -> None:
        """Into a state's folder, by the main process."""
        if self._model is not None and rank() == 0:
            with replacing(Path(folder) / FILE) as file:
                torch.save(self._model.state_dict(), file)

    def load(self, folder: str | Path) -> None:
        """From a state's folder. Raises FixError for a file that is none of ours."""
        file = Path(folder) / FILE
        if not file.is_file():
            warn(f"--ema_decay: {folder} has no average, so it begins anew with the weights found there")
            return
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
            self._loaded = {**state, "shadow_params": list(state["shadow_params"])}
        except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError) as error:
            raise FixError(
                f"cannot resume from {file} ({type(error).__name__}): resume from another state, or without "
                "--ema_decay"
            ) from error

    def _begin(self, accelerator: Accelerator) -> None:
        from diffusers.training_utils import EMAModel

        check_average(accelerator)
        self.parameters = [
            parameter
            for optimizer in accelerator._optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        ]
        self._model = EMAModel([p.detach().float() for p in self.parameters], decay=self.decay)
        if self._loaded is not None:
            self._resume(self._loaded)
            self._loaded = None
        if rank() == 0:
            size = sum(4 * parameter.numel() for parameter in self.parameters)
            say(f"--ema_decay {self.decay:g}: an average of the weights, {size / 1e9:.2f} GB on every device")

    def _resume(self, state: dict[str, Any]) -> None:
        shapes = [p.shape for p in self.parameters]
        if [tensor.shape for tensor in state["shadow_params"]] != shapes:
            raise FixError(
                f"the average in the resumed state is of other weights ({len(state['shadow_params'])} "
                f"tensors, here are {len(shapes)} trained): resume with the flags that it was started with"
            )
        shadow = [
            tensor.to(p.device, torch.float32)
            for tensor, p in zip(state["shadow_params"], self.parameters, strict=True)
        ]
        self._model.load_state_dict({**state, "decay": self.decay, "shadow_params": shadow})


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_average(accelerator: Accelerator) -> None:
    """Raise FixError where a process lacks a part of the weights that are averaged."""
    kind = dealt(accelerator)
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "TP"):
        raise FixError(
            f"--ema_decay needs the whole weights in every process, and {kind} deals them out: leave it out"
        )
