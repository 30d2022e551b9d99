"""Encoding of prompts whose number of chunks differs from batch to batch: 77n layout, caches, previews. In
the main process only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import buckets


def hidden_states(
    original: Callable[..., Any],
    self: Any,
    input_ids1: torch.Tensor,
    input_ids2: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Upstream's for 75n+2; for 77n its own encoding of single chunks, put side by side, pooled output of the
    first."""
    options = buckets.on()
    batch, count = input_ids1.shape[:2]
    if options is None or options.layout != "77n" or count == 1:
        return original(self, input_ids1, input_ids2, *args, **kwargs)
    single = (ids.reshape(batch * count, 1, -1) for ids in (input_ids1, input_ids2))
    first, second, pooled = original(self, *single, *args, **kwargs)
    return *(states.reshape(batch, -1, states.shape[-1]) for states in (first, second)), pooled.reshape(
        batch, count, -1
    )[:, 0]


def encode_with_weights(
    original: Callable[..., Any],
    self: Any,
    tokenize_strategy: Any,
    models: list[Any],
    tokens_list: list[torch.Tensor],
    weights_list: list[torch.Tensor],
) -> Any:
    """Upstream's for 75n+2; for 77n every vector, BOS and EOS included (their weights are 1), has its weight
    where it stands."""
    options = buckets.on()
    if options is None or options.layout != "77n":
        return original(self, tokenize_strategy, models, tokens_list, weights_list)
    first, second, pooled = self.encode_tokens(tokenize_strategy, models, tokens_list)
    weights = [weights.reshape(len(first), -1, 1).to(first.device) for weights in weights_list]
    return [first * weights[0], second * weights[1], pooled]


def cache_outputs(
    original: Callable[..., None],
    self: Any,
    tokenize_strategy: Any,
    models: list[Any],
    text_encoding_strategy: Any,
    infos: list[Any],
) -> None:
    """Captions of equal chunks at a time, so that what is cached of one does not depend on which others were
    cached with it."""
    if buckets.on() is None:
        return original(self, tokenize_strategy, models, text_encoding_strategy, infos)
    groups: dict[int, list[Any]] = {}
    for info in infos:
        groups.setdefault(tokenize_strategy.chunks_of(info.caption, self.is_weighted), []).append(info)
    for group in groups.values():
        original(self, tokenize_strategy, models, text_encoding_strategy, group)


def preview(
    original: Callable[..., Any],
    self: Any,
    prompt: Any,
    negative_prompt: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Prompt and negative prompt get the chunks of the longer one: the pipeline puts them into one batch."""
    if buckets.on() is None:
        return original(self, prompt, negative_prompt, *args, **kwargs)
    from library import strategy_base

    strategy = strategy_base.TokenizeStrategy.get_strategy()
    texts = [
        text
        for given in (prompt, negative_prompt or "")
        for text in ([given] if isinstance(given, str) else given)
    ]
    strategy.least = max(strategy.chunks_of(text, True) for text in texts)
    try:
        return original(self, prompt, negative_prompt, *args, **kwargs)
    finally:
        strategy.least = 1
