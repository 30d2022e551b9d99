"""Batches whose samples share the aspect bucket and the number of prompt chunks, so that no token is padding
that a batch mate caused.

The epoch is planned by one sort: a 64-bit key per sample holds (bucket, chunks) above random bits above the
sample's index. What lies side by side after the sort is shuffled within its bucket; cut into batches, and the
batches shuffled, it is the epoch. Only raw bits of Philox are used (numpy keeps those stable between
versions, unlike ``permutation``), so a plan is a function of (seed, epoch) alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Sampler

from sdxl_fixes.names import LEFTOVERS

FORMAT = "sdxl-fixes buckets 1"
_KEYS, _ORDER, _REPEATS = range(3)  # what random bits are for

Ints = NDArray[np.int64]
Bits = NDArray[np.uint64]


@dataclass(frozen=True)
class Settings:
    """What, beside (seed, epoch), a plan depends on."""

    batch_size: int
    world_size: int
    leftovers: str
    aligned: bool

    def same_order(self, other: Settings) -> bool:
        """Whether the other's batches are the same ones in the same order, dealt to other ranks."""
        return not self.aligned and (self.batch_size, self.leftovers, self.aligned) == (
            other.batch_size,
            other.leftovers,
            other.aligned,
        )


@dataclass(frozen=True)
class Account:
    """One epoch over all ranks. All but ``batches`` and ``smaller`` are samples; ``chunks`` and ``floor`` are
    chunks.

    samples   to be seen: the data set, each sample as often as ``repeats`` says
    lost      of these, never seen (leftovers="drop")
    repeated  seen once more, so that all ranks have the same number of batches
    merged    in a batch with a longer prompt (leftovers="merge")
    batches   of all ranks
    smaller   of these, below the batch size
    chunks    mean over samples of the longest prompt in their batch: what the text costs
    floor     mean over samples of their own prompt: no batching costs less
    """

    epoch: int
    samples: int
    lost: int
    repeated: int
    merged: int
    batches: int
    smaller: int
    chunks: float
    floor: float


class _Plan(NamedTuple):
    """Batch k is ``order[starts[k] : starts[k] + sizes[k]]``; ``extra[k]`` marks one that only repeats
    samples of another."""

    order: Ints
    starts: Ints
    sizes: Ints
    extra: NDArray[np.bool_]

    def part(self, batches: slice) -> _Plan:
        """Some of the batches."""
        return _Plan(self.order, self.starts[batches], self.sizes[batches], self.extra[batches])

    def samples(self, first: int = 0, last: int | None = None, extra: bool = False) -> Ints:
        """The samples of batches first to last, those of extra batches only if asked for."""
        starts, sizes = self.starts[first:last], self.sizes[first:last]
        if not extra:
            starts, sizes = starts[~self.extra[first:last]], sizes[~self.extra[first:last]]
        before = np.cumsum(sizes) - sizes
        places: Ints = np.repeat(starts - before, sizes) + np.arange(sizes.sum())
        return np.asarray(self.order[places])


class ChunkBucketBatchSampler(Sampler[list[int]]):
    """Batches of indices in which all samples have the same bucket and number of chunks, every sample once
    per epoch.

    buckets     aspect bucket of every sample, integers, shape [N] chunks      number of 75-token chunks of
    every sample's prompt, integers from 1, shape [N]; or, where prompts are drawn anew (tag
                shuffling, dropout, score tags), a function of the epoch that returns this array for the
                prompts of that epoch
    batch_size  samples per batch and rank seed        with the epoch it determines everything rank
    this process; None yields the batches of all ranks in turn, for accelerate's prepare() to deal out
    world_size  number of processes; all get the same number of batches repeats     how often a sample is seen
    per epoch: a number or one per sample. 0.5 is every other epoch, 2.5 twice and thrice in turn leftovers
    samples that fill no batch: "merge" moves them upward into the next larger chunk count of their bucket
    (the batch takes
                the longest prompt's; one smaller batch per bucket remains), "smaller" makes them a smaller
                batch, "drop" drops them
    aligned     all ranks have the same bucket at the same step, so that none waits for a longer one

    Batches come in random order, so a bucket is met in proportion to what is left in it. Numbers of batches
    that do not divide by the ranks are evened by halving some of the last batches, not by losing or
    repeating; :meth:`account` counts what an epoch loses or repeats all the same (leftovers="drop", fewer
    samples than ranks).

    A loop needs no :meth:`set_epoch`: iterating again after the end is the next epoch. To resume, save
    ``state_dict(steps)`` with the number of batches taken from the current iteration: loaders that prefetch
    have drawn more than that. StatefulDataLoader saves it by itself. Loading continues after exactly those
    samples, also with another batch size, rank count, ``leftovers`` or ``aligned``: with the same batches
    where batch size and leftovers are the same, otherwise with the unseen samples planned anew, again as a
    function of (seed, epoch, what was seen). There is no attribute ``batch_size``: accelerate's
    BatchSamplerShard would mix buckets to fill up to it.
    """

    def __init__(
        self,
        buckets: ArrayLike,
        chunks: ArrayLike | Callable[[int], ArrayLike],
        *,
        batch_size: int,
        seed: int = 0,
        rank: int | None = 0,
        world_size: int = 1,
        repeats: ArrayLike = 1,
        leftovers: str = "merge",
        aligned: bool = False,
    ) -> None:
        if leftovers not in LEFTOVERS:
            raise ValueError(f"leftovers must be one of {', '.join(LEFTOVERS)}, got {leftovers!r}")
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("world_size", world_size, 1),
            ("seed", seed, 0),
        ):
            if int(value) != value or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value}")
        if rank is not None and not 0 <= rank < world_size:
            raise ValueError(
                f"rank must lie in [0, {world_size}) or be None for the batches of all ranks, got {rank}"
            )
        found = _integers("buckets", buckets)
        if not len(found):
            raise ValueError("there are no samples: buckets is empty")
        names, codes = np.unique(found, return_inverse=True)
        self._buckets = codes.reshape(-1).astype(np.min_scalar_type(len(names) - 1))
        self._chunks = chunks if callable(chunks) else _chunk_counts(chunks, len(found))
        self._repeats = _repeats(repeats, len(found))
        self._settings = Settings(int(batch_size), int(world_size), leftovers, bool(aligned))
        self._seed, self._rank = int(seed), rank
        self._epoch = self._loaded_epoch = 0
        # settings under which earlier parts of this epoch were seen, and how many batches
        self._past: list[tuple[Settings, int]] = []
        # these parts: a plan, and the first and last of its batches
        self._replayed: list[tuple[_Plan, int, int, Settings]] = []
        self._seen = 0  # samples in them
        # batches of the plan: drawn, before this iteration, before this process
        self._done = self._first = self._resumed = 0
        self._plan: _Plan | None = None
        self._counts: NDArray[np.integer[Any]] | None = None
        self._fingerprint: str | None = None

    # ------------------------------------------------------------------ the epoch and where it stands

    @property
    def epoch(self) -> int:
        """The epoch under way, or the next one if none is."""
        return self._epoch

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of ``epoch``; the epoch under way is left where it stands. Raises ValueError for an
        epoch before that of a loaded state: a loader that counts its own epochs from 0 would silently train
        the old ones again."""
        if epoch < 0:
            raise ValueError(f"epoch must be at least 0, got {epoch}")
        if epoch < self._loaded_epoch:
            raise ValueError(
                f"set_epoch({epoch}) goes back behind the loaded state, which stands in epoch "
                f"{self._loaded_epoch}: start counting there "
                f"(accelerate: dataloader.iteration = sampler.epoch), or make a new sampler to train it again"
            )
        if epoch != self._epoch or self._finished():
            self._epoch = int(epoch)
            self._restart()

    def __len__(self) -> int:
        """Batches that an iteration yields from where the epoch began or was resumed, for this rank
        (rank=None: for all)."""
        left = len(self._current().starts) - self._resumed
        return left if self._rank is None else left // self._settings.world_size

    def __iter__(self) -> Iterator[list[int]]:
        if self._finished():
            self._epoch += 1
            self._restart()
        plan, world = self._current(), self._settings.world_size
        self._done -= self._done % world  # rank=None may have stopped within a step
        self._first = self._done
        order, starts, sizes = plan.order, plan.starts, plan.sizes
        for step in range(self._done, len(starts), world):
            for k in range(step, step + world) if self._rank is None else (step + self._rank,):
                self._done = k + 1 if self._rank is None else step + world
                yield order[starts[k] : starts[k] + sizes[k]].tolist()

    def state_dict(self, steps: int | None = None) -> dict[str, Any]:
        """Where this epoch stands, as plain JSON, equal on all ranks. ``steps`` is the number of batches that
        this rank has trained of the current iteration (``rank=None``: that each rank has); None means all
        that were drawn, which with a prefetching loader is more."""
        done = self._done if steps is None else self._first + int(steps) * self._settings.world_size
        plan = self._current()
        if not self._first <= done <= len(plan.starts):
            most = (len(plan.starts) - self._first) // self._settings.world_size
            raise ValueError(f"steps must lie in [0, {most}], what this iteration has, got {steps}")
        done -= done % self._settings.world_size  # within a step (rank=None) the step counts as not done
        segments = [*self._past, (self._settings, done)]
        return {
            "format": FORMAT,
            "seed": self._seed,
            "epoch": self._epoch,
            "samples": int(self._seen + plan.sizes[:done].sum()),
            "segments": [{**asdict(settings), "batches": int(batches)} for settings, batches in segments],
            "fingerprint": self.fingerprint(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the samples that ``state`` has seen, with this sampler's own batch size and ranks.
        Raises ValueError, and changes nothing, for a state of other data (buckets, chunks or repeats) or one
        that is damaged."""
        if not isinstance(state, Mapping) or state.get("format") != FORMAT:
            found = state.get("format", "no format") if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(
                f"this is no state of a bucket sampler: expected format {FORMAT!r}, found {found!r}"
            )
        before = self.__dict__.copy()
        try:
            self._seed, self._epoch = int(state["seed"]), int(state["epoch"])
            segments = []
            for entry in state["segments"]:
                values = dict(entry)
                batches = int(values.pop("batches"))
                segments.append((Settings(**values), batches))
            self._restart()
            if state["fingerprint"] != self.fingerprint():
                raise ValueError(
                    f"the state was saved with other data (fingerprint {state['fingerprint']}, this data "
                    f"{self.fingerprint()}): the number "
                    "of samples, their buckets, chunks or repeats have changed, so start the epoch anew or "
                    "bring the old data back"
                )
            self._resume(segments)
            if self._seen + int(self._current().sizes[: self._done].sum()) != int(state["samples"]):
                raise ValueError(
                    f"the state says that {state['samples']} samples were seen, which its own "
                    "plan contradicts: it is damaged"
                )
        except BaseException as error:
            self.__dict__.clear()
            self.__dict__.update(before)
            if isinstance(error, KeyError | TypeError | AttributeError):
                raise ValueError(
                    f"the state of the bucket sampler is damaged ({error!r}): start the epoch anew"
                ) from error
            raise
        if self._finished():
            self._epoch += 1
            self._restart()
        self._loaded_epoch = self._epoch

    def fingerprint(self) -> str:
        """16 hex digits of this epoch's data: buckets, chunks, repeats. Settings and seed are not in it."""
        if self._fingerprint is None:
            digest = hashlib.blake2b(digest_size=8)
            for array, kind in (
                (self._buckets, "<i4"),
                (self._epoch_chunks(), "<i4"),
                (self._repeats, "<f8"),
            ):
                for first in range(0, len(array), 1 << 18):
                    digest.update(array[first : first + (1 << 18)].astype(kind).tobytes())
                digest.update(b"|")
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def account(self) -> Account:
        """What this epoch loses and repeats, and how long its prompts are; with a resumed epoch, all of it
        from its start."""
        chunks, wanted = self._epoch_chunks(), self._draws()
        parts = [*self._replayed, (self._current(), 0, len(self._current().starts), self._settings)]
        seen = merged = batches = smaller = repeated = cost = 0
        for plan, first, last, settings in parts:
            sizes = plan.sizes[first:last]
            # a run is sorted by chunks
            longest = chunks[plan.order[plan.starts[first:last] + sizes - 1]].astype(np.int64)
            mine = chunks[plan.samples(first, last, extra=True)]
            seen, batches, smaller = (
                seen + len(mine),
                batches + len(sizes),
                smaller + int((sizes < settings.batch_size).sum()),
            )
            merged += int((mine < np.repeat(longest, sizes)).sum())
            repeated += int(sizes[plan.extra[first:last]].sum())
            cost += int((longest * sizes).sum())
        return Account(
            epoch=self._epoch,
            samples=len(wanted),
            lost=len(wanted) - (seen - repeated),
            repeated=repeated,
            merged=merged,
            batches=batches,
            smaller=smaller,
            chunks=cost / max(1, seen),
            floor=float(chunks[wanted].mean()) if len(wanted) else 0.0,
        )

    # ------------------------------------------------------------------ planning

    def _restart(self) -> None:
        """The start of the current epoch, not planned yet."""
        self._past, self._replayed, self._seen = [], [], 0
        self._done = self._first = self._resumed = 0
        self._plan = self._counts = self._fingerprint = None

    def _finished(self) -> bool:
        return self._plan is not None and self._done >= len(self._plan.starts) > 0

    def _current(self) -> _Plan:
        if self._plan is None:
            self._plan = _even(self._planned(self._draws(), 0, self._settings), self._settings)
            if not len(self._plan.starts):
                raise ValueError(
                    f"epoch {self._epoch} has no batch: no bucket holds a whole batch of "
                    f"{self._settings.batch_size} on "
                    f"{self._settings.world_size} rank(s) and leftovers are dropped, or all repeats are 0; "
                    "use leftovers='merge'"
                )
        return self._plan

    def _resume(self, segments: list[tuple[Settings, int]]) -> None:
        """Replay ``segments`` of this epoch, and continue the last or plan what it left."""
        if not segments:
            raise ValueError("the state of the bucket sampler is damaged (no segments): start the epoch anew")
        if segments[-1][0] != self._settings:
            segments = [*segments, (self._settings, 0)]
        plan, before = self._planned(self._draws(), 0, segments[0][0]), segments[0][0]
        for number, (settings, batches) in enumerate(segments):
            if number:
                done = segments[number - 1][1]
                self._past.append((before, done))
                self._replayed.append((plan, 0, done, before))
                self._seen += int(plan.sizes[:done].sum())
                if settings.same_order(before):
                    plan = plan.part(slice(done, None))
                else:
                    plan = self._planned(plan.samples(done), number, settings)
            plan, before = _even(plan, settings), settings
            if not 0 <= batches <= len(plan.starts) or batches % settings.world_size:
                raise ValueError(
                    f"the state says that {batches} batches were seen of {len(plan.starts)}: it is damaged"
                )
        self._plan, self._done = plan, segments[-1][1]
        self._first = self._resumed = self._done

    def _epoch_chunks(self) -> NDArray[np.integer[Any]]:
        """Chunk counts of this epoch's prompts."""
        if not callable(self._chunks):
            return self._chunks
        if self._counts is None:
            self._counts = _chunk_counts(self._chunks(self._epoch), len(self._buckets))
        return self._counts

    def _draws(self) -> Ints:
        """The samples of this epoch in order of index, each as often as it is to be seen."""
        if (self._repeats == 1).all():
            return np.arange(len(self._buckets))
        phase = (self._bits(len(self._buckets), 0, 0, _REPEATS) >> np.uint64(11)).astype(
            np.float64
        ) * 2.0**-53
        counts = np.floor(self._repeats * (self._epoch + 1) + phase) - np.floor(
            self._repeats * self._epoch + phase
        )
        return np.repeat(np.arange(len(self._buckets)), counts.astype(np.int64))

    def _bits(self, count: int, epoch: int, segment: int, purpose: int) -> Bits:
        return np.random.Philox(key=[self._seed, epoch], counter=[0, 0, segment, purpose]).random_raw(count)

    def _planned(self, samples: Ints, segment: int, settings: Settings) -> _Plan:
        """Batches of ``samples`` in random order; the number is not yet even."""
        chunks = self._epoch_chunks()
        longest = int(chunks.max(initial=1)) + 1
        groups = (int(self._buckets.max()) + 1) * longest
        index_bits, group_bits = _bit_length(len(chunks)), _bit_length(groups)
        if index_bits + group_bits > 48:
            raise ValueError(
                f"{len(chunks)} samples in {groups} buckets x chunks are too many: fewer than 16 of 64 bits "
                "are left to shuffle by"
            )
        group = self._buckets[samples].astype(np.uint64)
        group *= np.uint64(longest)
        group += chunks[samples].astype(np.uint64)
        counts = np.bincount(group.astype(np.min_scalar_type(groups)), minlength=groups)
        keys = self._bits(len(samples), self._epoch, segment, _KEYS)
        keys >>= np.uint64(group_bits + index_bits)
        keys <<= np.uint64(index_bits)
        group <<= np.uint64(64 - group_bits)
        keys |= group
        del group
        keys |= samples.view(np.uint64)
        keys.sort()
        keys &= np.uint64((1 << index_bits) - 1)
        starts, sizes = _cut(counts.reshape(-1, longest), settings)
        shuffled = self._bits(len(starts), self._epoch, segment, _ORDER)
        batch_bits = np.uint64(_bit_length(len(starts)))
        shuffled >>= batch_bits
        shuffled <<= batch_bits
        shuffled |= np.arange(len(starts), dtype=np.uint64)
        shuffled.sort()
        turn = (shuffled & np.uint64((1 << int(batch_bits)) - 1)).astype(np.int64)
        return _dealt(
            _Plan(keys.view(np.int64), starts[turn], sizes[turn], np.zeros(len(turn), bool)), settings
        )


def _cut(counts: Ints, settings: Settings) -> tuple[Ints, Ints]:
    """Cut runs of samples into batches (of all ranks together if aligned): starts and sizes. ``counts`` is
    [buckets, chunks], in the order of the samples. To merge leftovers upward is to cut a bucket as one run:
    its samples are sorted by chunks."""
    runs = counts.sum(axis=1) if settings.leftovers == "merge" else counts.reshape(-1)
    size = settings.batch_size * (settings.world_size if settings.aligned else 1)
    pieces = runs // size if settings.leftovers == "drop" else -(-runs // size)
    ends = np.cumsum(runs)
    inside = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = np.repeat(ends - runs, pieces) + size * inside
    return starts, np.minimum(size, np.repeat(ends, pieces) - starts)


def _dealt(plan: _Plan, settings: Settings) -> _Plan:
    """An aligned plan's batches, dealt in equal parts to the ranks; a rank for which no sample is left
    repeats another's."""
    world = settings.world_size
    if not settings.aligned or world == 1:
        return plan
    rank, sizes = np.arange(world), plan.sizes[:, None]
    extra = rank >= sizes
    scarce = sizes < world
    first = np.where(scarce, rank % np.maximum(sizes, 1), sizes * rank // world)
    last = np.where(scarce, first + 1, sizes * (rank + 1) // world)
    return _Plan(
        plan.order, (plan.starts[:, None] + first).reshape(-1), (last - first).reshape(-1), extra.reshape(-1)
    )


def _even(plan: _Plan, settings: Settings) -> _Plan:
    """The plan with a number of batches that divides by the ranks: some of the last batches are halved. Where
    even single samples are too few, some are repeated; where leftovers are dropped, so are the batches that
    are too many."""
    world, count = settings.world_size, len(plan.starts)
    missing = -count % world
    if not missing or not count:
        return plan
    if settings.leftovers == "drop":
        return plan.part(slice(0, count - count % world))
    # so many of the last batches can be halved often enough
    enough = int(np.searchsorted(np.cumsum((plan.sizes - 1)[::-1]), missing)) + 1
    tail = min(count, max(enough, world + count % world))
    last = plan.part(slice(count - tail, None))
    parts = list(zip(last.starts.tolist(), last.sizes.tolist(), last.extra.tolist(), strict=True))
    for turn in range(missing):
        k = max(range(len(parts)), key=lambda k: parts[k][1])
        start, size, extra = parts[k]
        if size > 1:
            parts[k : k + 1] = [
                (start, size - size // 2, extra),
                (start + size - size // 2, size // 2, extra),
            ]
        else:
            parts.append((*parts[turn % tail][:2], True))
    whole = plan.part(slice(0, count - tail))
    starts, sizes, extras = (np.array(column) for column in zip(*parts, strict=True))
    return _Plan(
        plan.order,
        np.append(whole.starts, starts),
        np.append(whole.sizes, sizes),
        np.append(whole.extra, extras),
    )


def _bit_length(count: int) -> int:
    return max(1, (count - 1).bit_length())


def _integers(name: str, values: ArrayLike) -> NDArray[np.integer[Any]]:
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise ValueError(
            f"{name} must be whole numbers, one per sample, shape [N]; got {array.dtype} of "
            f"shape {list(array.shape)}"
        )
    return array


def _chunk_counts(values: ArrayLike, samples: int) -> NDArray[np.integer[Any]]:
    array = _integers("chunks", values)
    if len(array) != samples:
        raise ValueError(f"chunks must have one number per sample: expected {samples}, got {len(array)}")
    if array.min() < 1:
        raise ValueError(
            f"chunks must be at least 1 (an empty prompt is one chunk), got {array.min()} for "
            f"sample {int(array.argmin())}"
        )
    return array.astype(np.min_scalar_type(int(array.max())))


def _repeats(values: ArrayLike, samples: int) -> NDArray[np.float64]:
    array = (
        np.broadcast_to(np.asarray(values, dtype=np.float64), (samples,))
        if np.ndim(values) == 0
        else np.asarray(values, np.float64)
    )
    if array.shape != (samples,) or not np.isfinite(array).all() or (array < 0).any():
        raise ValueError(
            f"repeats must be a number, or {samples} numbers, finite and not negative; got {values!r:.80}"
        )
    return array
