"""Batches whose samples share the aspect bucket and the number of prompt chunks, so that no token is padding
that a batch mate caused.

The samples are sorted by bucket, chunks and random bits. What lies side by side then is shuffled within its
bucket; cut into batches, and the batches shuffled, it is the epoch. Only raw bits of Philox are used (numpy
keeps those stable between versions, unlike ``permutation``), so a plan is a function of (seed, epoch) alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Sampler

from sdxl_fixes.names import LEFTOVERS, check_seed

FORMAT = "sdxl-fixes buckets 1"
_KEYS, _ORDER, _REPEATS = range(3)  # what random bits are for

_PIECE = 1 << 20  # of what is as long as the data set, so much is computed at a time

Ints = NDArray[np.int64]
Samples = NDArray[np.integer[Any]]  # int32 where that suffices
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

    order: Samples
    starts: Ints
    sizes: Ints
    extra: NDArray[np.bool_]

    def part(self, batches: slice) -> _Plan:
        """Some of the batches."""
        return _Plan(self.order, self.starts[batches], self.sizes[batches], self.extra[batches])

    def samples(self, first: int = 0, last: int | None = None, extra: bool = False) -> Samples:
        """The samples of batches first to last, those of extra batches only if asked for."""
        starts, sizes = self.starts[first:last], self.sizes[first:last]
        if not extra:
            starts, sizes = starts[~self.extra[first:last]], sizes[~self.extra[first:last]]
        before = np.cumsum(sizes) - sizes
        places: Ints = np.repeat(starts - before, sizes) + np.arange(sizes.sum())
        return self.order[places]


@dataclass(frozen=True)
class _Epoch:
    """What an epoch's plans are made of: the samples' buckets, chunks and repeats, each shape [N], and what
    tells it from others."""

    seed: int
    number: int
    buckets: NDArray[np.integer[Any]]
    chunks: NDArray[np.integer[Any]]
    repeats: NDArray[np.float64]

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of the data."""
        digest = hashlib.blake2b(digest_size=8)
        for array, kind in ((self.buckets, "<i4"), (self.chunks, "<i4"), (self.repeats, "<f8")):
            for first in range(0, len(array), 1 << 18):
                digest.update(array[first : first + (1 << 18)].astype(kind).tobytes())
            digest.update(b"|")
        return digest.hexdigest()

    def draws(self) -> Samples:
        """The samples in order of index, each as often as it is to be seen."""
        samples = np.arange(len(self.buckets), dtype=np.int32 if len(self.buckets) < 2**31 else np.int64)
        if (self.repeats == 1).all():
            return samples
        # the same in every epoch: fractions add up
        bits = _bits(self.seed, 0, 0, _REPEATS, len(self.buckets))
        phase = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
        before, after = (np.floor(self.repeats * n + phase) for n in (self.number, self.number + 1))
        return np.repeat(samples, (after - before).astype(np.int64))

    def plan(self, samples: Samples, segment: int, settings: Settings) -> _Plan:
        """Batches of ``samples`` in random order; the number is not yet even."""
        longest = int(self.chunks.max(initial=1)) + 1
        groups = (int(self.buckets.max()) + 1) * longest
        group = np.empty(len(samples), np.min_scalar_type(groups - 1))
        counts = np.zeros(groups, np.int64)
        for piece in _pieces(len(samples)):
            drawn = samples[piece]
            group[piece] = self.buckets[drawn].astype(np.int64) * longest + self.chunks[drawn]
            counts += np.bincount(group[piece], minlength=groups)
        order = samples[_argsort(group, _bits(self.seed, self.number, segment, _KEYS, len(samples)))]
        starts, sizes = _cut(counts.reshape(-1, longest), settings)
        alike = np.zeros(len(starts), np.int64)
        turn = _argsort(alike, _bits(self.seed, self.number, segment, _ORDER, len(starts)))
        return _dealt(_Plan(order, starts[turn], sizes[turn], alike != 0), settings)


class _Part(NamedTuple):
    """The beginning of an epoch, or what followed it, that was seen under other settings: the first ``done``
    batches of a plan."""

    plan: _Plan
    settings: Settings
    done: int

    def samples(self) -> int:
        """How many were seen."""
        return int(self.plan.sizes[: self.done].sum())


@dataclass(frozen=True)
class _Place:
    """Where a sampler stands: in ``plan``, which follows the parts of the epoch that were seen under other
    settings. ``done`` batches of it are drawn, ``first`` of them before this iteration, ``resumed`` before
    this process."""

    epoch: _Epoch
    plan: _Plan
    past: tuple[_Part, ...] = ()
    resumed: int = 0
    first: int = 0
    done: int = 0

    def finished(self) -> bool:
        """Whether no batch is left."""
        return self.done >= len(self.plan.starts)


class ChunkBucketBatchSampler(Sampler[list[int]]):
    """Batches of indices in which all samples have the same bucket and number of chunks, every sample once
    per epoch.

    buckets     aspect bucket of every sample, integers, shape [N]
    chunks      number of 75-token chunks of every sample's prompt, integers from 1, shape [N]; or, where
                prompts are drawn anew (tag shuffling, dropout, score tags), a function of the epoch that
                returns this array for the prompts of that epoch
    batch_size  samples per batch and rank
    seed        with the epoch it determines everything
    rank        this process; None yields the batches of all ranks in turn, for accelerate's prepare() to deal
                out
    world_size  number of processes; all get the same number of batches
    repeats     how often a sample is seen per epoch: a number or one per sample. 0.5 is every other epoch,
                2.5 twice and thrice in turn
    leftovers   samples that fill no batch: "merge" moves them upward into the next larger chunk count of
                their bucket (the batch takes the longest prompt's; one smaller batch per bucket remains),
                "smaller" makes them a smaller batch, "drop" drops them
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
        self._buckets = _codes(found)
        self._chunks = chunks if callable(chunks) else _chunk_counts(chunks, len(found))
        self._repeats = _repeats(repeats, len(found))
        self._settings = Settings(int(batch_size), int(world_size), leftovers, bool(aligned))
        self._seed, self._rank = check_seed(seed), rank
        self._epoch = self._loaded_epoch = 0
        self._place: _Place | None = None  # of this epoch, once it is needed

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
            self._epoch, self._place = int(epoch), None

    def __len__(self) -> int:
        """Batches that an iteration yields from where the epoch began or was resumed, for this rank
        (rank=None: for all)."""
        place = self._here()
        left = len(place.plan.starts) - place.resumed
        return left if self._rank is None else left // self._settings.world_size

    def __iter__(self) -> Iterator[list[int]]:
        if self._finished():
            self._epoch, self._place = self._epoch + 1, None
        place, world = self._here(), self._settings.world_size
        done = place.done - place.done % world  # rank=None may have stopped within a step
        place = self._place = replace(place, first=done, done=done)
        order, starts, sizes, _ = place.plan
        for step in range(done, len(starts), world):
            for k in range(step, step + world) if self._rank is None else (step + self._rank,):
                if self._place is place:  # else a newer iteration or another state has taken over
                    done = k + 1 if self._rank is None else step + world
                    place = self._place = replace(place, done=done)
                yield order[starts[k] : starts[k] + sizes[k]].tolist()

    def state_dict(self, steps: int | None = None) -> dict[str, Any]:
        """Where this epoch stands, as plain JSON, equal on all ranks. ``steps`` is the number of batches that
        this rank has trained of the current iteration (``rank=None``: that each rank has); None means all
        that were drawn, which with a prefetching loader is more."""
        place, world = self._here(), self._settings.world_size
        done = place.done if steps is None else place.first + int(steps) * world
        if not place.first <= done <= len(place.plan.starts):
            most = (len(place.plan.starts) - place.first) // world
            raise ValueError(f"steps must lie in [0, {most}], what this iteration has, got {steps}")
        done -= done % world  # within a step (rank=None) the step counts as not done
        parts = [*place.past, _Part(place.plan, self._settings, done)]
        return {
            "format": FORMAT,
            "seed": self._seed,
            "epoch": self._epoch,
            "samples": sum(part.samples() for part in parts),
            "segments": [{**asdict(part.settings), "batches": int(part.done)} for part in parts],
            "fingerprint": place.epoch.fingerprint,
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
        try:
            place = self._resumed(state)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"the state of the bucket sampler is damaged ({error!r}): start the epoch anew"
            ) from error
        self._seed, self._epoch, self._place = place.epoch.seed, place.epoch.number, place
        if place.finished():
            self._epoch, self._place = self._epoch + 1, None
        self._loaded_epoch = self._epoch

    def fingerprint(self) -> str:
        """16 hex digits of this epoch's data: buckets, chunks, repeats. Settings and seed are not in it."""
        return self._here().epoch.fingerprint

    def account(self) -> Account:
        """What this epoch loses and repeats, and how long its prompts are; with a resumed epoch, all of it
        from its start."""
        place = self._here()
        chunks, wanted = place.epoch.chunks, place.epoch.draws()
        parts = [*place.past, _Part(place.plan, self._settings, len(place.plan.starts))]
        seen = merged = batches = smaller = repeated = cost = 0
        for plan, settings, last in parts:
            batches += last
            for piece in _pieces(last, settings.batch_size):
                sizes = plan.sizes[piece]
                # a run is sorted by chunks
                longest = chunks[plan.order[plan.starts[piece] + sizes - 1]].astype(np.int64)
                mine = chunks[plan.samples(piece.start, piece.stop, extra=True)]
                seen, smaller = seen + len(mine), smaller + int((sizes < settings.batch_size).sum())
                merged += int((mine < np.repeat(longest, sizes)).sum())
                repeated += int(sizes[plan.extra[piece]].sum())
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

    def _finished(self) -> bool:
        return self._place is not None and self._place.finished()

    def _here(self) -> _Place:
        if self._place is None:
            epoch = self._data(self._seed, self._epoch)
            plan = _even(epoch.plan(epoch.draws(), 0, self._settings), self._settings)
            if not len(plan.starts):
                raise ValueError(
                    f"epoch {self._epoch} has no batch: no bucket holds a whole batch of "
                    f"{self._settings.batch_size} on "
                    f"{self._settings.world_size} rank(s) and leftovers are dropped, or all repeats are 0; "
                    "use leftovers='merge'"
                )
            self._place = _Place(epoch, plan)
        return self._place

    def _data(self, seed: int, number: int) -> _Epoch:
        """An epoch, with the chunk counts of its prompts."""
        chunks = self._chunks
        if callable(chunks):
            chunks = _chunk_counts(chunks(number), len(self._buckets))
        return _Epoch(seed, number, self._buckets, chunks, self._repeats)

    def _resumed(self, state: Mapping[str, Any]) -> _Place:
        """Replay the segments of a state, and continue the last or plan what it left."""
        epoch = self._data(check_seed(state["seed"]), int(state["epoch"]))
        segments = [_segment(entry) for entry in state["segments"]]
        if state["fingerprint"] != epoch.fingerprint:
            raise ValueError(
                f"the state was saved with other data (fingerprint {state['fingerprint']}, this data "
                f"{epoch.fingerprint}): the number "
                "of samples, their buckets, chunks or repeats have changed, so start the epoch anew or "
                "bring the old data back"
            )
        if not segments:
            raise ValueError("the state of the bucket sampler is damaged (no segments): start the epoch anew")
        if segments[-1][0] != self._settings:
            segments = [*segments, (self._settings, 0)]
        parts: list[_Part] = []
        for number, (settings, done) in enumerate(segments):
            if not parts:
                plan = epoch.plan(epoch.draws(), 0, settings)
            elif settings.same_order(parts[-1].settings):
                plan = parts[-1].plan.part(slice(parts[-1].done, None))
            else:
                plan = epoch.plan(parts[-1].plan.samples(parts[-1].done), number, settings)
            plan = _even(plan, settings)
            if not 0 <= done <= len(plan.starts) or done % settings.world_size:
                raise ValueError(
                    f"the state says that {done} batches were seen of {len(plan.starts)}: it is damaged"
                )
            parts.append(_Part(plan, settings, done))
        if sum(part.samples() for part in parts) != int(state["samples"]):
            raise ValueError(
                f"the state says that {state['samples']} samples were seen, which its own "
                "plan contradicts: it is damaged"
            )
        return _Place(epoch, plan, tuple(parts[:-1]), resumed=done, first=done, done=done)


def _segment(entry: Mapping[str, Any]) -> tuple[Settings, int]:
    """The settings of a part of an epoch in a state, and how many batches of it were seen."""
    values = dict(entry)
    done = int(values.pop("batches"))
    return Settings(**values), done


def _bits(seed: int, epoch: int, segment: int, purpose: int, count: int) -> Bits:
    key = np.array([seed, epoch], dtype=np.uint64)  # of a list numpy makes float64 from 2^63 on
    return np.random.Philox(key=key, counter=[0, 0, segment, purpose]).random_raw(count)


def _pieces(length: int, share: int = 1) -> Iterator[slice]:
    """Slices that together are the whole; what is made of each is ``share`` times as long."""
    size = _PIECE // share + 1
    for first in range(0, length, size):
        yield slice(first, min(length, first + size))


def _codes(values: NDArray[np.integer[Any]]) -> NDArray[np.integer[Any]]:
    """The values' places among the different ones, in order, shape [N]: numpy's ``unique`` without its sort
    where they lie close together, as buckets do."""
    least, span = int(values.min()), int(values.max()) - int(values.min()) + 1
    if span > _PIECE:
        names, places = np.unique(values, return_inverse=True)
        codes: NDArray[np.integer[Any]] = places.reshape(-1).astype(np.min_scalar_type(len(names) - 1))
        return codes
    place = np.zeros(span, np.int64)
    for piece in _pieces(len(values)):
        place[np.subtract(values[piece], least, dtype=np.int64)] = 1
    place = np.cumsum(place) - 1
    found: NDArray[np.integer[Any]] = np.empty(len(values), np.min_scalar_type(place[-1]))
    for piece in _pieces(len(values)):
        found[piece] = place[np.subtract(values[piece], least, dtype=np.int64)]
    return found


def _argsort(group: NDArray[np.integer[Any]], bits: Bits) -> Ints:
    """Indices in order of (group, bits, index), shape [N]; ``group`` from 0, ``bits`` are used up. One sort
    of 64-bit keys, of which the random bits get what group and index leave: 4 times as fast as two stable
    argsorts, where numpy's sort is vectorised."""
    index_bits, group_bits = (max(1, int(n).bit_length()) for n in (len(bits) - 1, group.max(initial=0)))
    if index_bits + group_bits > 48:  # too few are left to shuffle by
        return np.lexsort((bits, group))
    keys = bits
    keys >>= np.uint64(group_bits + index_bits)
    keys <<= np.uint64(index_bits)
    for piece in _pieces(len(keys)):
        keys[piece] |= group[piece].astype(np.uint64) << np.uint64(64 - group_bits)
        keys[piece] |= np.arange(piece.start, piece.stop, dtype=np.uint64)
    keys.sort()
    keys &= np.uint64((1 << index_bits) - 1)
    return np.asarray(keys.view(np.int64))


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
