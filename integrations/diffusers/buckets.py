"""Batches of captions that have equally many chunks. The scripts crop every image to one square, so there is
one aspect bucket."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np

from sdxl_fixes.buckets import ChunkBucketBatchSampler
from sdxl_fixes.errors import FixError
from sdxl_fixes.log import world_size
from sdxl_fixes.prompts import CHUNK
from sdxl_fixes.token_counts import count_chunks

from .prompts import COLUMN
from .run import SESSION


def loader(original: Callable[..., None], self: Any, dataset: Any, *args: Any, **kwargs: Any) -> None:
    """The script's shuffled loader, with our batches in its place: as many, every sample once per epoch."""
    run = SESSION.run
    if (
        run is None
        or not kwargs.get("shuffle")
        or "batch_size" not in kwargs
        or not SESSION.called_by_script()
    ):
        return original(self, dataset, *args, **kwargs)
    SESSION.reached("buckets")
    chunks = _chunks(dataset, run.args)
    sampler = ChunkBucketBatchSampler(
        np.zeros(len(chunks), dtype=np.int64),
        chunks,
        batch_size=kwargs.pop("batch_size"),
        seed=run.args.seed or 0,
        rank=None,
        world_size=world_size(),
    )
    del kwargs["shuffle"]
    original(self, dataset, *args, batch_sampler=sampler, **kwargs)


def prepare(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """accelerate deals our batches out to the processes as they are, instead of filling them up to one
    size."""
    settings = getattr(self, "dataloader_config", self)  # older accelerates hold it themselves
    settings.even_batches = False
    return original(self, *args, **kwargs)


def _chunks(dataset: Any, args: argparse.Namespace) -> Any:
    """Chunks of every caption: beside its cached embeddings, or counted."""
    columns = getattr(dataset, "column_names", None) or ()
    if COLUMN in columns:
        return np.asarray(list(dataset.with_format(None)[COLUMN]))
    if getattr(args, "caption_column", None) not in columns:
        raise FixError("--chunk_buckets finds no captions in this script's data set: leave it out")
    captions = list(dataset.with_format(None)[args.caption_column])
    if not all(isinstance(caption, str) for caption in captions):
        raise FixError(
            f"--caption_column {args.caption_column} holds several captions per image, of which the script "
            "draws one later: "
            "leave --chunk_buckets out"
        )
    from transformers import CLIPTokenizer

    where: dict[str, Any] = {"subfolder": "tokenizer", "revision": getattr(args, "revision", None)}
    counts = count_chunks(
        CLIPTokenizer.from_pretrained(args.pretrained_model_name_or_path, **where), captions
    )
    return np.minimum(counts, -(-args.max_token_length // CHUNK))
