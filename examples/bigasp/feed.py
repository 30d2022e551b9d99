"""What a process trains on, optimizer step by optimizer step; the same steps on any number of processes.

The bucket sampler plans batches of ``planned`` pictures for all processes together, epoch after epoch, and an
optimizer step takes as many of them as make up the global batch, also across an epoch's end. A planned batch
is cut into the processes' batches, which are dealt out in turn. Noise is drawn for each picture by (seed,
epoch, picture), timesteps for each planned batch by (seed, its number), so neither depends on which process
trains a picture, nor on how many pictures it takes at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from loader import Pictures
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from sdxl_fixes import Objective
from sdxl_fixes.buckets import ChunkBucketBatchSampler
from sdxl_fixes.objective import Step

_NOISE, _TIMESTEPS, _HELD_OUT = range(3)  # what random numbers are for


def generator(seed: int, purpose: int, *numbers: int) -> torch.Generator:
    """On the CPU, of the numbers alone."""
    words = np.random.SeedSequence([seed, purpose, *numbers]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0]) >> 1)


@dataclass(frozen=True)
class Shares:
    """How an optimizer step's pictures are shared out. Raises SystemExit where they cannot be.

    together  pictures of an optimizer step
    planned   of a batch of the plan
    alone     of a process's batch
    world     processes
    """

    together: int
    planned: int
    alone: int
    world: int

    def __post_init__(self) -> None:
        if self.planned % self.alone:
            raise SystemExit(
                f"--batch_size {self.alone} does not divide --planned_batch {self.planned}: give one that "
                "does"
            )
        if self.together % self.planned or self.together % (self.alone * self.world):
            raise SystemExit(
                f"--global_batch {self.together} is no multiple of --planned_batch {self.planned} and of "
                f"--batch_size {self.alone} on {self.world} process(es), {self.alone * self.world}: change "
                "one of them"
            )

    @property
    def accumulation(self) -> int:
        """Batches of a process in an optimizer step."""
        return self.together // (self.alone * self.world)


class Asked(NamedTuple):
    """A picture to be trained on: its place in the store, the epoch that its prompt is of, the chunks of the
    longest prompt in the planned batch, its row in the schedule's tables, and what its loss counts: one over
    the pictures of the step, or 0 where it only fills a batch that would be empty."""

    place: int
    epoch: int
    chunks: int
    row: int
    weight: float


class Drawn(Dataset[dict[str, Any]]):
    """Pictures with their noise: the loader's processes draw the training step."""

    def __init__(self, pictures: Pictures, objective: Objective, seed: int) -> None:
        self.pictures, self.objective, self.seed = pictures, objective, seed

    def __getitem__(self, asked: Asked) -> dict[str, Any]:
        sample = self.pictures[asked.place, asked.epoch]
        noise = generator(self.seed, _NOISE, asked.epoch, asked.place)
        latents, row = sample.pop("latents")[None].float(), torch.tensor([asked.row])
        step = self.objective.draw(latents, generator=noise, index=row)
        sample["chunks"] = [ids + [[]] * (asked.chunks - len(ids)) for ids in sample["chunks"]]
        drawn = {field.name: getattr(step, field.name) for field in fields(step)}
        sample |= {name: value[0] for name, value in drawn.items() if value is not None}
        return {**sample, "weight": torch.tensor(asked.weight)}


def drawn_step(batch: Mapping[str, torch.Tensor]) -> Step:
    """The training step in a batch."""
    return Step(**{field.name: batch.get(field.name) for field in fields(Step)})


class Feed:
    """This process's batches for a DataLoader, without end. ``states`` has where everything stands after each
    step that was planned, which with a loader that prefetches is more than were trained."""

    def __init__(
        self,
        pictures: Pictures,
        places: NDArray[np.int64],
        objective: Objective,
        shares: Shares,
        rank: int,
        seed: int,
    ) -> None:
        self.pictures, self.places = pictures, places
        self.sampler = ChunkBucketBatchSampler(
            pictures.buckets[places],
            self._chunks,
            batch_size=shares.planned,
            seed=seed,
        )
        self.timesteps, self.shares, self.rank, self.seed = objective.timesteps, shares, rank, seed
        self._counted: tuple[int, NDArray[np.int32]] | None = None  # an epoch's chunks
        self.step = self.number = 0  # optimizer steps and batches that were planned
        self.states: dict[int, dict[str, Any]] = {}

    def load(self, step: int, state: Mapping[str, Any]) -> None:
        """Go on after optimizer step ``step``. Raises ValueError for a state of other data."""
        self.sampler.load_state_dict(state["sampler"])
        self.timesteps.load_state_dict(state["timesteps"])
        self.step, self.number = step, state["number"]

    def _chunks(self, epoch: int) -> NDArray[np.int32]:
        if self._counted is None or self._counted[0] != epoch:
            self._counted = epoch, self.pictures.chunks(epoch)[self.places]
        return self._counted[1]

    def _planned(self) -> Iterator[tuple[int, list[int]]]:
        """Planned batches of all epochs, each with its epoch."""
        while True:
            for batch in self.sampler:
                yield self.sampler.epoch, batch

    def __iter__(self) -> Iterator[list[Asked]]:
        planned, shares = self._planned(), self.shares
        while True:
            batches = [next(planned) for _ in range(shares.together // shares.planned)]
            count = sum(len(batch) for _, batch in batches)
            asked = [self._asked(epoch, batch, 1 / count) for epoch, batch in batches]
            self.step += 1
            self.states[self.step] = {
                "sampler": self.sampler.state_dict(),
                "timesteps": self.timesteps.state_dict(),
                "number": self.number,
                "count": count,
            }
            # every part has at least one picture: all processes take part in every backward pass
            parts = [
                batch[k : k + shares.alone] or [batch[0]._replace(weight=0.0)]
                for batch in asked
                for k in range(0, shares.planned, shares.alone)
            ]
            yield from parts[self.rank :: shares.world]

    def _asked(self, epoch: int, batch: list[int], weight: float) -> list[Asked]:
        places = self.places[batch].tolist()
        size = tuple(self.pictures.sizes[places[0]].tolist())
        draws = generator(self.seed, _TIMESTEPS, self.number)
        self.number += 1
        # as many as a whole batch has: stratified ones fall into as many slices as the global batch is large
        rows = self.timesteps.draw(self.shares.planned, generator=draws, size=size).tolist()
        chunks = int(self._chunks(epoch)[batch].max())
        return [Asked(place, epoch, chunks, row, weight) for place, row in zip(places, rows, strict=False)]


def loader(feed: Feed, objective: Objective, workers: int) -> DataLoader[dict[str, Any]]:
    return DataLoader(
        Drawn(feed.pictures, objective, feed.seed),
        batch_sampler=feed,  # type: ignore[arg-type]
        collate_fn=feed.pictures.collate,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
    )


def shuffled(count: int, seed: int) -> NDArray[np.int64]:
    """The places 0..count - 1 of a store in random order, by the seed: the first of them are held out."""
    return torch.randperm(count, generator=generator(seed, _HELD_OUT)).numpy()
