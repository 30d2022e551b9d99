"""sdxl-fixes buckets: kohya's TOML, folders and metadata.jsonl, and everything that can be wrong with them."""

import json
import sys

import alphabet
import numpy as np
import pytest
from PIL import Image

from sdxl_fixes.buckets_report import report
from sdxl_fixes.cli import main
from sdxl_fixes.dataset import Dataset, Sample, read


def refuse(constant):
    raise AssertionError(f"{constant} is not strict JSON")


@pytest.fixture
def tokenizer(tmp_path):
    return alphabet.write(tmp_path / "tokenizer")


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for n in range(24):
        Image.new("RGB", [(64, 64), (96, 64)][n % 2]).save(folder / f"{n:02}.png")
        (folder / f"{n:02}.txt").write_text("x" * (20 if n % 4 < 2 else 100))
    return folder


def call(capsys, *words):
    status = main(["buckets", *map(str, words)])
    out = capsys.readouterr()
    return status, out.out, out.err


def test_folder_before_and_after(images, tokenizer, capsys):
    status, out, _ = call(capsys, images, "--tokenizer", tokenizer, "--batch_size", "6", "--json")
    (found,) = json.loads(out, parse_constant=refuse)
    assert status == 0 and found["samples"] == found["draws"] == 24 and found["problems"] == []
    assert found["chunk_counts"] == {"1": 12, "2": 12} and found["sizes"] == [12, 12]
    assert found["padded"]["chunks"] == 3 and found["padded"]["padding"] == 0.5
    assert found["aspect"]["chunks"] > 1.8 and found["chunked"]["chunks"] == 1.5 and found["chunked"]["padding"] == 0
    assert found["aspect"]["batches"] == found["chunked"]["batches"] == 4
    rows = {
        line[:50].strip(): line[50:].split() for line in call(capsys, images, "--tokenizer", tokenizer, "--batch_size", "6")[1].splitlines()
    }
    assert rows["chunks of 75 tokens that a sample costs (mean)"][0::2] == ["3.000", "1.500"]
    assert rows["share of chunks that are nothing but padding"][-2:] == ["0.0", "%"]


def test_kohyas_toml_with_subsets_repeats_and_limits(images, tokenizer, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    Image.new("RGB", (256, 64)).save(other / "wide.png")
    config = tmp_path / "set.toml"
    config.write_text(
        f"""[general]
enable_bucket = true
caption_extension = ".txt"
[[datasets]]
resolution = 64
batch_size = 3
min_bucket_reso = 32
max_bucket_reso = 128
bucket_reso_steps = 32
[[datasets.subsets]]
image_dir = {json.dumps(str(images))}
num_repeats = 2
[[datasets.subsets]]
image_dir = {json.dumps(str(other))}
class_tokens = "a wide cat"
[[datasets]]
resolution = [64, 64]
enable_bucket = false
[[datasets.subsets]]
image_dir = {json.dumps(str(other))}
"""
    )
    status, out, _ = call(capsys, config, "--tokenizer", tokenizer, "--json")
    first, second = json.loads(out)
    assert status == 0 and first["draws"] == 49 and first["batch_size"] == 3 and [128, 32] in first["resolutions"]
    assert second["resolutions"] == [[64, 64]] and second["samples"] == 1 and "no caption" in second["problems"][0]


def test_metadata_of_diffusers_and_of_kohya(images, tokenizer, tmp_path, capsys):
    (images / "metadata.jsonl").write_text('{"file_name": "00.png", "text": "a cat"}\n\n{"file_name": "01.png", "text": "a dog"}\n')
    kohya = tmp_path / "meta.jsonl"
    lines = [{"image_path": str(images / "00.png"), "caption": "a", "tags": "b"}, {"image_path": "nowhere.png", "image_size": [70, 70]}]
    kohya.write_text("\n".join(map(json.dumps, lines)))
    (dataset,) = read(images)
    assert [sample.caption for sample in dataset.samples] == ["a cat", "a dog"]
    (dataset,) = read(kohya)
    assert [(sample.size, sample.caption) for sample in dataset.samples] == [((64, 64), "a, b"), ((70, 70), "")]
    assert call(capsys, kohya, "--tokenizer", tokenizer)[0] == 0


def test_named_folders_repeat(images, tmp_path):
    images.rename(tmp_path / "set_")
    (tmp_path / "train").mkdir()
    (tmp_path / "set_").rename(tmp_path / "train" / "5_cats")
    (tmp_path / "train" / "5_cats" / "00.txt").unlink()
    (dataset,) = read(tmp_path / "train")
    assert {sample.repeats for sample in dataset.samples} == {5} and dataset.samples[0].caption == "cats"


def test_bad_files_are_named_and_nothing_else_is_lost(images, tokenizer, capsys):
    (images / "00.png").write_bytes(b"not an image")
    (images / "01.png").write_bytes((images / "03.png").read_bytes()[:40])
    (images / "02.txt").unlink()
    (images / "04.txt").write_text("")
    (images / "05.txt").write_text("y " * 10_000)
    (images / "06.png").write_bytes(b"")
    status, out, _ = call(capsys, images, "--tokenizer", tokenizer, "--json")
    (found,) = json.loads(out)
    assert status == 0 and found["samples"] == 21
    text = "\n".join(found["problems"])
    assert "00.png: unreadable, left out" in text and "01.png: unreadable, left out" in text and "06.png: unreadable, left out" in text
    assert "02.png: no caption" in text and "04.png: the caption is empty" in text and "05.png (134 chunks)" in text


def test_a_zero_size_is_left_out(tmp_path):
    file = tmp_path / "meta.jsonl"
    file.write_text(
        '{"file_name": "a.png", "image_size": [0, 5], "text": "x"}\n{"file_name": "b.png", "image_size": [5, 5], "text": "x"}\n'
    )
    (dataset,) = read(file)
    assert len(dataset.samples) == 1 and dataset.problems == [f"{tmp_path / 'a.png'}: 0 x 5 pixels, left out"]


def test_images_below_the_step_fit_no_bucket_without_upscaling(tmp_path):
    settings = {"resolution": 512, "enable_bucket": True, "bucket_no_upscale": True, "batch_size": 2}
    samples = [Sample(tmp_path / f"{n}.png", size, "a") for n, size in enumerate([(500, 300), (50, 900), (500, 310)])]
    found = report(Dataset("set", samples, settings), np.array([1, 1, 1]), 3)
    assert found.samples == 2 and found.problems == [f"{tmp_path / '1.png'}: 50 x 900 pixels fit no bucket, left out"]


def test_cache_is_written_and_used(images, tokenizer, tmp_path, capsys):
    cache = tmp_path / "counts.npz"
    first = call(capsys, images, "--tokenizer", tokenizer, "--cache", cache)
    assert cache.exists() and call(capsys, images, "--tokenizer", tokenizer, "--cache", cache) == first


def test_plot_is_a_png(images, tokenizer, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    file = tmp_path / "b.png"
    assert call(capsys, images, "--tokenizer", tokenizer, "--plot", file)[0] == 0 and file.read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.part"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "sdxl-fixes[plot]" in call(capsys, images, "--tokenizer", tokenizer, "--plot", file)[2]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("nowhere", None, "there is no "),
        ("set.toml", "[[datasets", "is not TOML"),
        ("set.toml", "[general]", "has no [[datasets]]"),
        ("set.toml", "[[datasets]]\n[[datasets.subsets]]\nimage_dir = '/nowhere'", "there is no image_dir /nowhere"),
        ("set.toml", "[[datasets]]\n[[datasets.subsets]]\nmetadata_file = 'gone.json'", "there is no metadata_file gone.json"),
        ("set.jsonl", "{}", 'line 1: expected an object with "file_name" or "image_path"'),
        ("set.jsonl", "[1]", 'line 1: expected an object with "file_name" or "image_path"'),
        ("set.jsonl", "", "holds no usable image"),
        ("set.zip", "", "is no data set"),
    ],
)
def test_wrong_sources_are_one_sentence_and_status_2(name, content, sentence, tmp_path, tokenizer, capsys):
    if content is not None:
        (tmp_path / name).write_text(content)
    status, out, error = call(capsys, tmp_path / name, "--tokenizer", tokenizer)
    assert status == 2 and not out and error.startswith("sdxl-fixes buckets: ") and sentence in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--max_token_length", "100"), "--max_token_length must be a multiple of 75, got 100"),
        (("--tokenizer", "."), "no CLIP tokenizer there, and none downloaded"),
        (("--batch_size", "0"), "batch_size must be a whole number of at least 1"),
    ],
)
def test_wrong_flags_are_one_sentence_and_status_2(words, sentence, images, tokenizer, capsys, monkeypatch):
    monkeypatch.chdir(images)
    words = words if "--tokenizer" in words else (*words, "--tokenizer", tokenizer)
    status, _, error = call(capsys, images, *words)
    assert status == 2 and sentence in error and error.count("\n") == 1


def test_missing_extras_are_named(images, tokenizer, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert 'pip install "sdxl-fixes[buckets]"' in call(capsys, images, "--tokenizer", tokenizer)[2]
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert 'read with Pillow: pip install "sdxl-fixes[buckets]"' in call(capsys, images, "--tokenizer", tokenizer)[2]
