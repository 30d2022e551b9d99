"""The flags of chunk buckets, and those of kohya's that they depend on."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from sdxl_fixes.command_line import Flag, flag, flags_of, read_values
from sdxl_fixes.errors import FlagError
from sdxl_fixes.prompts import CHUNK

LAYOUTS = ("75n+2", "77n")


@dataclass(frozen=True)
class ChunkFlags:
    """The flags' values."""

    chunk_buckets: bool = flag(
        False,
        "batch prompts of equal length (in chunks of 75 tokens) and pad none to --max_token_length, which "
        "stays the limit",
        group="buckets",
    )
    chunk_layout: str | None = flag(
        None,
        "what the U-Net is given for n chunks: 75n+2 vectors (kohya's own), or 77n, BOS and EOS in every "
        "chunk (the UIs')",
        choices=LAYOUTS,
        group="buckets",
        unset=LAYOUTS[0],
    )


CHUNK_FLAGS = flags_of(ChunkFlags)


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
        flags = ChunkFlags(**read_values(args, CHUNK_FLAGS))
        given = read_values(args, {"max_token_length": Flag("max_token_length", int)})  # kohya's own
        length = given.get("max_token_length", CHUNK)
        if not flags.chunk_buckets:
            if flags.chunk_layout is not None:
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
                f"{length}: at {CHUNK} every prompt is one chunk already"
            )
        cached = bool(getattr(args, "cache_text_encoder_outputs", False))
        weighted = bool(getattr(args, "weighted_captions", False))
        return cls(length // CHUNK, flags.chunk_layout or LAYOUTS[0], cached, weighted)
