"""Prompts longer than CLIP's 75 tokens: chunks of 75, counted exactly, laid out and encoded as the UIs do it
at generation.

A chunk is BOS, up to 75 tokens, EOS, padding: 77 ids. The U-Net gets the hidden states of all chunks one
after the other, 77 n vectors with every chunk's BOS and EOS, and the pooled output of the first (ComfyUI,
A1111, Forge). ``split="none"`` cuts after 75 tokens, as ComfyUI does; ``split="commas"`` moves a tag that a
cut would part to the next chunk, as A1111 and Forge do. Emphasis, embeddings and BREAK are prompt syntax of
the UIs; a training caption is plain text.
"""

from __future__ import annotations

import hashlib
import math
import reprlib
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sdxl_fixes.atomic import replacing
from sdxl_fixes.names import CHUNK as CHUNK
from sdxl_fixes.names import SPLITS
from sdxl_fixes.progress import bar

COMMA_REACH = 20  # tokens that may move to the next chunk with their comma; A1111's default
_PROBE = (
    "a Photo, of 3 cats' (café:1.2) \t\N{CJK UNIFIED IDEOGRAPH-732B}! https://x.y/z_w--q [1girl] &amp; "
    "\N{GRINNING FACE}don't"
)
_BATCH = 4096  # captions per call of the tokenizer


def token_ids(tokenizer: Any, captions: Sequence[str]) -> list[list[int]]:
    """Every caption's token ids, without BOS and EOS and never cut. Raises ValueError for a caption that is
    no text or, where the tokenizer does not mend it, has half a surrogate pair."""
    if not captions:
        return []
    _check_text(captions)
    try:
        encoded = tokenizer(
            list(captions), add_special_tokens=False, truncation=False, padding=False, verbose=False
        )
    except (TypeError, UnicodeEncodeError) as error:
        halves = (caption for caption in captions if any("\ud800" <= c <= "\udfff" for c in caption))
        if (half := next(halves, None)) is None:
            raise
        raise ValueError(
            f"a caption has half a surrogate pair, which is no Unicode: {reprlib.repr(half)}"
        ) from error
    return list(encoded["input_ids"])


def _check_text(captions: Sequence[Any]) -> None:
    wrong = [caption for caption in captions if not isinstance(caption, str)]
    if wrong:
        raise ValueError(f"a caption must be text, got {reprlib.repr(wrong[0])}")


def split_ids(ids: Sequence[int], comma: int | None = None) -> list[list[int]]:
    """One caption's ids in chunks of at most 75, at least one. ``comma`` is the comma's id, for
    ``split="commas"``: a chunk that is full ends after its last comma if that is among its last 20 tokens."""
    chunks: list[list[int]] = []
    rest = list(ids)
    # the first tokens of a chunk are not looked at: they came from the chunk before, or are the one that did
    # not fit in it
    kept = 0
    while len(rest) > CHUNK:
        end = CHUNK
        if comma is not None and rest[CHUNK] != comma:
            last = next((k for k in range(CHUNK - 1, kept - 1, -1) if rest[k] == comma), None)
            if last is not None and CHUNK - last <= COMMA_REACH:
                end = last + 1
        chunks.append(rest[:end])
        rest, kept = rest[end:], max(1, CHUNK - end)
    return [*chunks, rest] if rest or not chunks else chunks


def layout(
    chunks: Sequence[Sequence[int]], bos: int, eos: int, pad: int, count: int | None = None
) -> torch.Tensor:
    """A caption's chunks as ids, int64, shape [n, 77]: BOS, tokens, EOS, ``pad``; ``count`` appends empty
    chunks to that many. Raises ValueError if there are more chunks already: nothing is cut in silence."""
    wanted = len(chunks) if count is None else count
    if len(chunks) > wanted:
        raise ValueError(
            f"the caption has {len(chunks)} chunks of {CHUNK} tokens and {wanted} are allowed: "
            "shorten it or allow more"
        )
    rows = [[bos, *chunk, eos] for chunk in (*chunks, *([[]] * (wanted - len(chunks))))]
    return torch.tensor([row + [pad] * (CHUNK + 2 - len(row)) for row in rows], dtype=torch.int64)


def tokenize(
    tokenizer: Any, captions: Sequence[str], split: str = "none", count: int | None = None
) -> torch.Tensor:
    """Ids of a batch of captions, int64, shape [B, n, 77], n the most chunks among them (or ``count``). SDXL
    needs it twice: its first tokenizer pads with EOS, its second (CLIP-G) with 0, as their ``pad_token_id``
    says."""
    chunks = [split_ids(ids, comma_id(tokenizer, split)) for ids in token_ids(tokenizer, captions)]
    wanted = max(map(len, chunks), default=1) if count is None else count
    if not chunks:
        return torch.empty((0, wanted, CHUNK + 2), dtype=torch.int64)
    return torch.stack(
        [
            layout(c, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, wanted)
            for c in chunks
        ]
    )


def encode(
    ids: torch.Tensor, ids_2: torch.Tensor, text_encoder: Any, text_encoder_2: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """What SDXL's U-Net gets: the context, shape [B, 77 n, width 1 + width 2], of both encoders' last hidden
    states but one (without the final norm), and the pooled output of chunk 0, shape [B, width 2]. ``ids`` and
    ``ids_2`` are :func:`tokenize`'s, shape [B, n, 77]."""
    batch, count, length = ids.shape
    if ids.shape != ids_2.shape or length != CHUNK + 2:
        raise ValueError(
            f"need the ids of both tokenizers, shape [B, n, {CHUNK + 2}]; got "
            f"{list(ids.shape)} and {list(ids_2.shape)}"
        )
    states = []
    for each, encoder in ((ids, text_encoder), (ids_2, text_encoder_2)):
        output = encoder(
            each.reshape(batch * count, length).to(encoder.device),
            output_hidden_states=True,
            return_dict=True,
        )
        states.append(output.hidden_states[-2].reshape(batch, count * length, -1))
    pooled: torch.Tensor = output.text_embeds.reshape(batch, count, -1)[:, 0]
    return torch.cat(states, dim=-1), pooled


def count_chunks(
    tokenizer: Any,
    captions: Sequence[str],
    split: str = "none",
    cache: Path | None = None,
    progress: bool = False,
) -> NDArray[np.int32]:
    """Exact number of chunks of every caption, int32 from 1, shape [N].

    ``cache`` is a file that keeps the counts, of any number of tokenizers, so that millions of captions are
    tokenized once; it is written as a whole or not at all. ``progress`` shows a bar where tqdm is installed.
    Captions are looked up by a 64-bit hash: among ten million, one is wrong with a chance of 3 in a million,
    and costs one batch some padding.
    """
    _check_text(captions)
    comma = comma_id(tokenizer, split)
    ids_of = _Words(tokenizer)

    def measure(texts: Sequence[str]) -> list[int]:
        if comma is None:
            return [max(1, math.ceil(length / CHUNK)) for length in ids_of.lengths(texts)]
        return [len(split_ids(ids, comma)) for ids in token_ids(tokenizer, texts)]

    if cache is None:
        counts = [
            measure(captions[first : first + _BATCH])
            for first in bar(range(0, len(captions), _BATCH), "counting tokens", progress)
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
        f"{len(over)} of {len(counts)} captions are longer than {limit} chunks ({limit * CHUNK} tokens), "
        f"and what is beyond is not trained: {shown}{', ...' if len(over) > 3 else ''}"
    )


def comma_id(tokenizer: Any, split: str) -> int | None:
    """The id that ``split`` cuts at; None for ``"none"``. Raises ValueError for an unknown split."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    return None if split == "none" else int(token_ids(tokenizer, [","])[0][-1])


class _Words:
    """Token counts by the word: no token of CLIP's crosses a space, so a caption has the sum of its words'
    tokens, and words recur.

    With ftfy installed the slow CLIPTokenizer first mends whole texts, which leaves plain ASCII as it is;
    other texts it is given whole, and every text a tokenizer that fails the probe.
    """

    def __init__(self, tokenizer: Any) -> None:
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


def _identity(tokenizer: Any) -> bytes:
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
        for first in bar(range(0, len(new), _BATCH), "counting tokens", progress):
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
