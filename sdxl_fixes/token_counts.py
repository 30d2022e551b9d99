"""How many chunks of 75 tokens every caption has: counted exactly, by the word, and kept in a file."""

from __future__ import annotations

import hashlib
import math
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from sdxl_fixes.atomic import replacing
from sdxl_fixes.prompts import CHUNK, check_text, comma_id, split_ids, token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = (
    "a Photo, of 3 cats' (café:1.2) \t\N{CJK UNIFIED IDEOGRAPH-732B}! https://x.y/z_w--q [1girl] &amp; "
    "\N{GRINNING FACE}don't"
)
_BATCH = 4096  # captions per call of the tokenizer


def count_chunks(
    tokenizer: PreTrainedTokenizerBase,
    captions: Sequence[str],
    split: str = "none",
    cache: Path | None = None,
    progress: bool = False,
) -> NDArray[np.int32]:
    """Exact number of chunks of every caption, int32 from 1, shape [N].

    ``cache`` is a file that keeps the counts, of any number of tokenizers, so that millions of captions are
    tokenized once; it is written as a whole or not at all. ``progress`` shows a bar.
    Captions are looked up by a 64-bit hash: among ten million, one is wrong with a chance of 3 in a million,
    and costs one batch some padding.
    """
    check_text(captions)
    comma = comma_id(tokenizer, split)
    ids_of = _Words(tokenizer)

    def measure(texts: Sequence[str]) -> list[int]:
        if comma is None:
            return [max(1, math.ceil(length / CHUNK)) for length in ids_of.lengths(texts)]
        return [len(split_ids(ids, comma)) for ids in token_ids(tokenizer, texts)]

    if cache is None:
        counts = [
            measure(captions[first : first + _BATCH])
            for first in tqdm(range(0, len(captions), _BATCH), "counting tokens", disable=not progress)
        ]
        return np.array([count for part in counts for count in part], dtype=np.int32)
    return _from_cache(Path(cache), _identity(tokenizer) + split.encode(), captions, measure, progress)


def too_long(counts: NDArray[Any], limit: int, names: Sequence[str] | None = None) -> str | None:
    """A sentence that says which captions exceed ``limit`` chunks, or None if none does."""
    over = np.flatnonzero(np.asarray(counts) > limit)
    if not len(over):
        return None
    worst = over[np.argsort(-np.asarray(counts)[over], kind="stable")][:3]
    shown = ", ".join(f"{names[k] if names else f'number {k}'} ({counts[k]} chunks)" for k in worst)
    return (
        f"{len(over)} of {len(counts)} captions {'is' if len(over) == 1 else 'are'} longer than "
        f"{limit} chunks ({limit * CHUNK} tokens), "
        f"and what is beyond is not trained: {shown}{', ...' if len(over) > 3 else ''}"
    )


class _Words:
    """Token counts by the word: no token of CLIP's crosses a space, so a caption has the sum of its words'
    tokens, and words recur.

    With ftfy installed the slow CLIPTokenizer first mends whole texts, which leaves plain ASCII as it is;
    other texts it is given whole, and every text a tokenizer that fails the probe.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer, self._known = tokenizer, {"": 0}
        probe = _PROBE.replace("&", "+").encode("ascii", "replace").decode() if self._mends() else _PROBE
        probe = "".join(c for c in probe if c.isprintable())
        whole, words = token_ids(tokenizer, [probe])[0], token_ids(tokenizer, probe.split(" "))
        self._apart = [token for ids in words for token in ids] == whole

    def _mends(self) -> bool:
        return getattr(self._tokenizer, "fix_text", None) is not None

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Number of tokens of every text."""
        mends = self._mends()
        apart = [
            self._apart and (not mends or (text.isascii() and text.isprintable() and "&" not in text))
            for text in texts
        ]
        words = [text.split(" ") if by_word else [] for text, by_word in zip(texts, apart, strict=True)]
        if len(self._known) > 1_000_000:
            self._known = {"": 0}
        new = list({word for text in words for word in text} - self._known.keys())
        self._known.update(zip(new, map(len, token_ids(self._tokenizer, new)), strict=True))
        whole = iter(
            token_ids(
                self._tokenizer, [text for text, by_word in zip(texts, apart, strict=True) if not by_word]
            )
        )
        return [
            sum(map(self._known.__getitem__, text)) if by_word else len(next(whole))
            for text, by_word in zip(words, apart, strict=True)
        ]


def _identity(tokenizer: PreTrainedTokenizerBase) -> bytes:
    """What tells tokenizers apart: the vocabulary, and what they make of a text full of special cases."""
    digest = hashlib.blake2b(digest_size=16)
    for token, number in sorted(tokenizer.get_vocab().items()):
        digest.update(f"{token}\0{number}\0".encode())
    digest.update(repr(token_ids(tokenizer, [_PROBE])[0]).encode())
    return digest.digest()


def _from_cache(
    file: Path,
    identity: bytes,
    captions: Sequence[str],
    measure: Callable[[Sequence[str]], list[int]],
    progress: bool,
) -> NDArray[np.int32]:
    known, known_counts = _read(file)
    hashes = np.empty(len(captions), np.uint64)
    for k, caption in enumerate(captions):
        hashes[k] = int.from_bytes(
            hashlib.blake2b(caption.encode(errors="surrogatepass"), digest_size=8, key=identity).digest(),
            "little",
        )
    place = np.searchsorted(known, hashes)
    found = np.zeros(len(captions), bool)
    found[place < len(known)] = known[place[place < len(known)]] == hashes[place < len(known)]
    counts = np.zeros(len(captions), np.int32)
    counts[found] = known_counts[place[found]]
    new = np.flatnonzero(~found)
    try:
        for first in tqdm(range(0, len(new), _BATCH), "counting tokens", disable=not progress):
            part = new[first : first + _BATCH]
            counts[part] = measure([captions[k] for k in part])
    finally:  # what an interrupted run has counted is kept
        done = new[counts[new] > 0]
        if len(done):
            merged, first_of = np.unique(np.concatenate([known, hashes[done]]), return_index=True)
            _write(file, merged, np.concatenate([known_counts, counts[done]])[first_of])
    return counts


def _read(file: Path) -> tuple[NDArray[np.uint64], NDArray[np.int32]]:
    if not file.exists():
        return np.empty(0, np.uint64), np.empty(0, np.int32)
    try:
        with np.load(file, allow_pickle=False) as content:
            hashes, counts = content["sdxl_fixes_caption_hashes"], content["chunk_counts"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{file} is no cache of chunk counts ({error}): give another file, or delete it if it is one"
        ) from error
    return hashes, counts


def _write(file: Path, hashes: NDArray[np.uint64], counts: NDArray[np.int32]) -> None:
    with replacing(file) as partial, open(partial, "wb") as out:
        np.savez(out, sdxl_fixes_caption_hashes=hashes, chunk_counts=counts)
