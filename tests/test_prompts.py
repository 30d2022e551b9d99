"""Chunks of 75 tokens: counted exactly, laid out as ComfyUI and Forge lay them out, encoded into 77 n
vectors."""

import itertools
import json
import os
import sys
import warnings
from pathlib import Path

import alphabet
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPTokenizerFast,
)

from sdxl_fixes import prompts
from sdxl_fixes.prompts import count_chunks, encode, layout, split_ids, token_ids, tokenize, too_long

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


@settings(deadline=None)
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


# ---------------------------------------------------------------- counting


def test_counts_are_exact_at_the_borders(tokenizer):
    captions = ["", "a", "a" * 75, "a" * 76, "a" * 150, "a" * 151, "b " * 10_000]
    assert count_chunks(tokenizer, captions).tolist() == [1, 1, 1, 2, 2, 3, 134]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.text() | st.text(alphabet=" '\",._-aA1é猫\t\n\x1c\u2003İΣß\u2019s<|endoftext|>&;"), max_size=5
    )
)
def test_counting_by_the_word_is_the_tokenizers_own_count(folder, texts):
    for kind in (CLIPTokenizer, CLIPTokenizerFast):
        tokenizer = MADE.setdefault(kind, kind.from_pretrained(folder))
        assert prompts._Words(tokenizer).lengths(texts) == [len(ids) for ids in token_ids(tokenizer, texts)]


MADE: dict = {}


def test_a_tokenizer_that_crosses_spaces_is_given_whole_captions(folder):
    class Pairs:
        bos_token_id, eos_token_id, pad_token_id = 1, 2, 2

        def __call__(self, texts, **options):
            return {"input_ids": [[1] * ((len(text) + 1) // 2) for text in texts]}

        def get_vocab(self):
            return {}

    assert count_chunks(Pairs(), ["x " * 75, "x " * 76]).tolist() == [1, 2]


def test_counting_warns_of_nothing(tokenizer, caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        count_chunks(tokenizer, ["a" * 300])
    assert not caplog.records


def test_cache_asks_the_tokenizer_once_and_per_tokenizer(folder, tmp_path, monkeypatch):
    tokenizer, file = CLIPTokenizer.from_pretrained(folder), tmp_path / "counts.npz"
    captions = [f"{'x' * (n % 200)} {n}" for n in range(500)]
    expected = count_chunks(tokenizer, captions)
    assert np.array_equal(count_chunks(tokenizer, captions[:300], cache=file), expected[:300])
    asked = []
    monkeypatch.setattr(
        prompts._Words,
        "lengths",
        lambda self, texts, own=prompts._Words.lengths: asked.extend(texts) or own(self, texts),
    )
    assert np.array_equal(count_chunks(tokenizer, captions, cache=file), expected) and asked == captions[300:]
    asked.clear()
    assert np.array_equal(count_chunks(tokenizer, captions[::-1], cache=file), expected[::-1]) and not asked
    vocabulary = json.loads((folder / "vocab.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    for name in ("merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
        (other / name).write_text((folder / name).read_text())
    (other / "vocab.json").write_text(json.dumps({**vocabulary, "zz</w>": 49400}))
    count_chunks(CLIPTokenizer.from_pretrained(other), captions[:10], cache=file)
    assert len(asked) == 10
    assert (
        count_chunks(tokenizer, captions[:10], split="commas", cache=file).tolist() == expected[:10].tolist()
    )
    assert [path.name for path in tmp_path.glob("*.npz*")] == ["counts.npz"]


def test_an_interrupted_count_is_kept_and_nothing_half_written_stays(folder, tmp_path, monkeypatch):
    tokenizer, file = CLIPTokenizer.from_pretrained(folder), tmp_path / "counts.npz"
    monkeypatch.setattr(prompts, "_BATCH", 10)
    own, calls = prompts._Words.lengths, []

    def interrupted(self, texts):
        calls.append(texts)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return own(self, texts)

    monkeypatch.setattr(prompts._Words, "lengths", interrupted)
    captions = [f"{'y' * n}" for n in range(100)]
    with pytest.raises(KeyboardInterrupt):
        count_chunks(tokenizer, captions, cache=file)
    counts = count_chunks(tokenizer, captions, cache=file)
    assert sum(map(len, calls[4:])) == 70 and counts.tolist() == [max(1, -(-n // 75)) for n in range(100)]
    assert [path.name for path in tmp_path.iterdir()] == ["counts.npz"]


@pytest.mark.parametrize("content", [b"", b"not a cache", b"PK\x03\x04 broken"])
def test_a_file_that_is_no_cache_is_named_and_kept(folder, tmp_path, content):
    file = tmp_path / "notes.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"notes.txt is no cache of chunk counts .*: give another file"):
        count_chunks(CLIPTokenizer.from_pretrained(folder), ["a"], cache=file)
    assert file.read_bytes() == content


def test_too_long_captions_are_named_longest_first():
    counts = np.array([1, 4, 2, 134, 3, 5])
    assert too_long(counts, 134) is None
    sentence = too_long(counts, 2, [f"{n}.txt" for n in range(6)])
    assert sentence == (
        "4 of 6 captions are longer than 2 chunks (150 tokens), and what is beyond is not trained: "
        "3.txt (134 chunks), 5.txt (5 chunks), 1.txt (4 chunks), ..."
    )
    assert "number 3 (134 chunks)" in too_long(counts, 100)


@pytest.mark.parametrize("split", prompts.SPLITS)
@pytest.mark.parametrize(
    ("captions", "sentence"),
    [
        (["a", None], "a caption must be text, got None"),
        ([["a"]], r"a caption must be text, got \['a'\]"),
    ],
)
def test_a_caption_that_is_no_text_is_refused_in_a_sentence(tokenizer, tmp_path, captions, sentence, split):
    for cache in (None, tmp_path / "counts.npz"):
        with pytest.raises(ValueError, match=sentence):
            prompts.count_chunks(tokenizer, captions, split, cache)
    with pytest.raises(ValueError, match=sentence):
        prompts.tokenize(tokenizer, captions, split)


def test_half_a_surrogate_pair_is_mended_by_the_tokenizer_or_refused_in_a_sentence(tokenizer):
    """The slow tokenizer trains such a caption (from JSON's \\ud800), so it is counted; the fast one cannot
    read it."""
    for count in (
        lambda: count_chunks(tokenizer, ["a", "b\ud800c"])[1],
        lambda: tokenize(tokenizer, ["b\ud800c"]).shape[1],
    ):
        try:
            assert count() == 1
        except ValueError as error:
            assert "half a surrogate pair, which is no Unicode: 'b\\ud800c'" in str(error)


def test_no_captions_are_a_batch_of_none(tokenizer):
    assert prompts.tokenize(tokenizer, []).shape == (0, 1, 77) and prompts.tokenize(
        tokenizer, [], count=3
    ).shape == (0, 3, 77)
    assert prompts.count_chunks(tokenizer, []).shape == (0,)


def test_unknown_split_is_refused(folder):
    with pytest.raises(ValueError, match="split must be one of none, commas, got 'words'"):
        count_chunks(CLIPTokenizer.from_pretrained(folder), ["a"], split="words")


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
