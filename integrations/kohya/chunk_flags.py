"""The flags of chunk buckets, and those of kohya's that they depend on."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from sdxl_fixes.flags import FlagError, read_values
from sdxl_fixes.prompts import CHUNK

LAYOUTS = ("75n+2", "77n")
FLAGS: dict[str, dict[str, Any]] = {
    "chunk_buckets": dict(
        action="store_true",
        help="batch prompts of equal length (in chunks of 75 tokens) and pad none to --max_token_length, "
        "which stays the limit",
    ),
    "chunk_layout": dict(
        choices=LAYOUTS,
        help="what the U-Net is given for n chunks: 75n+2 vectors (kohya's own, default), or 77n, BOS and "
        "EOS in every chunk (the UIs')",
    ),
}


@dataclass(frozen=True)
class Options:
    """What ``--chunk_buckets`` means in a run."""

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
            raise FlagError(
                "--chunk_buckets knows kohya's own data sets, not one of --dataset_class: leave "
                "one of them out"
            )
        if length <= CHUNK or length % CHUNK:
            raise FlagError(
                "--chunk_buckets needs --max_token_length 150 or 225, the most that a prompt may have, got "
                f"{length}: "
                f"at {CHUNK} every prompt is one chunk already"
            )
        cached, weighted = (
            bool(getattr(args, "cache_text_encoder_outputs", False)),
            bool(getattr(args, "weighted_captions", False)),
        )
        return cls(length // CHUNK, layout or LAYOUTS[0], cached, weighted)
