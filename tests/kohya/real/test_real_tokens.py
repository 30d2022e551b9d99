"""Tokens and text encoding under --chunk_buckets against sd-scripts' own classes, in this process. Set
SD_SCRIPTS to run these."""

import gzip
import importlib.util
import json
import random
import sys
import types
from pathlib import Path

import alphabet
import checkouts
import pytest
import torch
from test_real_trainer import assets, pytestmark  # noqa: F401  (fixtures)

from sdxl_fixes.prompts import encode
from sdxl_fixes.token_counts import count_chunks

if checkouts.named():
    sys.path.insert(0, str(checkouts.first()))
FOLDERS = ("openai_clip-vit-large-patch14", "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k")


@pytest.fixture(scope="module", params=["bytes", "clip"])
def vocabulary(request, assets, tmp_path_factory):  # noqa: F811
    """Tokenizers in kohya's folders: of bytes, and of CLIP's real vocabulary, which open_clip_torch brings
    along."""
    if request.param == "bytes":
        return str(assets / "tokenizers")
    found = importlib.util.find_spec("open_clip")
    if found is None:
        pytest.skip("CLIP's vocabulary comes with open_clip_torch")
    lines = (
        gzip.decompress((Path(found.origin).parent / "bpe_simple_vocab_16e6.txt.gz").read_bytes())
        .decode()
        .split("\n")
    )
    merges = lines[1 : 49152 - 256 - 2 + 1]
    folder = tmp_path_factory.mktemp("clip")
    for name in FOLDERS:
        alphabet.write(folder / name)
        letters = list(json.loads((folder / name / "vocab.json").read_text(encoding="utf-8")))[:512]
        tokens = [
            *letters,
            *("".join(merge.split()) for merge in merges),
            "<|startoftext|>",
            "<|endoftext|>",
        ]
        (folder / name / "vocab.json").write_text(
            json.dumps({token: n for n, token in enumerate(tokens)}), encoding="utf-8"
        )
        (folder / name / "merges.txt").write_text(
            "#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8"
        )
    return str(folder)


@pytest.fixture(scope="module")
def tokenizing(vocabulary):
    """Upstream's tokenize strategy at 225 tokens and ours."""
    from library.strategy_sdxl import SdxlTokenizeStrategy

    from sdxl_fixes.kohya.datasets import ChunkTokenizeStrategy

    return [kind(225, vocabulary) for kind in (SdxlTokenizeStrategy, ChunkTokenizeStrategy)]


@pytest.fixture(scope="module")
def strategies(assets):  # noqa: F811
    """Upstream's tokenize strategy at 225 tokens and ours, its encoding strategy, and tiny text encoders."""
    import tiny
    from library.strategy_sdxl import SdxlTextEncodingStrategy, SdxlTokenizeStrategy
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    from sdxl_fixes.kohya.datasets import ChunkTokenizeStrategy

    torch.manual_seed(0)
    models = [
        CLIPTextModel(tiny.text_config("te1")).eval(),
        CLIPTextModelWithProjection(tiny.text_config("te2")).eval(),
    ]
    upstream, ours = (
        kind(225, str(assets / "tokenizers")) for kind in (SdxlTokenizeStrategy, ChunkTokenizeStrategy)
    )
    return upstream, ours, SdxlTextEncodingStrategy(), models


@pytest.fixture
def layout(monkeypatch):
    """Switch the fix on as a run would."""
    from sdxl_fixes.kohya.chunk_flags import Options
    from sdxl_fixes.kohya.run import SESSION

    def choose(name):
        options = Options(limit=3, layout=name, cached=False, weighted=False)
        monkeypatch.setattr(SESSION, "run", types.SimpleNamespace(on={"buckets"}, options=options))

    return choose


def captions():
    rng = random.Random(3)
    return ["", "a" * 75, "a" * 76, "a" * 150, "b" * 151, "c" * 400] + [
        " ".join("".join(rng.choices("abc,.d", k=rng.randint(1, 9))) for _ in range(rng.randint(0, 40)))
        for _ in range(30)
    ]


def test_tokens_are_upstreams_without_the_empty_chunks(strategies):
    upstream, ours, *_ = strategies
    for text in captions():
        mine, theirs = ours.tokenize(text), upstream.tokenize(text)
        count = ours.chunks_of(text, False)
        assert count == min(3, count_chunks(ours.tokenizer1, [text])[0]) and mine[0].shape == (
            1,
            count,
            77,
        )
        for a, b in zip(mine, theirs, strict=True):
            assert torch.equal(a, b[:, :count]) and (count == 1 or a[0, -1, 1] != 49407)
        (ids, weights), (their_ids, their_weights) = (
            ours.tokenize_with_weights(f"({text}:1.5)"),
            upstream.tokenize_with_weights(f"({text}:1.5)"),
        )
        for a, b in zip((*ids, *weights), (*their_ids, *their_weights), strict=True):
            assert torch.equal(a, b[:, : a.shape[1]])


EOS, BOS = "<|endoftext|>", "<|startoftext|>"
BORDERS = [0, 1, 74, 75, 76, 149, 150, 151, 224, 225, 226]


def hostile_captions():
    """Special tokens in the text, other scripts, nothing at all, and every border between chunks."""
    yield from (
        "",
        " ",
        "\t\n ",
        "\u3000",
        EOS,
        BOS,
        EOS * 3,
        f"{EOS} a",
        f"a{EOS}b",
        "<|ENDOFTEXT|>",
        "<|endoftext|",
        "&amp;" * 60,
    )
    yield from (
        "\N{GRINNING FACE}" * 30,
        "\N{CJK UNIFIED IDEOGRAPH-732B}" * 80,
        "\N{CJK UNIFIED IDEOGRAPH-732B} " * 160,
        "\0" * 100,
    )
    yield from (
        "!" * 400,
        "! " * 151,
        "a " * 3000,
        "(a:1.3)",
        "((a:1.3))" * 40,
        "[a]" * 80,
        "(" * 80,
        "\\(a\\) " * 50,
        "(a:" * 40,
    )
    for length in BORDERS:
        words = "a " * max(0, length - 1)
        yield from (
            words + "a",
            words + EOS,
            words + BOS,
            words + f"({EOS}:1.3)",
            EOS * length,
            f"{EOS} " * length,
            words + "!",
        )
        yield from (EOS + words, "a " * 75 + EOS * max(0, length - 75), "!" * length + EOS, words + "!" * 90)
    rng = random.Random(5)
    pieces = [
        "a",
        " ",
        EOS,
        BOS,
        "!",
        "\N{GRINNING FACE}",
        ",",
        "(",
        ")",
        ":1.3)",
        "[",
        "]",
        "\\",
        "\n",
        "don't",
        "&amp;",
        "\xe9",
    ]
    for _ in range(150):
        yield "".join(rng.choices(pieces, k=rng.randint(0, 240)))


def test_no_text_is_taken_for_padding(tokenizing):
    """What is counted, what is tokenized and what the tokenizer makes of the whole caption: the same number
    of chunks."""
    upstream, ours = tokenizing
    texts = list(hostile_captions())
    counts = count_chunks(ours.tokenizer1, texts)
    for text, counted in zip(texts, counts, strict=True):
        tokens = len(ours.tokenizer1(text, truncation=False, verbose=False).input_ids) - 2
        count = min(3, max(1, -(-tokens // 75)))
        assert ours.chunks_of(text, False) == min(3, counted) == count, text
        for mine, theirs in zip(ours.tokenize(text), upstream.tokenize(text), strict=True):
            assert torch.equal(mine, theirs[:, :count]), text


def test_no_emphasized_text_is_taken_for_padding(tokenizing):
    """The parts of a prompt are tokenized one by one, as upstream parses them: there every token has a part's
    weight."""
    upstream, ours = tokenizing
    for text in hostile_captions():
        text = f"({text}:1.25)"  # every weight but padding's differs from 1
        (ids, weights), count = upstream.tokenize_with_weights(text), ours.chunks_of(text, True)
        if not any(sign in text[1:-6] for sign in "()[]\\:"):
            used = (weights[0][0, :, 1:-1] == 1.25).any(dim=1).nonzero()
            assert count == (int(used[-1]) + 1 if len(used) else 1), text
        mine, my_weights = ours.tokenize_with_weights(text)
        for a, b in zip((*mine, *my_weights), (*ids, *weights), strict=True):
            assert torch.equal(a, b[:, :count]), text
        assert not (weights[0][:, count:] != 1).any(), text


def test_a_batch_is_as_long_as_its_longest_prompt(strategies):
    upstream, ours, *_ = strategies
    batch = ["a", "b" * 100, "c"]
    assert ours.tokenize(batch)[0].shape == (3, 2, 77)
    assert torch.equal(ours.tokenize(batch)[1], upstream.tokenize(batch)[1][:, :2])


def test_a_caption_padded_to_its_batch_mates_is_what_the_tokenizer_makes_of_it(strategies):
    """Upstream stacks unequal captions by rows of zeros, which would be 77 times the token "!"."""
    from sdxl_fixes.kohya.datasets import _fill

    upstream, ours, *_ = strategies
    whole = upstream.tokenize("abc")
    for ids, expected, tokenizer in zip(
        ours.tokenize("abc"), whole, (ours.tokenizer1, ours.tokenizer2), strict=True
    ):
        padded = torch.nn.functional.pad(ids, (0, 0, 0, 2))
        _fill(padded, tokenizer)
        assert torch.equal(padded, expected)


@torch.no_grad()
def test_77n_is_the_cores_encoding_and_75n2_is_upstreams(strategies, layout):
    from sdxl_fixes.kohya import prompts

    _, ours, encoding, models = strategies
    original = type(encoding)._get_hidden_states_sdxl
    ids = ours.tokenize(["a" * 100, "b" * 140])
    arguments = (encoding, *ids, ours.tokenizer1, ours.tokenizer2, *models)
    layout("77n")
    first, second, pooled = prompts.hidden_states(original, *arguments)
    context, expected_pooled = encode(*ids, *models)
    torch.testing.assert_close(torch.cat([first, second], dim=-1), context)
    torch.testing.assert_close(pooled, expected_pooled)
    layout("75n+2")
    plain = prompts.hidden_states(original, *arguments)
    for mine, theirs in zip(plain, original(*arguments), strict=True):
        assert torch.equal(mine, theirs)
    assert plain[0].shape[1] == 152 and first.shape[1] == 154
    torch.testing.assert_close(
        first[:, :76], plain[0][:, :76]
    )  # the same vectors, but for the EOS and BOS between
    torch.testing.assert_close(first[:, 78:], plain[0][:, 76:])


@torch.no_grad()
def test_emphasis_weighs_the_vectors_of_its_tokens_in_both_layouts(strategies, layout, monkeypatch):
    from sdxl_fixes.kohya import prompts

    _, ours, encoding, models = strategies
    kind = type(encoding)
    original, hidden = kind.encode_tokens_with_weights, kind._get_hidden_states_sdxl
    monkeypatch.setattr(
        kind,
        "_get_hidden_states_sdxl",
        lambda *args, **kwargs: prompts.hidden_states(hidden, *args, **kwargs),
    )
    ids, weights = ours.tokenize_with_weights("a" * 70 + " (" + "b" * 20 + ":1.5)")
    outputs = {}
    for name in ("77n", "75n+2"):
        layout(name)
        outputs[name] = prompts.encode_with_weights(original, encoding, ours, models, ids, weights)
    for ui, kohya in zip(outputs["77n"][:2], outputs["75n+2"][:2], strict=True):
        torch.testing.assert_close(ui[:, :76], kohya[:, :76])
        torch.testing.assert_close(ui[:, 78:], kohya[:, 76:])
    layout("77n")
    bare = prompts.hidden_states(hidden, encoding, *ids, ours.tokenizer1, ours.tokenizer2, *models)[0]
    ratio = (outputs["77n"][0] / bare)[0].mean(dim=-1)
    assert ratio[71:76].tolist() == pytest.approx([1.5] * 5) and ratio[78:93].tolist() == pytest.approx(
        [1.5] * 15
    )
    assert (
        ratio[:71].tolist() == pytest.approx([1] * 71)
        and ratio[93:].tolist() == pytest.approx([1] * 61)
        and ratio[76:78].tolist() == [1, 1]
    )
