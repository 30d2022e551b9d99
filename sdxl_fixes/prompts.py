"""Prompts longer than CLIP's 75 tokens: chunks of 75, laid out and encoded as the UIs do it at generation.

A chunk is BOS, up to 75 tokens, EOS, padding: 77 ids. The U-Net gets the hidden states of all chunks one
after the other, 77 n vectors with every chunk's BOS and EOS, and the pooled output of the first (ComfyUI,
A1111, Forge). ``split="none"`` cuts after 75 tokens, as ComfyUI does; ``split="commas"`` moves a tag that a
cut would part to the next chunk, as A1111 and Forge do. Emphasis, embeddings and BREAK are prompt syntax of
the UIs; a training caption is plain text.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
from sdxl_fixes.names import CHUNK as CHUNK
from sdxl_fixes.names import SPLITS

COMMA_REACH = 20  # tokens that may move to the next chunk with their comma; A1111's default


def token_ids(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str]) -> list[list[int]]:
    """Every caption's token ids, without BOS and EOS and never cut. Raises ValueError for a caption that is
    no text or, where the tokenizer does not mend it, has half a surrogate pair."""
    if not captions:
        return []
    check_text(captions)
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


def check_text(captions: Sequence[Any]) -> None:
    wrong = [caption for caption in captions if not isinstance(caption, str)]
    if wrong:
        raise ValueError(f"a caption must be text, got {reprlib.repr(wrong[0])}")


def split_ids(ids: Sequence[int], comma: int | None = None) -> list[list[int]]:
    """One caption's ids in chunks of at most 75, at least one. ``comma`` is the comma's id, for
    ``split="commas"``: a chunk that is full ends after its last comma if that is among its last 20 tokens."""
    chunks: list[list[int]] = []
    rest = list(ids)
    while len(rest) > CHUNK:
        end = CHUNK
        if comma is not None and rest[CHUNK] != comma:
            last = next((k for k in range(CHUNK - 1, -1, -1) if rest[k] == comma), None)
            if last is not None and CHUNK - last <= COMMA_REACH:
                end = last + 1
        chunks.append(rest[:end])
        rest = rest[end:]
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
    tokenizer: PreTrainedTokenizerBase, captions: Sequence[str], split: str = "none", count: int | None = None
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


def comma_id(tokenizer: PreTrainedTokenizerBase, split: str) -> int | None:
    """The id that ``split`` cuts at; None for ``"none"``. Raises ValueError for an unknown split."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    return None if split == "none" else int(token_ids(tokenizer, [","])[0][-1])
