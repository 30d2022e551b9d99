"""The held-out loss: the validation loss of pictures that are never trained on, every so many optimizer
steps.

An adapter names the pictures when it knows them, and encodes them once, before the first step, with the
trainer's own VAE and text encoders. Their latents are the mean of the VAE's distribution; their noise belongs
to the file's name, so another picture in the folder changes nothing for the others. Every process keeps its
share of them, on the CPU.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils._pytree import tree_map_only

from sdxl_fixes.aspects import assign
from sdxl_fixes.errors import FixError, FlagError
from sdxl_fixes.log import say, warn
from sdxl_fixes.trainers.fixed_loss import Called, Sample, check_whole, fixed_loss, line, seen
from sdxl_fixes.training_sets.images import Sample as Captioned
from sdxl_fixes.validation import Validation

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Picture:
    """A picture that is held out, and the bucket (width, height) that it is brought to."""

    image: Path
    caption: str
    bucket: tuple[int, int]


@dataclass(frozen=True)
class Pixels:
    """What a network is given of a picture: its pixels, float32 in [-1, 1], [1, 3, H, W], and the sizes that
    SDXL is told, (height, width) of the file and of the bucket, (top, left) of the crop."""

    values: torch.Tensor
    original: tuple[int, int]
    crop: tuple[int, int]
    target: tuple[int, int]


class HeldOut:
    """The loss of ``validation`` on held-out pictures.

    every            optimizer steps between two evaluations
    rank, processes  this process keeps and evaluates its share of them
    """

    def __init__(self, validation: Validation, every: int, rank: int = 0, processes: int = 1) -> None:
        self.validation, self.every, self.rank, self.processes = validation, every, rank, processes
        self.pictures: list[Picture] = []  # of this process
        self.total = 0  # of all processes
        self.captions: dict[str, Any] = {}  # caption -> what its adapter made of it
        self.samples: list[Sample] | None = None
        self._called: Called | None = None
        self._last = 0

    def name(self, pictures: Sequence[Picture]) -> None:
        """``pictures`` are held out, in every process the same. Raises FixError if there are none."""
        if not pictures:
            raise FixError(
                "--heldout_steps: no picture is held out: give --heldout_dir a folder of pictures that are "
                "not trained on"
            )
        self.total, self.pictures = len(pictures), list(pictures)[self.rank :: self.processes]

    @torch.no_grad()
    def encode(
        self,
        latents_of: Callable[[torch.Tensor], torch.Tensor],
        conditioning_of: Callable[[Picture, Pixels], Any],
    ) -> None:
        """``latents_of`` makes latents [1, C, h, w], scaled as the network expects, of pixels; and
        ``conditioning_of`` the (args, kwargs) of the network's call that follow the timesteps, for a batch of
        one. Raises FixError for latents that are not finite."""
        self.samples = []
        with untouched_draws():
            for picture in self.pictures:
                pixels = read(picture)
                latents = latents_of(pixels.values).float()
                if not bool(torch.isfinite(latents).all()):
                    raise FixError(
                        f"--heldout_steps: the VAE's latents of {picture.image} are not finite: give it more "
                        "precision (--no_half_vae, or a VAE that is mended for half precision)"
                    )
                conditioning = tree_map_only(
                    torch.Tensor, lambda tensor: tensor[0].cpu().clone(), conditioning_of(picture, pixels)
                )
                self.samples.append((number(picture), latents[0].cpu(), conditioning))
        if self.rank == 0:
            say(f"{self.total} pictures are held out, their loss comes every {self.every} steps")

    def called(self, network: torch.nn.Module, noisy: torch.Tensor) -> bool:
        """``network`` (unwrapped) is called with ``noisy``. Returns whether this was a training step's call
        with the pictures ready."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return False
        self._called = seen(self._called, network, noisy)
        return self.samples is not None

    def step(self, step: int, accelerator: Accelerator) -> dict[str, float] | None:
        """To be called by every process after optimizer step ``step``: every ``every`` steps prints and
        returns "heldout/loss" and the other numbers of Validation; else None. Training goes on as if nothing
        had happened."""
        if step == self._last or step % self.every or self._called is None or self.samples is None:
            return None
        self._last = step
        check_whole(accelerator, "--heldout_steps")
        dtype = self._called.dtype
        samples = [
            (number, latents, tree_map_only(torch.Tensor, lambda tensor: tensor.to(dtype), conditioning))
            for number, latents, conditioning in self.samples
        ]
        means = fixed_loss(self.validation, samples, self.total, self._called, accelerator)
        if self.rank == 0:
            say(line(f"step {step}: held-out loss", means, self.total, self.validation))
        return {f"heldout/{name}": value for name, value in means.items()}


def in_folder(folder: str) -> list[Captioned]:
    """The pictures of ``folder`` with their captions. Raises FlagError, naming it, where it holds none."""
    from sdxl_fixes.training_sets.read import read as read_set

    try:
        sets = read_set(Path(folder))
    except (OSError, ValueError) as error:
        raise FlagError(f"--heldout_dir {folder}: {error}") from error
    for problem in (problem for each in sets for problem in each.problems):
        warn(f"--heldout_dir: {problem}")
    return [sample for each in sets for sample in each.samples]


def bucketed(samples: Sequence[Captioned], buckets: Sequence[tuple[int, int]]) -> list[Picture]:
    """The samples, each with the one of ``buckets`` (width, height) whose aspect is nearest."""
    if not samples:
        return []
    found = assign([sample.size for sample in samples], list(buckets))
    places = [tuple(found.resolutions[k].tolist()) for k in found.index]
    return [Picture(s.image, s.caption, place) for s, place in zip(samples, places, strict=True)]


def read(picture: Picture) -> Pixels:
    """The picture, scaled until it covers its bucket, and cut to it around the middle."""
    with Image.open(picture.image) as file:
        image = ImageOps.exif_transpose(file).convert("RGB")
    (width, height), (wide, high) = image.size, picture.bucket
    scale = max(wide / width, high / height)
    size = max(wide, round(width * scale)), max(high, round(height * scale))
    left, top = (size[0] - wide) // 2, (size[1] - high) // 2
    cut = image.resize(size, Image.Resampling.LANCZOS).crop((left, top, left + wide, top + high))
    values = torch.from_numpy(np.array(cut)).permute(2, 0, 1)[None].float() / 127.5 - 1
    return Pixels(values, (height, width), (top, left), (high, wide))


def number(picture: Picture) -> int:
    """What tells a picture's noise: its file's name."""
    return int.from_bytes(hashlib.blake2b(picture.image.name.encode(), digest_size=8).digest(), "little")


@contextlib.contextmanager
def untouched_draws() -> Iterator[None]:
    """Whatever draws random numbers within leaves those of Python, numpy and torch as they were."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
