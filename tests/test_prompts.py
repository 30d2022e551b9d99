"""Chunks of 75 tokens: laid out as ComfyUI and Forge lay them out, encoded into 77 n
vectors."""

import itertools
import json
import os
import sys
from pathlib import Path

import alphabet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPTokenizerFast,
)

from sdxl_fixes.prompts import encode, layout, split_ids, tokenize

HERE = Path(__file__).resolve().parent
RECORDED = json.loads((HERE / "data" / "ui_prompts.json").read_text())
BOS, EOS = 49406, 49407


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return alphabet.write(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(
    scope="module", params=[CLIPTokenizer, CLIPTokenizerFast], ids=["CLIPTokenizer", "CLIPTokenizerFast"]
)
def tokenizer(request, folder):
    return request.param.from_pretrained(folder)


# ---------------------------------------------------------------- chunks


@pytest.mark.parametrize("case", RECORDED["cases"], ids=lambda case: f"{len(case['ids'])} tokens")
def test_chunks_are_the_uis(case):
    """Recorded from ComfyUI's and Forge's own code by tests/uis/prompts.py."""
    plain = split_ids(case["ids"])
    count, last, last_g = case["comfyui"]
    assert (
        len(plain) == count
        and layout(plain, BOS, EOS, EOS)[-1].tolist() == last
        and layout(plain, BOS, EOS, 0)[-1].tolist() == last_g
    )
    assert layout(split_ids(case["ids"], RECORDED["comma"]), BOS, EOS, EOS).tolist() == case["forge"]


def test_recorded_cases_tell_the_layouts_apart():
    lengths = {len(case["ids"]) for case in RECORDED["cases"]}
    differ = [
        case
        for case in RECORDED["cases"]
        if split_ids(case["ids"]) != split_ids(case["ids"], RECORDED["comma"])
    ]
    assert 0 in lengths and max(lengths) > 300 and len(differ) >= 3


@given(st.lists(st.sampled_from([5, 6, 267]), max_size=400), st.sampled_from([None, 267]))
def test_chunks_lose_nothing_and_hold_75_at_most(ids, comma):
    chunks = split_ids(ids, comma)
    assert [token for chunk in chunks for token in chunk] == ids
    assert all(0 < len(chunk) <= 75 for chunk in chunks[: max(1, len(chunks) - 1)]) or ids == []
    for chunk, following in itertools.pairwise(chunks):
        assert len(chunk) == 75 or (
            comma is not None
            and chunk[-1] == comma
            and len(chunk) >= 56
            and comma not in following[: 75 - len(chunk)]
        )


def test_a_cut_moves_at_most_twenty_tokens_with_their_comma():
    def lengths(comma_at):
        ids = [5] * 100
        ids[comma_at] = 267
        return [len(chunk) for chunk in split_ids(ids, 267)]

    assert (
        lengths(54) == [75, 25]
        and lengths(55) == [56, 44]
        and lengths(74) == [75, 25]
        and lengths(75) == [75, 25]
    )


def test_empty_chunks_pad_a_caption_to_its_batch_mates():
    ids = layout([[7, 8]], BOS, EOS, 0, count=2)
    assert (
        ids.shape == (2, 77)
        and ids[0, :5].tolist() == [BOS, 7, 8, EOS, 0]
        and ids[1, :3].tolist() == [BOS, EOS, 0]
    )
    with pytest.raises(ValueError, match="3 chunks of 75 tokens and 2 are allowed"):
        layout([[1], [2], [3]], BOS, EOS, 0, count=2)


def test_each_encoder_pads_by_its_own_rule(folder):
    first, second = CLIPTokenizer.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    second.pad_token_id = 0  # as SDXL's second tokenizer has it
    ids, ids_2 = (tokenize(t, ["ab", "c" * 80]) for t in (first, second))
    assert ids.shape == ids_2.shape == (2, 2, 77)
    assert ids[0, 0, 3:].tolist() == [EOS] * 74 and ids_2[0, 0, 3:5].tolist() == [EOS, 0]
    assert ids[1, 0, [0, 76]].tolist() == [BOS, EOS] and torch.equal(
        ids[1], ids_2[1].where(ids_2[1] > 0, torch.tensor(EOS))
    )


@pytest.mark.skipif(
    "COMFYUI" not in os.environ,
    reason="set COMFYUI to a checkout of ComfyUI (and install its requirements) to run",
)
def test_random_prompts_are_token_for_token_comfyuis(monkeypatch):
    sys.path.insert(0, str(HERE / "uis"))
    monkeypatch.setattr(sys, "argv", sys.argv[:1])
    import prompts as ui

    cut, folder = ui.comfyui()
    first, second = CLIPTokenizer.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    second.pad_token_id = 0
    for text in ui.texts(200, seed=5):
        rows, rows_g = cut(text)
        assert tokenize(first, [text])[0].tolist() == rows and tokenize(second, [text])[0].tolist() == rows_g
    if "FORGE" in os.environ:
        cut = ui.forge(first)
        for text in ui.texts(200, seed=6):
            assert tokenize(first, [text], split="commas")[0].tolist() == cut(text)


# ---------------------------------------------------------------- encoding


@pytest.fixture(scope="module")
def encoders():
    torch.manual_seed(0)
    common = dict(
        vocab_size=49408,
        intermediate_size=16,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=0,
        eos_token_id=2,
    )
    first = CLIPTextModel(CLIPTextConfig(hidden_size=8, num_hidden_layers=3, **common))
    second = CLIPTextModelWithProjection(
        CLIPTextConfig(hidden_size=16, projection_dim=12, num_hidden_layers=2, **common)
    )
    return first.eval(), second.eval()


@torch.no_grad()
def test_context_is_every_chunks_77_vectors_and_the_first_chunks_pooled_output(encoders):
    rows = torch.randint(0, 49000, (2, 3, 77), generator=torch.Generator().manual_seed(1))
    rows[..., 0], rows[..., 50] = BOS, EOS
    context, pooled = encode(rows, rows, *encoders)
    assert context.shape == (2, 231, 24) and pooled.shape == (2, 12)
    for sample in range(2):
        for chunk in range(3):
            alone, own = encode(
                rows[sample : sample + 1, chunk : chunk + 1],
                rows[sample : sample + 1, chunk : chunk + 1],
                *encoders,
            )
            torch.testing.assert_close(context[sample, 77 * chunk : 77 * chunk + 77], alone[0])
            assert torch.allclose(pooled[sample], own[0], atol=1e-6) == (chunk == 0)
    first = encoders[0](rows[0], output_hidden_states=True)
    torch.testing.assert_close(context[0, :77, :8], first.hidden_states[-2][0])
    assert not torch.allclose(context[0, :77, :8], first.last_hidden_state[0])  # no last layer, no final norm
    eos = encoders[1](rows[:1, 0])
    torch.testing.assert_close(pooled[0], eos.text_embeds[0])


def test_encoding_needs_both_tokenizers_ids(encoders):
    with pytest.raises(ValueError, match=r"shape \[B, n, 77\]; got \[1, 2, 77\] and \[1, 3, 77\]"):
        encode(torch.zeros(1, 2, 77, dtype=int), torch.zeros(1, 3, 77, dtype=int), *encoders)
