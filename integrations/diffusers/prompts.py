"""Captions longer than 75 tokens, in the layout of the UIs: chunks of 75, each with its own BOS and EOS,
encoded by themselves, their 77 n hidden states side by side, the pooled output of the first.

Token ids travel through the script as [B, 77 n]. The tokenizer pads every caption to the same n (a script may
stack them); chunks that are empty for the whole batch are dropped before encoding or, where a script caches
embeddings, when a batch is put together. Each encoder tells them by its own ids, and both must drop as many:
so chunks at a caption's end that hold nothing but ``<|endoftext|>`` are left out at once, since a tokenizer
that pads with EOS makes them the same ids as an empty chunk, and the other does not.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from sdxl_fixes.errors import FixError
from sdxl_fixes.log import warn
from sdxl_fixes.prompts import CHUNK, layout, split_ids

from .run import SESSION

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLUMN = "sdxl_fixes_chunks"


def tokenize(
    original: Callable[..., Any],
    tokenizer: PreTrainedTokenizerBase,
    text: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The script's ``tokenizer(captions, padding="max_length", ...)`` with ids of shape [B, 77 n]; every
    other call is upstream's."""
    run = SESSION.run
    if run is None or kwargs.get("padding") != "max_length" or not SESSION.called_by_script():
        return original(tokenizer, text, *args, **kwargs)
    SESSION.reached("prompts")
    captions, limit = [text] if isinstance(text, str) else list(text), run.args.max_token_length
    tokens = original(tokenizer, captions, add_special_tokens=False, truncation=False, verbose=False)
    ids = [row[:limit] for row in tokens["input_ids"]]
    _report_cut([len(row) for row in tokens["input_ids"]], limit)
    special = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    if special[1] != special[0] + 1:
        raise FixError(
            f"BOS and EOS of CLIP's tokenizer are neighbours, and here they are {special[0]} and {special[1]}"
        )
    chunks = [_until_the_last_word(split_ids(row), special[1]) for row in ids]
    SESSION.chunks = [len(each) for each in chunks]
    tokens["input_ids"] = torch.stack(
        [layout(each, *special, -(-limit // CHUNK)) for each in chunks]
    ).flatten(1)
    tokens["attention_mask"] = torch.ones_like(tokens["input_ids"])
    return tokens


def encode(original: Callable[..., Any], model: Any, input_ids: Any = None, *args: Any, **kwargs: Any) -> Any:
    """A text encoder given [B, 77 n] ids: hidden states [B, 77 n, D], pooled outputs [B, D] of the first
    chunk."""
    run, length = SESSION.run, model.config.max_position_embeddings
    if run is None or input_ids is None or input_ids.shape[1] <= length:
        return original(model, input_ids, *args, **kwargs)
    SESSION.reached("prompts")
    chunks = input_ids.reshape(len(input_ids), -1, length)
    if SESSION.trim and not _encoded_apart(run.args):
        chunks = chunks[:, : _used(chunks)]
    return _unfold(original(model, chunks.reshape(-1, length), *args, **kwargs), len(input_ids))


def remember(original: Callable[..., Any], self: Any, function: Any = None, *args: Any, **kwargs: Any) -> Any:
    """The script's cached map of captions to embeddings: all of the same length, with the number of chunks of
    each beside them."""
    run = SESSION.run
    if run is None or "new_fingerprint" not in kwargs or not SESSION.called_by_script():
        return original(self, function, *args, **kwargs)

    def with_chunks(batch: Any) -> Any:
        encoded = function(batch)
        return {**encoded, COLUMN: SESSION.chunks} if "prompt_embeds" in encoded else encoded

    SESSION.trim = False
    try:
        mapped = original(self, with_chunks, *args, **kwargs)
    finally:
        SESSION.trim = True
    if COLUMN in mapped.column_names:
        SESSION.reached("prompts")  # also where the embeddings were found in the cache
    return mapped


def loader(original: Callable[..., None], self: Any, dataset: Any, *args: Any, **kwargs: Any) -> None:
    """The script's loader of cached embeddings."""
    if COLUMN in getattr(dataset, "column_names", ()) and SESSION.called_by_script():
        kwargs["collate_fn"] = CutToLongest(kwargs["collate_fn"])
    original(self, dataset, *args, **kwargs)


class CutToLongest:
    """A collate function that drops the chunks which are empty for the whole batch; a class, so that workers
    can be sent it."""

    def __init__(self, collate: Callable[[list[dict[str, Any]]], Any]) -> None:
        self.collate = collate

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        length = (CHUNK + 2) * max(example[COLUMN] for example in examples)
        return self.collate(
            [{**example, "prompt_embeds": example["prompt_embeds"][:length]} for example in examples]
        )


def _encoded_apart(args: argparse.Namespace) -> bool:
    """Whether prompts that meet in one batch are encoded one by one, and so must be of one length: prior
    prompts, and InstructPix2Pix's."""
    return getattr(args, "with_prior_preservation", False) or hasattr(args, "conditioning_dropout_prob")


def _until_the_last_word(chunks: list[list[int]], eos: int) -> list[list[int]]:
    """A caption's chunks without those at its end that hold nothing but literal EOS; at least one."""
    while len(chunks) > 1 and set(chunks[-1]) == {eos}:
        chunks = chunks[:-1]
    return chunks


def _used(chunks: torch.Tensor) -> int:
    """How many chunks of [B, n, 77] ids there are until the last that is not empty for all captions, at least
    1. In an empty one EOS, BOS + 1, follows BOS, and padding, whichever token it is, fills the rest; one that
    holds another token than EOS ends in an EOS that follows it, so its rest is not all the same."""
    empty = (chunks[:, :, 1] == chunks[:, :, 0] + 1) & (chunks[:, :, 2:] == chunks[:, :, 2:3]).all(-1)
    filled = (~empty).any(0).nonzero()
    return int(filled[-1]) + 1 if len(filled) else 1


def _unfold(output: Any, batch: int) -> Any:
    if isinstance(output, torch.Tensor):
        return (
            output.reshape(batch, -1, *output.shape[2:])
            if output.ndim == 3
            else output.reshape(batch, -1, *output.shape[1:])[:, 0]
        )
    if isinstance(output, dict):  # a ModelOutput
        return type(output)(**{name: _unfold(value, batch) for name, value in output.items()})
    return tuple(_unfold(value, batch) for value in output)


def _report_cut(lengths: list[int], limit: int) -> None:
    """Say how many captions were longer than the limit, whenever a longer one turns up."""
    run = SESSION.run
    if run is None or max(lengths, default=0) <= limit:
        return
    count, longest = SESSION.cut
    count += sum(length > limit for length in lengths)
    if max(lengths) > longest:
        longest = max(lengths)
        warn(
            f"captions longer than --max_token_length {limit}, and cut there, so far: {count}; the longest "
            f"has {longest} tokens"
        )
    SESSION.cut = (count, longest)
