"""A stable training loss: the validation loss of the first images that a training sees, every so many
optimizer steps.

An adapter tells what passes by: the clean latents when they are noised, then the call of the network on what
became of them. The first images are copied with the exact conditioning of that call, so no data set is read
and no random number drawn. Their noise is drawn by their content: the same images give the same number in any
order, batch size and number of processes.
"""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map

from sdxl_fixes.atomic import replacing
from sdxl_fixes.errors import FixError
from sdxl_fixes.log import say
from sdxl_fixes.trainers.fixed_loss import Called, check_whole, fixed_loss, line, seen
from sdxl_fixes.validation import Validation

if TYPE_CHECKING:
    from accelerate import Accelerator

# as many samples as this times the wanted images: who has not seen so many different ones by then has no more
_PATIENCE = 4


class StableLoss:
    """The loss of ``validation`` on the first images of a training.

    every            optimizer steps between two evaluations
    images           how many different images, over all processes; fewer where the data has fewer
    rank, processes  this process keeps and evaluates its share of them
    folder           where they are written to for a resumed run; None: nowhere
    resumed          whether to go on with those that are found there
    """

    def __init__(
        self,
        validation: Validation,
        every: int,
        images: int,
        rank: int = 0,
        processes: int = 1,
        folder: str | Path | None = None,
        resumed: bool = False,
    ) -> None:
        self.validation, self.every, self.images, self.main = validation, every, images, rank == 0
        self.wanted = images // processes + (rank < images % processes)
        self.kept: list[tuple[torch.Tensor, Any]] = []  # latents [C, H, W] and conditioning, on the CPU
        self.file = None if folder is None else Path(folder) / f"stable_loss_{rank + 1}_of_{processes}.pt"
        self.found = bool(resumed and self.file is not None and self._load(self.file))
        if resumed and not self.found and self.main:
            say("no images of an earlier stable loss here: it goes on with others, so its curve begins anew")
        self.complete = self.found or not self.wanted
        self._seen = 0
        self._noised: torch.Tensor | None = None
        self._called: Called | None = None
        self._last: int | None = None
        self._total = 0  # images of all processes, once all are complete

    def noised(self, latents: torch.Tensor) -> None:
        """``latents`` (clean, [B, C, H, W]) are being noised; the network is called next."""
        self._noised = latents

    def called(self, network: torch.nn.Module, noisy: torch.Tensor, *args: Any, **kwargs: Any) -> bool:
        """``network`` (unwrapped) is called with ``noisy``, timesteps (not given here) and the conditioning.
        Returns whether this was a training step's call. Raises FixError for a call whose conditioning cannot
        be kept."""
        # a graph cannot keep images: the run will say that this was not reached
        if torch.compiler.is_compiling():
            return False
        latents, self._noised = self._noised, None
        if latents is None or not torch.is_grad_enabled():
            return False
        if noisy.shape != latents.shape:
            raise FixError(
                f"--stable_loss_steps: noised are {list(latents.shape)} and the U-Net is given "
                f"{list(noisy.shape)}: "
                "this trainer gives it something else, too, so leave the flag out"
            )
        self._called = seen(self._called, network, noisy)
        for k in range(0 if self.complete else len(latents)):
            self._keep(
                _copy(latents[k]),
                tree_map(lambda value, k=k: _sample(value, k, len(latents)), (args, kwargs)),
            )
        return True

    def step(self, step: int, accelerator: Accelerator) -> dict[str, float] | None:
        """To be called by every process after optimizer step ``step``: every ``every`` steps, once every
        process has its images, prints and returns "stable_loss/loss" and the other numbers of Validation;
        else None. Training goes on as if nothing had happened."""
        if self._last is None:
            check_whole(accelerator, "--stable_loss_steps")
        if step == self._last or step % self.every:
            self._last = self._last or 0
            return None
        self._last = step
        if not self._total:
            state = torch.tensor([float(self.complete), len(self.kept)], device=accelerator.device)
            complete, total = (int(number) for number in accelerator.reduce(state, "sum").tolist())
            if complete < accelerator.num_processes:
                if self.main:
                    say(f"step {step}: {total} of {self.images} images for the stable loss seen so far")
                return None
            self._total = total
        assert self._called is not None
        samples = [(_number(latents), latents, conditioning) for latents, conditioning in self.kept]
        means = fixed_loss(self.validation, samples, self._total, self._called, accelerator)
        if self.main:
            say(line(f"step {step}: stable loss", means, self._total, self.validation))
        return {f"stable_loss/{name}": value for name, value in means.items()}

    def _keep(self, latents: torch.Tensor, conditioning: Any) -> None:
        self._seen += 1
        if not self.complete and not any(
            torch.equal(latents, other) for other, _ in self.kept if other.shape == latents.shape
        ):
            self.kept.append((latents, conditioning))
        if not self.complete and (len(self.kept) == self.wanted or self._seen == _PATIENCE * self.wanted):
            self.complete = True
            if self.file is not None:
                self._save(self.file)

    def _save(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as partial:
            torch.save({"wanted": self.wanted, "kept": self.kept}, partial)

    def _load(self, file: Path) -> bool:
        """Whether ``file`` has the images of a run that wanted as many."""
        if not file.is_file():
            return False
        try:
            found = torch.load(file, map_location="cpu", weights_only=True)
            wanted, kept = found["wanted"], found["kept"]
        except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError) as error:
            raise FixError(
                f"{file} is not what a run with --stable_loss_steps wrote ({type(error).__name__}): remove it"
            ) from error
        if wanted == self.wanted:
            self.kept = kept
        return bool(wanted == self.wanted)


def _sample(value: Any, k: int, batch: int) -> Any:
    """What belongs to image ``k`` of a tensor or a plain value that the U-Net is given."""
    if isinstance(value, bool | int | float | str | None):
        return value
    if not isinstance(value, torch.Tensor):
        raise FixError(
            f"--stable_loss_steps cannot keep a {type(value).__name__} that the U-Net is given: leave it out"
        )
    if value.ndim == 0 or len(value) != batch:
        raise FixError(
            f"--stable_loss_steps: the U-Net is given a tensor of shape {list(value.shape)} for a batch of "
            f"{batch}, which "
            "belongs to no image of it: leave the flag out"
        )
    return _copy(value[k])


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _number(latents: torch.Tensor) -> int:
    """An image's number, by its content."""
    return int.from_bytes(
        hashlib.blake2b(latents.view(torch.uint8).numpy().tobytes(), digest_size=8).digest(), "little"
    )
