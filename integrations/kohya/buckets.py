"""Kohya's data sets and tokens by prompt chunks: what ``--chunk_buckets`` puts in their place, in the main process.

What runs in DataLoader workers is in worker.py: subclasses, which spawn keeps.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sdxl_fixes.flags import FlagError, read_values
from sdxl_fixes.prompts import CHUNK

from .run import SESSION

LAYOUTS = ("75n+2", "77n")
FLAGS: dict[str, dict[str, Any]] = {
    "chunk_buckets": dict(
        action="store_true",
        help="batch prompts of equal length (in chunks of 75 tokens) and pad none to --max_token_length, which stays the limit",
    ),
    "chunk_layout": dict(
        choices=LAYOUTS,
        help="what the U-Net is given for n chunks: 75n+2 vectors (kohya's own, default), or 77n, BOS and EOS in every chunk (the UIs')",
    ),
}


@dataclass(frozen=True)
class Options:
    """The flags of kohya's that chunk buckets depend on."""

    limit: int  # chunks
    layout: str
    cached: bool  # text-encoder outputs, of the captions as they are
    weighted: bool

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Options | None:
        """None without ``--chunk_buckets``. Raises FlagError for flags that leave nothing to do."""
        given = read_values(args, {**FLAGS, "max_token_length": dict(type=int)})
        layout, length = given.get("chunk_layout"), given.get("max_token_length", CHUNK)
        if not given.get("chunk_buckets"):
            if layout is not None:
                raise FlagError("--chunk_layout needs --chunk_buckets: give both, or leave it out")
            return None
        if getattr(args, "dataset_class", None):
            raise FlagError("--chunk_buckets knows kohya's own data sets, not one of --dataset_class: leave one of them out")
        if length <= CHUNK or length % CHUNK:
            raise FlagError(
                f"--chunk_buckets needs --max_token_length 150 or 225, the most that a prompt may have, got {length}: "
                f"at {CHUNK} every prompt is one chunk already"
            )
        cached, weighted = bool(getattr(args, "cache_text_encoder_outputs", False)), bool(getattr(args, "weighted_captions", False))
        return cls(length // CHUNK, layout or LAYOUTS[0], cached, weighted)


def on() -> Options | None:
    """The options if the fix is on, which also counts it as reached."""
    run = SESSION.on("buckets")
    return None if run is None else Options.from_args(run.args)


def datasets(original: Callable[..., Any], dataset_group_blueprint: Any, *args: Any, **kwargs: Any) -> Any:
    """The data sets of our own classes: batches of equal aspect and chunks, planned anew every epoch."""
    options = on()
    if options is None:
        return original(dataset_group_blueprint, *args, **kwargs)
    from library import config_util, strategy_base

    from . import worker

    strategy_base.TokenizeStrategy.get_strategy().__class__ = worker.ChunkTokenizeStrategy
    worker.OPTIONS, worker.MADE[:] = options, []
    names = ("DreamBoothDataset", "FineTuningDataset")
    upstream = [getattr(config_util, name) for name in names]
    try:
        config_util.DreamBoothDataset, config_util.FineTuningDataset = worker.ChunkDreamBoothDataset, worker.ChunkFineTuningDataset
        return original(dataset_group_blueprint, *args, **kwargs)
    finally:
        config_util.DreamBoothDataset, config_util.FineTuningDataset = upstream


def collator(original: Callable[..., None], self: Any, epoch: Any, step: Any, dataset: Any, *args: Any, **kwargs: Any) -> None:
    """Upstream tells a data set of the new epoch after the epoch's first batch; ours read it themselves, before."""
    original(self, epoch, step, dataset, *args, **kwargs)
    if SESSION.on("buckets"):
        from . import worker

        for made in worker.MADE:
            made.epoch_now = epoch
