"""Kohya's data sets and tokens by prompt chunks: what ``--chunk_buckets`` puts in their place, in the main
process.

What runs in DataLoader workers is in datasets.py: subclasses, which spawn keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .chunk_flags import Options
from .run import SESSION


def on() -> Options | None:
    """The options if the fix is on."""
    run = SESSION.on("buckets")
    return None if run is None else run.options


def datasets(original: Callable[..., Any], dataset_group_blueprint: Any, *args: Any, **kwargs: Any) -> Any:
    """The data sets of our own classes: batches of equal aspect and chunks, planned anew every epoch."""
    options = on()
    if options is None:
        return original(dataset_group_blueprint, *args, **kwargs)
    from library import config_util, strategy_base

    from . import datasets

    strategy = strategy_base.TokenizeStrategy.get_strategy()
    # the trainer holds this very object and tokenizes with it, so it cannot be replaced by one of ours
    strategy.__class__, strategy.options = datasets.ChunkTokenizeStrategy, options
    SESSION.reached("buckets")
    names = ("DreamBoothDataset", "FineTuningDataset")
    upstream = [getattr(config_util, name) for name in names]
    try:
        config_util.DreamBoothDataset, config_util.FineTuningDataset = (
            datasets.ChunkDreamBoothDataset,
            datasets.ChunkFineTuningDataset,
        )
        return original(dataset_group_blueprint, *args, **kwargs)
    finally:
        config_util.DreamBoothDataset, config_util.FineTuningDataset = upstream


def collator(
    original: Callable[..., None], self: Any, epoch: Any, step: Any, dataset: Any, *args: Any, **kwargs: Any
) -> None:
    """Upstream tells a data set of the new epoch after the epoch's first batch; ours read it themselves,
    before."""
    original(self, epoch, step, dataset, *args, **kwargs)
    if SESSION.on("buckets"):
        from library import strategy_base

        strategy_base.TokenizeStrategy.get_strategy().epoch_now = epoch
