"""Chunks of 75 tokens, counted exactly, by the word and from a file."""

import json
import warnings

import alphabet
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer, CLIPTokenizerFast

from sdxl_fixes import token_counts
from sdxl_fixes.prompts import SPLITS, token_ids, tokenize
from sdxl_fixes.token_counts import count_chunks, too_long


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return alphabet.write(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(
    scope="module", params=[CLIPTokenizer, CLIPTokenizerFast], ids=["CLIPTokenizer", "CLIPTokenizerFast"]
)
def tokenizer(request, folder):
    return request.param.from_pretrained(folder)


def test_counts_are_exact_at_the_borders(tokenizer):
    captions = ["", "a", "a" * 75, "a" * 76, "a" * 150, "a" * 151, "b " * 10_000]
    assert count_chunks(tokenizer, captions).tolist() == [1, 1, 1, 2, 2, 3, 134]


@settings(max_examples=300)
@given(
    st.lists(
        st.text() | st.text(alphabet=" '\",._-aA1é猫\t\n\x1c\u2003İΣß\u2019s<|endoftext|>&;"), max_size=5
    )
)
def test_counting_by_the_word_is_the_tokenizers_own_count(folder, texts):
    for kind in (CLIPTokenizer, CLIPTokenizerFast):
        tokenizer = MADE.setdefault(kind, kind.from_pretrained(folder))
        assert token_counts._Words(tokenizer).lengths(texts) == [
            len(ids) for ids in token_ids(tokenizer, texts)
        ]


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
        token_counts._Words,
        "lengths",
        lambda self, texts, own=token_counts._Words.lengths: asked.extend(texts) or own(self, texts),
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
    monkeypatch.setattr(token_counts, "_BATCH", 10)
    own, calls = token_counts._Words.lengths, []

    def interrupted(self, texts):
        calls.append(texts)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return own(self, texts)

    monkeypatch.setattr(token_counts._Words, "lengths", interrupted)
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


@pytest.mark.parametrize("split", SPLITS)
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
            count_chunks(tokenizer, captions, split, cache)
    with pytest.raises(ValueError, match=sentence):
        tokenize(tokenizer, captions, split)


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
    assert tokenize(tokenizer, []).shape == (0, 1, 77) and tokenize(tokenizer, [], count=3).shape == (
        0,
        3,
        77,
    )
    assert count_chunks(tokenizer, []).shape == (0,)


def test_unknown_split_is_refused(folder):
    with pytest.raises(ValueError, match="split must be one of none, commas, got 'words'"):
        count_chunks(CLIPTokenizer.from_pretrained(folder), ["a"], split="words")
