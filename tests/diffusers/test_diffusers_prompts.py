"""Captions that hold CLIP's special tokens literally, in chunks, under both of SDXL's ways to pad: both
encoders keep the same chunks."""

import argparse
import itertools

import pytest
import torch
from alphabet import write as write_tokenizer

from sdxl_fixes.diffusers import prompts
from sdxl_fixes.diffusers.run import SESSION

END, LIMIT = "<|endoftext|>", 225
# chunks, whole or not
PARTS = {
    "w": 75 * "a ",
    "ws": "a a ",
    "e": 75 * END,
    "es": END,
    "!": 75 * "! ",
    "e!": END + 74 * "! ",
    "!e": "! " + END,
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    from transformers import CLIPTokenizer

    folder = tmp_path_factory.mktemp("tokenizers")
    for name, pad in (("eos", END), ("zero", "!")):
        write_tokenizer(folder / name, pad)
    loaded = [CLIPTokenizer.from_pretrained(folder / name) for name in ("eos", "zero")]
    assert [t.pad_token_id for t in loaded] == [49407, 0] and [t.eos_token_id for t in loaded] == [49407] * 2
    return loaded


@pytest.fixture
def tokenize(monkeypatch):
    """tokenize(tokenizer, captions) -> ids [B, 77 n] as the script gets them, for a run of three chunks."""
    monkeypatch.setattr(SESSION, "run", argparse.Namespace(args=argparse.Namespace(max_token_length=LIMIT)))
    monkeypatch.setattr(SESSION, "called_by_script", lambda: True)
    return lambda tokenizer, captions: prompts.tokenize(
        type(tokenizer).__call__, tokenizer, captions, padding="max_length"
    )["input_ids"]


class Encoder:
    """Gives back what it is asked to encode."""

    config = argparse.Namespace(max_position_embeddings=77)

    def __call__(self, ids):
        return (ids[:, :, None],)


def captions():
    """Every caption of up to three such parts, none of which ends within a chunk but the last."""
    whole = [part for name, part in PARTS.items() if name in ("w", "e", "!", "e!")]
    for length in range(3):
        for head in itertools.product(whole, repeat=length):
            yield from ("".join(head) + last for last in ("", *PARTS.values()))


def said(tokenizer, caption):
    """Chunks until the last that holds another token than EOS, at least 1, counted from the caption's own
    ids."""
    ids = tokenizer(caption, add_special_tokens=False, truncation=False, verbose=False)["input_ids"][:LIMIT]
    return max([1, *(k // 75 + 1 for k, token in enumerate(ids) if token != tokenizer.eos_token_id)])


def test_both_encoders_keep_the_chunks_until_the_last_word(tokenizers, tokenize):
    for caption in captions():
        wanted = said(tokenizers[0], caption)
        for tokenizer in tokenizers:
            ids = tokenize(tokenizer, [caption])
            assert SESSION.chunks == [wanted], caption
            (kept,) = prompts.encode(Encoder.__call__, Encoder(), ids)
            assert torch.equal(kept[:, :, 0], ids[:, : 77 * wanted]), caption


def test_a_batch_keeps_as_many_as_its_longest_caption(tokenizers, tokenize):
    everything = list(captions())
    for first in range(0, len(everything), 7):
        batch = everything[first : first + 7]
        for tokenizer in tokenizers:
            (kept,) = prompts.encode(Encoder.__call__, Encoder(), tokenize(tokenizer, batch))
            assert kept.shape[1] == 77 * max(said(tokenizer, caption) for caption in batch)


def test_a_chunk_of_ends_between_words_stays(tokenizers, tokenize):
    for tokenizer in tokenizers:
        rows = tokenize(tokenizer, [PARTS["w"] + PARTS["e"] + "a"]).reshape(3, 77).tolist()
        assert (
            SESSION.chunks == [3]
            and rows[1][1:76] == [tokenizer.eos_token_id] * 75
            and rows[2][1] not in (0, tokenizer.eos_token_id)
        )
