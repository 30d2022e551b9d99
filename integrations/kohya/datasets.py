"""Kohya's classes that run in DataLoader workers, by prompt chunks. Needs sd-scripts' ``library`` on
sys.path, as its workers have it."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from library.strategy_base import TextEncoderOutputsCachingStrategy, TokenizeStrategy
from library.strategy_sdxl import SdxlTextEncoderOutputsCachingStrategy, SdxlTokenizeStrategy

try:  # sd-scripts 0.11
    from library.dataset import BucketBatchIndex
    from library.dreambooth_dataset import DreamBoothDataset
    from library.finetuning_dataset import FineTuningDataset
except ImportError:
    from library.train_util import BucketBatchIndex, DreamBoothDataset, FineTuningDataset

from sdxl_fixes.buckets import ChunkBucketBatchSampler
from sdxl_fixes.errors import FlagError
from sdxl_fixes.log import warn
from sdxl_fixes.token_counts import count_chunks, too_long

from .chunk_flags import Options

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DRAWN = (
    "shuffle_caption",
    "enable_wildcard",
    "caption_dropout_rate",
    "caption_dropout_every_n_epochs",
    "caption_tag_dropout_rate",
)


class ChunkTokenizeStrategy(SdxlTokenizeStrategy):  # type: ignore[misc]
    """Upstream's ids, without the chunks at the end that are empty in all of a batch. All data sets hold it
    and take it into their workers, and with it what they share."""

    options: Options
    epoch_now: Any = None  # the trainer's epoch, shared between processes
    least = 1  # chunks to keep, empty or not

    def tokenize(self, text: str | list[str]) -> Any:
        """Ids of both tokenizers, each shape [B, n, 77]."""
        ids = super().tokenize(text)
        count = max(self.least, self._last(ids))
        return tuple(each[:, :count] for each in ids)

    def tokenize_with_weights(self, text: str | list[str]) -> Any:
        """The same with emphasis; ids and weights."""
        ids, weights = super().tokenize_with_weights(text)
        count = max(self.least, self._last(ids))
        return [each[:, :count] for each in ids], [each[:, :count] for each in weights]

    def chunks_of(self, text: str, weighted: bool) -> int:
        """Chunks of one prompt as it will be tokenized, at most the limit."""
        return self._last(super().tokenize_with_weights(text)[0] if weighted else super().tokenize(text))

    def _last(self, ids: Sequence[torch.Tensor]) -> int:
        """Chunks until the last that is not empty in all of the batch. Both tokenizers are asked: the first
        pads with EOS, and a caption may hold EOS itself (``<|endoftext|>``); the second pads with 0, which is
        a token."""
        pairs = zip(ids, (self.tokenizer1, self.tokenizer2), strict=True)
        differs = [(each != _empty(tokenizer, each)).any(dim=-1).any(dim=0) for each, tokenizer in pairs]
        filled = (differs[0] | differs[1]).nonzero()
        return int(filled[-1]) + 1 if len(filled) else 1


class ChunkCachingStrategy(SdxlTextEncoderOutputsCachingStrategy):  # type: ignore[misc]
    """Cache files named by layout and number of chunks, so that none is taken for one of another length."""

    layout: str
    chunks: dict[str, int]  # image -> chunks of its caption

    def get_outputs_npz_path(self, image_abs_path: str) -> str:
        """The file beside the image."""
        stem, _ = os.path.splitext(image_abs_path)
        return f"{stem}_te_outputs_{self.layout}_{self.chunks[image_abs_path]}.npz"


class _Chunked:
    """What both kinds of data set have in common. A batch is one bucket of upstream's bucket manager, which
    is filled anew every epoch."""

    strategy: ChunkTokenizeStrategy
    batches: list[list[int]] | None = None  # numbers of draws; a sample is drawn as often as it repeats
    _queue: tuple[int, ...] = ()

    def make_buckets(self: Any) -> None:
        """Upstream's aspect buckets, then ours."""
        self.strategy, self.batches = TokenizeStrategy.get_strategy(), None
        for subset in self.subsets:
            if subset.token_warmup_step > 0:
                raise FlagError(
                    "--chunk_buckets does not go with token_warmup_step, which changes the "
                    "prompts within an epoch: drop one"
                )
        super().make_buckets()  # type: ignore[misc]
        infos = list(self.image_data.values())
        self.draws = [info.image_key for info in infos for _ in range(info.num_repeats)]
        places = {resolution: k for k, resolution in enumerate(self.bucket_manager.resos)}
        self.aspects = np.array(
            [places[self.image_data[key].bucket_reso] for key in self.draws], dtype=np.int64
        )
        self.drawn = not self.strategy.options.cached and any(
            getattr(subset, name, 0) for subset in self.subsets for name in _DRAWN
        )
        if not self.draws:
            return
        self.static = (
            None
            if self.drawn
            else self._counts([self._caption(number) for number in range(len(self.draws))], report=True)
        )
        if self.strategy.options.cached:
            self.keys_to_chunks = {
                self.image_data[key].absolute_path: int(n)
                for key, n in zip(self.draws, self.static, strict=True)
            }
        self.batches = []
        self.shuffle_buckets()
        self._length = len(self.buckets_indices)

    def shuffle_buckets(self: Any) -> None:
        """Plan the current epoch."""
        if self.batches is None:
            super().shuffle_buckets()  # type: ignore[misc]
            return
        counts = (
            self._counts([self._caption(number) for number in range(len(self.draws))])
            if self.drawn
            else self.static
        )
        # cached outputs cannot be given empty chunks, so there leftovers are not merged
        leftovers = "smaller" if self.strategy.options.cached else "merge"
        sampler = ChunkBucketBatchSampler(
            self.aspects, counts, batch_size=self.batch_size, seed=self.seed, leftovers=leftovers
        )
        sampler.set_epoch(self.current_epoch)
        self.batches = list(sampler)
        self.bucket_manager.buckets = [[self.draws[number] for number in batch] for batch in self.batches]
        self.buckets_indices = [BucketBatchIndex(k, self.batch_size, 0) for k in range(len(self.batches))]

    def set_current_epoch(self: Any, epoch: int) -> None:
        """Upstream's plans every epoch in between."""
        if epoch != self.current_epoch:
            self.current_epoch = epoch
            self.shuffle_buckets()

    def __getitem__(self: Any, index: int) -> Any:
        # before 0.11 an item may be for a cache
        if self.batches and getattr(self, "caching_mode", None) is None:
            if self.strategy.epoch_now is not None:
                self.set_current_epoch(self.strategy.epoch_now.value)
            self._queue = tuple(self.batches[index])
        try:
            example = super().__getitem__(index)  # type: ignore[misc]
        finally:
            self._queue = ()
        for ids, tokenizer in zip(
            example.get("input_ids_list") or (),
            (self.strategy.tokenizer1, self.strategy.tokenizer2),
            strict=False,
        ):
            _fill(ids, tokenizer)
        return example

    def process_caption(self: Any, subset: Any, caption: str) -> Any:
        """In a batch, the prompt that was drawn when the epoch was planned."""
        if not self._queue:
            return super().process_caption(subset, caption)  # type: ignore[misc]
        number, *self._queue = self._queue
        return self._caption(number)

    def _caption(self: Any, number: int) -> str:
        """The prompt of a draw in this epoch: a function of (seed, epoch, draw)."""
        key = self.draws[number]
        caption = self.image_data[key].caption
        if self.strategy.options.cached:
            return str(caption)
        state = random.getstate()
        random.seed(
            hashlib.blake2b(f"{self.seed} {self.current_epoch} {number}".encode(), digest_size=8).digest()
        )
        try:
            return str(super().process_caption(self.image_to_subset[key], caption))  # type: ignore[misc]
        finally:
            random.setstate(state)

    def _counts(self: Any, captions: list[str], report: bool = False) -> Any:
        """Chunks of every caption, at most the limit."""
        if self.strategy.options.weighted:
            known = {caption: self.strategy.chunks_of(caption, True) for caption in set(captions)}
            return np.array([known[caption] for caption in captions])
        counts = count_chunks(self.strategy.tokenizer1, captions)
        names, first = np.unique(self.draws, return_index=True)
        if report and (sentence := too_long(counts[first], self.strategy.options.limit, names.tolist())):
            warn(f"{sentence}; raise --max_token_length or shorten them")
        return np.minimum(counts, self.strategy.options.limit)

    def new_cache_text_encoder_outputs(self: Any, models: list[Any], accelerator: Any) -> Any:
        """Upstream's, into files named by chunks."""
        strategy = TextEncoderOutputsCachingStrategy.get_strategy()
        strategy.__class__ = ChunkCachingStrategy
        strategy.layout = self.strategy.options.layout
        strategy.chunks = {**getattr(strategy, "chunks", {}), **self.keys_to_chunks}
        return super().new_cache_text_encoder_outputs(models, accelerator)  # type: ignore[misc]


def _fill(ids: torch.Tensor, tokenizer: PreTrainedTokenizerBase) -> None:
    """Upstream pads a caption to its batch mates with rows of zeros; an empty chunk is BOS, EOS, padding.
    ``ids``: [B, n, 77]."""
    if ids is None or ids.ndim != 3:
        return
    ids[ids[:, :, 0] != tokenizer.bos_token_id] = _empty(tokenizer, ids)


def _empty(tokenizer: PreTrainedTokenizerBase, like: torch.Tensor) -> torch.Tensor:
    """An empty chunk: BOS, EOS, padding, shape [77]."""
    empty = torch.full(like.shape[-1:], tokenizer.pad_token_id, dtype=like.dtype, device=like.device)
    empty[0], empty[1] = tokenizer.bos_token_id, tokenizer.eos_token_id
    return empty


class ChunkDreamBoothDataset(_Chunked, DreamBoothDataset):  # type: ignore[misc]
    """Images with caption files."""


class ChunkFineTuningDataset(_Chunked, FineTuningDataset):  # type: ignore[misc]
    """Images with a metadata file."""
