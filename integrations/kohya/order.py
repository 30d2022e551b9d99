"""The order of kohya's data with --exact_resume, and the data set as its workers see it.

Upstream's order hangs on what was drawn before: its loader shuffles with torch's generator, a worker's copy
of the data set hears of a new epoch after that epoch's first batch, and crops and captions are drawn from
wherever the worker's generators stand. Here the order is a function of (seed, epoch), and every item is drawn
with generators that are seeded by (seed, epoch, place in the order).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

_ORDER = 5  # a counter of Philox that no other use has
DATA, TRAINING = "data", "training"  # what generators are seeded for


class Item(NamedTuple):
    """One of kohya's batches: ``number`` of the data set, which stands at ``place`` of the epoch's order;
    ``step`` is the optimizer step that it is for."""

    seed: int
    epoch: int
    place: int
    number: int
    step: int


def seed_everything(item: Item, purpose: str) -> None:
    """Python's, numpy's and torch's generators, on all devices."""
    words = f"{item.seed} {item.epoch} {item.place} {purpose}"
    value = int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "little")
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)


class Order(Sampler[Item]):
    """The rest of an epoch from :meth:`go` on, for all ranks in turn; with more ranks than divide it, the
    epoch's first items fill the last round, as accelerate fills it."""

    def __init__(self, count: int, seed: int, world_size: int, accumulation: int) -> None:
        self.count, self.seed, self.world_size, self.accumulation = count, seed, world_size, accumulation
        self.epoch = self.start = self.step = 0

    def go(self, epoch: int, start: int, step: int) -> None:
        """The next iteration is epoch ``epoch`` from place ``start`` on, where ``step`` optimizer steps are
        done."""
        self.epoch, self.start, self.step = epoch, start, step

    def __len__(self) -> int:
        """Items of a whole epoch."""
        return -(-self.count // self.world_size) * self.world_size

    def items(self) -> Iterator[Item]:
        """The same as plain iteration."""
        bits = np.random.Philox(
            key=np.array([self.seed, self.epoch], np.uint64), counter=[0, 0, 0, _ORDER]
        ).random_raw(self.count)
        order = np.argsort(bits, kind="stable")
        left = -(-(self.count - self.start) // self.world_size) * self.world_size
        for k in range(left):
            place, step = self.start + k, self.step + k // self.world_size // self.accumulation
            yield Item(self.seed, self.epoch, place, int(order[place % self.count]), step)

    __iter__ = items


class Ordered(Dataset[Any]):
    """Kohya's data set group, asked by :class:`Item`."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def __len__(self) -> int:
        return len(self.group)

    def __getitem__(self, item: Item) -> Any:
        self.group.set_current_epoch(item.epoch + 1)  # upstream counts them from 1
        self.group.set_current_step(item.step)
        seed_everything(item, DATA)
        return self.group[item.number]

    def set_current_epoch(self, epoch: int) -> None:
        """Upstream's collator says it after a batch, too late: an item says it itself."""

    def set_current_step(self, step: int) -> None:
        """The same."""
