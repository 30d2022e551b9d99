"""examples/bigasp: prompts by counting, ranks against a known order, the store bit for bit and killed."""

import collections
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import alphabet
import numpy as np
import pytest
import torch

from sdxl_fixes.buckets import ChunkBucketBatchSampler

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "bigasp"
ROW = {
    "caption": "a red circle on a blue ground",
    "tags": ["red_circle", "blue_background", "simple", "flat_colour", "no_humans", "one_object", "indoors"],
    "source": "flickr",
    "watermarks": [],
    "score": 9,
}


@pytest.fixture
def module(monkeypatch):
    """module(name, *packages) imports a script of the example, or skips where packages are missing."""
    monkeypatch.syspath_prepend(str(EXAMPLE))

    def load(name, *packages):
        for package in packages:
            pytest.importorskip(package, reason=f"{package}: see examples/bigasp/requirements.txt")
        return __import__(name)

    yield load
    for name in ("prompt", "rank", "latents", "encode", "loader", "made", "formats"):
        sys.modules.pop(name, None)


def share(count, of, expected):
    """Whether a count is within 4.5 standard deviations of what is expected."""
    return abs(count - of * expected) < 4.5 * math.sqrt(of * expected * (1 - expected))


# ------------------------------------------------------------------ prompts


def test_prompts_have_the_published_odds(module):
    prompts, count = module("prompt").Prompts(seed=3), 20_000
    drawn = [prompts.draw(ROW, epoch=k % 5, index=k) for k in range(count)]
    full = [text for text in drawn if text]
    assert share(count - len(full), count, 0.05)
    tags = [re.findall(r"score[_ ]\d(?:[_ ]up)?", text) for text in full]
    scored = [found for found in tags if found]
    assert share(len(full) - len(scored), len(full), 0.1)
    for number, odds in ((1, 3 / 6), (2, 2 / 6), (3, 1 / 6)):
        assert share(sum(len(found) == number for found in scored), len(scored), odds)
    each = collections.Counter(name for found in scored for name in found)
    total = each.total()
    assert share(sum(n for name, n in each.items() if " " in name), total, 0.2)
    plain = {name.replace(" ", "_") for name in each}
    assert plain == {"score_9", *(f"score_{n}_up" for n in range(1, 10))}  # all that apply, and none besides
    assert all(share(each[name] + each[name.replace("_", " ")], total, 0.1) for name in plain)
    assert share(sum(ROW["caption"] not in text for text in full), len(full), 0.1)


def test_a_prompt_is_a_function_of_seed_epoch_and_index_in_any_process(module):
    prompt = module("prompt")
    here = [prompt.Prompts(1).draw(ROW, 2, k) for k in range(50)]
    assert [prompt.Prompts(1).draw(ROW, 2, k) for k in reversed(range(50))][::-1] == here
    assert (
        [prompt.Prompts(1).draw(ROW, 3, k) for k in range(50)]
        != here
        != [prompt.Prompts(2).draw(ROW, 2, k) for k in range(50)]
    )
    code = f"import prompt; print([prompt.Prompts(1).draw({ROW!r}, 2, k) for k in range(50)])"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(EXAMPLE)}
    there = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert there.stdout.strip() == repr(here)


def test_tag_prompts_are_subsets_with_aliases_and_always_say_the_watermark(module):
    prompt = module("prompt")
    row = {**ROW, "watermarks": [[0.8, 0.9, 1, 1]]}
    odds, other = prompt.Odds(empty=0, unscored=1, tags=1), {"simple": ["plain"]}
    drawn = [prompt.Prompts(0, odds, other).draw(row, 0, k) for k in range(4000)]
    words = [[tag.strip().replace(" ", "_") for tag in text.split(",")] for text in drawn]
    known = {*row["tags"], "flickr", "watermark", "plain"}
    assert all({*tags} <= known and len(tags) == 5 and "watermark" in tags for tags in words)
    seen = collections.Counter(tag for tags in words for tag in tags)
    assert share(seen["plain"], seen["plain"] + seen["simple"], 0.2)
    assert share(seen["flickr"], len(words), 4 / 8)  # beside the watermark, 4 of 8
    assert {"red_circle", "red circle"} <= {tag.strip() for text in drawn for tag in text.split(",")}


def test_watermark_sentences_say_where(module):
    prompt = module("prompt")
    for box, where in (
        ([0.8, 0.9, 1, 1], "bottom right corner"),
        ([0, 0, 0.2, 0.1], "top left corner"),
        ([0.4, 0.9, 0.6, 1], "bottom side"),
        ([0.4, 0.4, 0.6, 0.6], "centre"),
    ):
        assert prompt.watermark([[0, 0, 0.01, 0.01], box]) == f"There is a watermark in the {where}."
    odds = prompt.Odds(empty=0, unscored=1, tags=0)
    text = prompt.Prompts(0, odds).draw({**ROW, "watermarks": [[0, 0, 1, 0.1]]}, 0, 0)
    assert text == ROW["caption"] + ". There is a watermark in the top side."


def test_the_captioner_is_asked_for_the_published_kinds_and_lengths(module):
    prompt, count = module("prompt"), 20_000
    kinds, words = zip(*(prompt.caption_request(0, k) for k in range(count)), strict=True)
    for kind, odds in (
        ("Descriptive", 0.6),
        ("Training Prompt", 0.2),
        ("MidJourney", 0.1),
        ("Descriptive, informal", 0.1),
    ):
        assert share(kinds.count(kind), count, odds)
    normal = statistics.NormalDist(45, 30)
    below = normal.cdf(0.5)  # rounds to 0
    mean = 45 + 30 * statistics.NormalDist().pdf(-44.5 / 30) / (1 - below)
    assert min(words) >= 1 and abs(statistics.mean(words) - mean) < 4.5 * 30 / math.sqrt(count)
    for limit in (20, 45, 80):
        expected = (normal.cdf(limit + 0.5) - below) / (1 - below)
        assert share(sum(n <= limit for n in words), count, expected)


def test_batches_have_equal_chunks_of_the_prompts_that_are_drawn(module, tmp_path):
    from transformers import CLIPTokenizer

    alphabet.write(tmp_path / "tokenizer")
    tokenizer, prompts = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer"), module("prompt").Prompts(0)
    rows = [{**ROW, "caption": "words " * (k % 30), "score": k % 9 + 1} for k in range(300)]
    sampler = ChunkBucketBatchSampler(
        np.arange(300) % 3,
        lambda epoch: prompts.chunks(rows, tokenizer, epoch),
        batch_size=8,
        leftovers="smaller",
    )
    counts = set()
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for batch in sampler:
            ids = tokenizer([prompts.draw(rows[k], epoch, k) for k in batch], add_special_tokens=False)[
                "input_ids"
            ]
            found = {min(3, max(1, math.ceil(len(each) / 75))) for each in ids}
            assert len(found) == 1
            counts |= found
    assert counts == {1, 2, 3}


# ------------------------------------------------------------------ ranking


def test_the_arena_recovers_a_known_order(module):
    rank = module("rank", "pandas", "transformers")
    quality = torch.linspace(-1, 1, 300)[torch.randperm(300, generator=torch.Generator().manual_seed(0))]

    def judge(a, b):
        return (a - b).squeeze(1)

    ratings = rank.arena(judge, quality.reshape(-1, 1), rounds=400, seed=0)
    assert ratings.mean() == pytest.approx(1500)  # what one wins another loses
    assert rank.spearman(ratings, quality.numpy()) > 0.99
    found = rank.bins(ratings)
    assert {*found.tolist()} == {*range(10)} and found[quality.argmax()] >= 8 and found[quality.argmin()] <= 1
    edges = np.linspace(ratings.min(), ratings.max(), 11)
    assert (found == np.clip(np.digitize(ratings, edges) - 1, 0, 9)).all()


def test_what_another_run_left_is_not_gone_on_with_or_removed(module, tmp_path, monkeypatch):
    pandas = pytest.importorskip("pandas", reason="pandas: see examples/bigasp/requirements.txt")
    rank, made = module("rank", *PACKAGES, "transformers"), module("made", *PACKAGES)
    encode, formats = module("encode", *PACKAGES), module("formats", *PACKAGES)
    for script, name in ((rank, "Eye"), (encode, "plan"), (made, "pictures")):
        monkeypatch.setattr(script, name, lambda *_: pytest.fail("it begins"))
    pairs, table, out = tmp_path / "pairs", tmp_path / "table", tmp_path / "out"
    pandas.DataFrame({"winner": ["a"], "loser": ["b"]}).to_parquet(pairs)
    pandas.DataFrame({"path": ["a"]}).to_parquet(table)
    (out / "pictures").mkdir(parents=True), (out / "mds").mkdir(), (out / "bins.html").write_text("")
    ranked = ("--pairs", pairs, "--table", table, "--output", out, "--vision", "none")
    encoded = ("--table", table, "--output", out, "--model", "none")
    for script, flags, sentence in (
        (rank, ranked, "out holds bins.html of another run"),
        (rank, (*ranked, "--pairs", table), "--pairs .*table lacks the column.* loser, winner"),
        (rank, (*ranked, "--table", tmp_path / "gone"), "--table .*gone: there is no such file"),
        (rank, (*ranked, "--rounds", 0), "--rounds 0: expected 1 or more"),
        (encode, (*encoded, "--part", 0), "--part 0: expected 1 or more"),
        (encode, (*encoded, "--table", pairs), "--table .*pairs lacks the column path"),
        (encode, (*encoded, "--table", tmp_path / "gone"), "--table .*gone: there is no such file"),
        (made, ("--folder", out), "out holds pictures of another run"),
    ):
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, flags)])
        with pytest.raises(SystemExit, match=sentence):
            script.main()
    monkeypatch.setattr(formats, "plain_files", formats.mds)
    with pytest.raises(SystemExit, match="mds exists, and is removed in the end"):
        formats.stores(out, 1)
    assert (out / "mds").exists()


def test_a_game_moves_elo_as_the_formula_says(module):
    rank = module("rank", "pandas", "transformers")
    ratings = rank.arena(lambda a, b: (a - b).squeeze(1), torch.tensor([[0.0], [1.0]]), rounds=2, seed=0)
    # the ring of two is played both ways, each for the ratings before the round; a later game counts a fifth
    won = 2 * 10 * 0.5
    won += 2 * 10 * 0.2 * (1 - 1 / (1 + 10 ** (-2 * won / 400)))
    assert ratings.tolist() == pytest.approx([1500 - won, 1500 + won])


def test_the_classifier_changes_its_sign_when_the_pictures_change_places(module):
    rank = module("rank", "pandas", "transformers")
    classifier = rank.Classifier(6).eval()
    a, b = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(classifier(a, b), -classifier(b, a))
    assert classifier(a, a).abs().max() == 0


# ------------------------------------------------------------------ the store


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_packed_latents_come_back_to_the_last_bit_and_near_their_entropy(module, dtype):
    latents = module("latents", "streaming", "zstandard")
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).reshape(4, 128, 128)  # NaNs, too
    back = latents.unpack(latents.pack(every), (4, 128, 128), dtype)
    assert back.dtype == dtype and torch.equal(back.view(torch.int16), every.view(torch.int16))
    usual = torch.randn(4, 128, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    planes = usual.view(torch.uint8).reshape(-1, 2).numpy().T
    shares = [np.bincount(plane, minlength=256) / len(plane) for plane in planes]
    bound = sum(-(p[p > 0] * np.log2(p[p > 0])).sum() for p in shares) / 8 * usual.numel()
    packed = latents.pack(usual)
    assert bound < len(packed) < 1.02 * bound < 0.87 * usual.nbytes
    assert torch.equal(latents.unpack(packed, usual.shape, dtype), usual)


def test_a_latent_that_its_dtype_cannot_hold_is_refused(module, tmp_path):
    latents = module("latents", "streaming", "zstandard")
    wide = latents.Encoded(0, "a.png", 8, 8, 0, 0, torch.full((4, 2, 2), 70_000.0))
    with pytest.raises(ValueError, match=r"a\.png: its latent is not finite in fp16"):
        latents.write(tmp_path / "fp16", [wide])
    assert latents.write(tmp_path / "bf16", [wide], "bf16") == 1


def test_a_crop_is_where_it_says(module, tmp_path):
    encode = module("encode", "pandas", "streaming", "zstandard")
    from PIL import Image

    x, y = np.meshgrid(np.arange(160), np.arange(96))
    Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8)).save(tmp_path / "a.png")
    buckets = np.array([(96, 96)])
    found = set()
    for row in range(20):
        image, size, left, top = encode.cropped(str(tmp_path / "a.png"), row, 0, buckets)
        assert image.size == (96, 96) and size == (160, 96) and image.getpixel((0, 0)) == (left, top, 0)
        again = encode.cropped(str(tmp_path / "a.png"), row, 0, buckets)
        assert (left, top) == again[2:]
        found.add(left)
    assert len(found) > 5 and min(found) >= 0 and max(found) <= 64
    Image.new("RGB", (48, 96)).save(tmp_path / "b.png")  # scaled by 2 to cover the width
    image, _, left, top = encode.cropped(str(tmp_path / "b.png"), 0, 0, buckets)
    assert image.size == (96, 96) and left == 0 and 0 <= top <= 96


PACKAGES = ("pandas", "streaming", "zstandard")
SMALL = ("--area", "16384", "--bucket_step", "32", "--min_side", "64", "--max_side", "256")


def encoding(folder, store, *more, **options):
    command = [
        sys.executable,
        "-W",
        "ignore",
        str(EXAMPLE / "encode.py"),
        "--table",
        str(folder / "pictures.parquet"),
    ]
    command += ["--model", str(folder / "model"), "--output", str(store), "--part", "6", *SMALL, *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **options.pop("env", {})}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finished(process):
    output, _ = process.communicate(timeout=600)
    return process.returncode, output


def content(latents, store):
    samples = latents.Latents(store)
    return {
        s.row: (s.path, s.time_ids(), s.latent.numpy().tobytes())
        for s in (samples[k] for k in range(len(samples)))
    }


@pytest.mark.slow
def test_kill_9_loses_nothing_and_repeats_nothing(module, tmp_path):
    latents, made = module("latents", *PACKAGES), module("made", *PACKAGES)
    made.pictures(tmp_path, 40)
    made.model(tmp_path / "model")
    (tmp_path / "pictures" / "000007.png").write_bytes(b"no picture")
    code, output = finished(encoding(tmp_path, tmp_path / "whole"))
    assert code == 0 and "39 latents, 1 broken" in output, output
    store = tmp_path / "parts"
    for whole in (1, 3, 5):  # killed while the next part is being written, or just after
        process = encoding(tmp_path, store)
        while process.poll() is None and not any(store.glob(f"part-{whole:05d}*")):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (store / "index.json").exists() and (store / f"part-{whole - 1:05d}").exists()
    assert finished(encoding(tmp_path, store))[0] == 0
    assert content(latents, store) == content(latents, tmp_path / "whole")
    # two processes share the parts
    both = [
        encoding(tmp_path, tmp_path / "two", env={"RANK": str(k), "WORLD_SIZE": "2", "LOCAL_RANK": "0"})
        for k in (0, 1)
    ]
    assert [finished(each)[0] for each in both] == [0, 0]
    assert content(latents, tmp_path / "two") == content(latents, tmp_path / "whole")
    code, output = finished(encoding(tmp_path, store, "--seed", "1"))
    assert code == 1 and "was begun with seed '0', now '1'" in output


def test_rows_are_the_table_s_in_the_order_that_is_asked(module, tmp_path):
    loader, file = module("loader", "pyarrow", "streaming"), tmp_path / "table.parquet"
    rows = [{**ROW, "caption": f"{k}", "tags": ["a"] * k, "watermarks": [[0.0, 0, 1, 1]]} for k in range(7)]
    parquet = loader.pyarrow.parquet
    parquet.write_table(loader.pyarrow.Table.from_pylist(rows), file, row_group_size=2)
    read = loader.Rows(parquet.read_table(file), np.array([5, 0, 5]))
    assert list(read) == [rows[5], rows[0], rows[5]] and len(read) == 3
    prompts = module("prompt").Prompts(3)
    assert [prompts.draw(read[k], 1, k) for k in range(3)] == [
        prompts.draw(rows[n], 1, k) for k, n in enumerate((5, 0, 5))
    ]


@pytest.mark.slow
def test_the_whole_example_runs_from_one_command(module, tmp_path):
    module("latents", *PACKAGES)
    environment = {**os.environ, "PYTHON": f"{sys.executable} -W ignore", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", str(EXAMPLE / "run.sh"), str(tmp_path / "run"), "300"],
        env=environment, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "run" / "ranked" / "report.json").read_text())
    assert report["pair accuracy"]["both"] > 0.65 and report["within one bin"] > 0.6
    assert report["rank correlation with the known quality"]["rating"] > 0.7
    page = (tmp_path / "run" / "ranked" / "bins.html").read_text()
    assert 'data-c="0"' in page and 'data-c="9"' in page
    scored = sum(report["pictures per score"][1:])
    assert (
        f"done: {scored} latents, 0 broken" in done.stdout and f"{scored} samples of {scored}" in done.stdout
    )
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "trained" / "log.jsonl").read_text().splitlines()
    ]
    held_out = [row["heldout/loss"] for row in rows if "heldout/loss" in row]
    assert len(held_out) > 2 and held_out[-1] < held_out[0] - 0.01
    assert (tmp_path / "run" / "trained" / "samples.html").read_text().count("<img ") >= 4
    inspected = subprocess.run(
        [sys.executable, "-m", "sdxl_fixes.cli", "inspect", max(
            (tmp_path / "run" / "trained").glob("checkpoint-*/model"), key=lambda p: int(p.parent.name[11:])
        )],
        capture_output=True, text=True,
    )  # fmt: skip
    assert inspected.returncode == 0 and "v_prediction" in inspected.stdout, (
        inspected.stdout + inspected.stderr
    )
