"""sdxl-fixes buckets: kohya's TOML, folders and metadata.jsonl, and everything that can be wrong with
them."""

import json
import re
import sys

import alphabet
import numpy as np
import pytest
from hostile import JSON, mutations
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from sdxl_fixes.cli import main
from sdxl_fixes.commands.buckets import as_json, report
from sdxl_fixes.training_sets.images import Dataset, Sample
from sdxl_fixes.training_sets.read import read


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
    assert (
        found["aspect"]["chunks"] > 1.8
        and found["chunked"]["chunks"] == 1.5
        and found["chunked"]["padding"] == 0
    )
    assert found["aspect"]["batches"] == found["chunked"]["batches"] == 4
    rows = {
        line[:50].strip(): line[50:].split()
        for line in call(capsys, images, "--tokenizer", tokenizer, "--batch_size", "6")[1].splitlines()
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
    assert (
        status == 0
        and first["draws"] == 49
        and first["batch_size"] == 3
        and [128, 32] in first["resolutions"]
    )
    assert (
        second["resolutions"] == [[64, 64]]
        and second["samples"] == 1
        and "no caption" in second["problems"][0]
    )


def test_metadata_of_diffusers_and_of_kohya(images, tokenizer, tmp_path, capsys):
    (images / "metadata.jsonl").write_text(
        '{"file_name": "00.png", "text": "a cat"}\n\n{"file_name": "01.png", "text": "a dog"}\n'
    )
    kohya = tmp_path / "meta.jsonl"
    lines = [
        {"image_path": str(images / "00.png"), "caption": "a", "tags": "b"},
        {"image_path": "nowhere.png", "image_size": [70, 70]},
    ]
    kohya.write_text("\n".join(map(json.dumps, lines)))
    (dataset,) = read(images)
    assert [sample.caption for sample in dataset.samples] == ["a cat", "a dog"]
    (dataset,) = read(kohya)
    assert [(sample.size, sample.caption) for sample in dataset.samples] == [
        ((64, 64), "a, b"),
        ((70, 70), ""),
    ]
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
    assert (
        "00.png: unreadable, left out" in text
        and "01.png: unreadable, left out" in text
        and ("06.png: unreadable, left out") in text
    )
    assert (
        "02.png: no caption" in text
        and "04.png: the caption is empty" in text
        and "05.png (134 chunks)" in text
    )


def test_a_zero_size_is_left_out(tmp_path):
    file = tmp_path / "meta.jsonl"
    file.write_text(
        '{"file_name": "a.png", "image_size": [0, 5], "text": "x"}\n'
        '{"file_name": "b.png", "image_size": [5, 5], "text": "x"}\n'
    )
    (dataset,) = read(file)
    assert len(dataset.samples) == 1 and dataset.problems == [f"{tmp_path / 'a.png'}: 0 x 5 pixels, left out"]


def test_images_below_the_step_fit_no_bucket_without_upscaling(tmp_path):
    settings = {"resolution": 512, "enable_bucket": True, "bucket_no_upscale": True, "batch_size": 2}
    samples = [
        Sample(tmp_path / f"{n}.png", size, "a") for n, size in enumerate([(500, 300), (50, 900), (500, 310)])
    ]
    found = report(Dataset("set", samples, settings), np.array([1, 1, 1]), 3)
    assert found.samples == 2 and found.problems == [
        f"{tmp_path / '1.png'}: 50 x 900 pixels fit no bucket, left out"
    ]


def test_cache_is_written_and_used(images, tokenizer, tmp_path, capsys):
    cache = tmp_path / "counts.npz"
    first = call(capsys, images, "--tokenizer", tokenizer, "--cache", cache)
    assert cache.exists() and call(capsys, images, "--tokenizer", tokenizer, "--cache", cache) == first


def test_plot_is_a_png(images, tokenizer, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    file = tmp_path / "b.png"
    assert call(capsys, images, "--tokenizer", tokenizer, "--plot", file)[
        0
    ] == 0 and file.read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.part"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "sdxl-fixes[plot]" in call(capsys, images, "--tokenizer", tokenizer, "--plot", file)[2]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("nowhere", None, "there is no "),
        ("set.toml", "[[datasets", "is not TOML"),
        ("set.toml", "[general]", "has no [[datasets]]"),
        (
            "set.toml",
            "[[datasets]]\n[[datasets.subsets]]\nimage_dir = '/nowhere'",
            "there is no image_dir /nowhere",
        ),
        (
            "set.toml",
            "[[datasets]]\n[[datasets.subsets]]\nmetadata_file = 'gone.json'",
            "there is no metadata_file gone.json",
        ),
        ("set.jsonl", "{}", 'line 1: expected an object with "file_name" or "image_path"'),
        ("set.jsonl", "[1]", 'line 1: expected an object with "file_name" or "image_path"'),
        ("set.jsonl", "", "holds no usable image"),
        ("set.zip", "", "is no data set"),
        ("set.toml", "general = [1]\n[[datasets]]", "general is [1]: expected a table"),
        ("set.toml", "datasets = [1]", "datasets is [1]: expected an array of tables"),
        ("set.toml", "a = " + "[" * 100_000, "is not TOML"),
        ("set.toml", "a = " + "9" * 5000, "is not TOML"),
        ("set.toml", "[[datasets]]\nsubsets = 3", "subsets is 3: expected an array of tables"),
        ("set.toml", "[[datasets]]\nsubsets = [1]", "subsets is [1]: expected an array of tables"),
        (
            "set.toml",
            "[[datasets]]\n[[datasets.subsets]]",
            "[[datasets.subsets]] 1 has neither image_dir nor metadata_file",
        ),
        *(
            (
                "set.toml",
                f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = '.'\n{line}",
                f"[[datasets.subsets]] 1: {sentence}",
            )
            for line, sentence in [
                ("metadata_file = 3", "metadata_file is 3: expected text"),
                ("class_tokens = 3", "class_tokens is 3: expected text"),
                ("caption_prefix = [1]", "caption_prefix is [1]: expected text"),
                ("enable_wildcard = 'false'", "enable_wildcard is 'false': expected true or false"),
                ("caption_extension = ''", "caption_extension is '': expected the end of a file name"),
                ("caption_extension = 'a/b'", "caption_extension is 'a/b': expected the end of a file name"),
                ("num_repeats = 'x'", "num_repeats is 'x': expected a whole number"),
                (
                    "num_repeats = 1" + "0" * 30,
                    "num_repeats is 1000000000000000000000000000000: expected a whole number",
                ),
                ("num_repeats = 0", "num_repeats is 0, and kohya leaves such a subset out"),
            ]
        ),
        ("set.toml", "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 3", "image_dir is 3: expected text"),
        ("set.jsonl", '{"file_name": 3}', "line 1: the image's name is 3: expected the path of a file"),
        (
            "set.jsonl",
            '{"file_name": "\\ud800"}',
            "line 1: the image's name is '\\ud800': expected the path of a file",
        ),
        ("set.jsonl", "[" * 100_000, "line 1: expected an object"),
        ("set.jsonl", b'{"file_name": "\xff"}', "set.jsonl is not UTF-8"),
        *(
            ("set.jsonl", '{"file_name": "a.png", ' + entry + "}", f"line 1: {sentence}")
            for entry, sentence in [
                ('"image_size": [null, 1]', "image_size is [None, 1]: expected [width, height] in pixels"),
                ('"image_size": [1e400, 1]', "image_size is [inf, 1]: expected"),
                ('"image_size": ["x", "y"]', "image_size is ['x', 'y']: expected"),
                ('"image_size": 3', "image_size is 3: expected"),
                ('"text": 3', "text is 3: expected text"),
            ]
        ),
    ],
)
def test_wrong_sources_are_one_sentence_and_status_2(name, content, sentence, tmp_path, tokenizer, capsys):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    status, out, error = call(capsys, tmp_path / name, "--tokenizer", tokenizer)
    assert (
        status == 2
        and not out
        and error.startswith("sdxl-fixes buckets: ")
        and sentence in error
        and error.count("\n") == 1
    )


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"": {}}', "m.json, '': the image's name is ''"),
        ('{"/": {}}', "m.json, '/': the image's name is '/'"),
        ('{"a": "a cat"}', "m.json, 'a' is 'a cat': expected an object"),
        ("[" * 100_000, "m.json is not JSON"),
        ("{", "m.json is not JSON"),
        ("[1]", "m.json holds a list"),
        (b"\xff", "m.json is not UTF-8"),
        ('{"a": {"tags": [3]}}', "m.json, 'a': tags is [3]: expected text"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_wrong_metadata_of_kohya_is_one_sentence(content, sentence, tmp_path, capsys):
    (tmp_path / "m.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    toml(tmp_path, image_dir=str(tmp_path), metadata_file=str(tmp_path / "m.json"))
    status, _, error = call(capsys, tmp_path / "set.toml")
    assert status == 2 and sentence in error and error.count("\n") == 1


def test_lines_end_at_line_ends_only_and_a_mark_of_byte_order_is_none(tmp_path):
    text = "a\u2028b\u0085c\u2029d"
    line = json.dumps({"file_name": "a.png", "image_size": [8, 8], "text": text}, ensure_ascii=False)
    (tmp_path / "m.jsonl").write_bytes(b"\xef\xbb\xbf" + line.encode() + b"\r\n" + line.encode())
    assert "\u2028" in line and [sample.caption for sample in read(tmp_path / "m.jsonl")[0].samples] == [
        text,
        text,
    ]


CAPTIONS = {  # .txt, options of the subset -> what kohya trains, the longest where it draws
    "first line": ("one\ntwo three\n", {}, "one"),
    "wildcard": (" one\n\n two three \n", {"enable_wildcard": True}, "two three"),
    "alternatives": ("a {cat|large dog} {{b}}", {"enable_wildcard": True}, "a large dog {b}"),
    "no alternatives": ("a {cat|large dog}", {}, "a {cat|large dog}"),
    "around": ("one\ntwo", {"caption_prefix": "p", "caption_suffix": "s"}, "p one s"),
    "around lines": (
        "one\ntwo",
        {"caption_prefix": "pre", "caption_suffix": "s", "enable_wildcard": True},
        "pre one",
    ),
    "around nothing": (None, {"caption_prefix": "p"}, "p "),
    "around tokens": (None, {"class_tokens": "cat", "caption_suffix": "s"}, "cat s"),
}


def toml(folder, **options):
    lines = [
        f"{key} = {json.dumps(value)}" for key, value in {"caption_extension": ".txt", **options}.items()
    ]
    heads = ["[[datasets]]", "resolution = 64", "[[datasets.subsets]]"]
    (folder / "set.toml").write_text("\n".join([*heads, *lines]))
    return folder / "set.toml"


@pytest.mark.parametrize("case", CAPTIONS)
def test_captions_are_counted_as_kohya_trains_them(case, tmp_path):
    text, options, expected = CAPTIONS[case]
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    if text is not None:
        (tmp_path / "a.txt").write_text(text)
    (dataset,) = read(toml(tmp_path, image_dir=str(tmp_path), **options))
    assert [sample.caption for sample in dataset.samples] == [expected]
    assert dataset.problems == (
        [f"{tmp_path / 'a.png'}: no caption, it trains with 'p ' alone"] if case == "around nothing" else []
    )


@pytest.mark.parametrize(
    ("entry", "options", "expected"),
    [
        ({"caption": "one\ntwo", "tags": "t"}, {}, "one"),
        ({"caption": "one", "tags": "t"}, {"caption_prefix": "p"}, "p one,t"),
        ({"caption": "one\ntwo three", "tags": "t\nu"}, {"enable_wildcard": True}, "two three,t,u"),
    ],
)
def test_metadata_is_counted_as_kohya_trains_it(entry, options, expected, tmp_path):
    (tmp_path / "m.json").write_text(json.dumps({"a.png": {**entry, "image_size": [8, 8]}}))
    (dataset,) = read(
        toml(tmp_path, image_dir=str(tmp_path), metadata_file=str(tmp_path / "m.json"), **options)
    )
    assert [sample.caption for sample in dataset.samples] == [expected]


def test_of_diffusers_captions_every_line_counts_and_of_a_list_the_longest(tmp_path):
    lines = [{"file_name": "a.png", "image_size": [8, 8], "text": text} for text in ("a\nb", ["a", "a cat"])]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert [sample.caption for sample in read(tmp_path / "m.jsonl")[0].samples] == ["a\nb", "a cat"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"bucket_reso_steps": 0}, "bucket_reso_steps is 0: expected a whole number in 8..16384"),
        ({"bucket_reso_steps": 12}, "bucket_reso_steps is 12: expected a multiple of 8"),
        ({"bucket_reso_steps": 0, "bucket_no_upscale": True}, "bucket_reso_steps is 0: expected"),
        ({"bucket_no_upscale": "x"}, "bucket_no_upscale is 'x': expected true or false"),
        ({"enable_bucket": "false"}, "enable_bucket is 'false': expected true or false"),
        ({"batch_size": [2]}, "batch_size is [2]: expected a whole number"),
        ({"batch_size": "x"}, "batch_size is 'x': expected a whole number"),
        ({"resolution": "512"}, "resolution is '512': expected a whole number"),
        ({"resolution": [512]}, "resolution is [512]: expected a whole number or [width, height]"),
        ({"resolution": [512, 1e400]}, "resolution is inf: expected a whole number"),
        ({"min_bucket_reso": 32}, "min_bucket_reso is 32: expected a whole number in 64..1024"),
        (
            {"max_bucket_reso": 10**12},
            "max_bucket_reso is 1000000000000: expected a whole number in 64..16384",
        ),
    ],
)
def test_wrong_settings_are_named(settings, sentence, tmp_path):
    settings = {"resolution": 1024, "enable_bucket": True, **settings}
    with pytest.raises(ValueError, match=re.escape(f"set: {sentence}")):
        report(Dataset("set", [Sample(tmp_path / "a.png", (64, 64), "a")], settings), np.array([1]), 3)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("vocab.json", "{"),
        ("vocab.json", "[" * 100_000),
        ("tokenizer.json", "{}"),
        ("special_tokens_map.json", "[1]"),
        ("tokenizer_config.json", '{"model_max_length": "x"}'),
    ],
)
def test_a_broken_tokenizer_is_one_sentence(file, content, images, tokenizer, capsys):
    (tokenizer / file).write_text(content)
    status, _, error = call(capsys, images, "--tokenizer", tokenizer)
    assert status in (0, 2) and "Traceback" not in error
    if status:
        assert f"--tokenizer {tokenizer}: no CLIP tokenizer there" in error and len(error) < 700


def test_a_name_that_is_no_unicode_is_escaped_in_the_table(images, tokenizer, capsys):
    try:
        (images / "b\udcff\n.png").write_bytes(b"no image")
    except OSError:
        pytest.skip("this file system takes no such name")
    status, out, _ = call(capsys, images, "--tokenizer", tokenizer)
    assert status == 0 and f"{images}/b\\udcff\\n.png: unreadable, left out" in out


ENTRY = {
    "text": "a",
    "tags": "b",
    "image_size": [8, 8],
    "file_name": "a.png",
    "image_path": "a.png",
    "caption": "c",
}
SETTINGS = {
    "resolution": [64, 64],
    "enable_bucket": True,
    "bucket_no_upscale": False,
    "bucket_reso_steps": 8,
    "min_bucket_reso": 16,
    "max_bucket_reso": 128,
    "batch_size": 2,
}
SUBSET = {
    "image_dir": ".",
    "metadata_file": "m.json",
    "num_repeats": 2,
    "class_tokens": "a",
    "caption_prefix": "p",
}
SUBSET |= {"caption_suffix": "s", "caption_extension": ".txt", "enable_wildcard": True}
TOMLS = [
    {"general": SETTINGS, "datasets": [{"batch_size": 3, "subsets": [SUBSET]}]},
    {"datasets": [{**SETTINGS, "subsets": [SUBSET, SUBSET]}]},
]
METADATA = [{"a.png": ENTRY, "b": {"image_size": [8, 9]}}]


def refused(path):
    """The sentence that ``path`` is refused with; None if its report is made."""
    try:
        for dataset in read(path):
            as_json([report(dataset, np.ones(len(dataset.samples), int), 3)])
    except (ValueError, OSError) as error:
        assert "\n" not in str(error) and path.parent.name in str(error), error
        return str(error)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(mutations(TOMLS), mutations(METADATA) | JSON, st.booleans())
def test_any_toml_and_any_metadata_is_a_report_or_a_sentence(tmp_path, toml, metadata, good):
    (tmp_path / "m.json").write_text(json.dumps(METADATA[0] if good else metadata))
    content = json.loads(json.dumps(toml).replace('"m.json"', json.dumps(str(tmp_path / "m.json"))))
    (tmp_path / "set.toml").touch()
    # TOML's tables are JSON's objects: what follows never sees the text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "sdxl_fixes.training_sets.read.load_toml",
            lambda path: content if isinstance(content, dict) else {},
        )
        refused(tmp_path / "set.toml")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.lists(mutations([ENTRY]) | JSON, max_size=3))
def test_any_jsonl_is_a_report_or_a_sentence(tmp_path, entries):
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, entries)))
    refused(tmp_path / "m.jsonl")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.binary() | st.text().map(str.encode), st.sampled_from(["x.toml", "x.jsonl"]))
def test_any_bytes_are_refused_in_a_sentence(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    assert refused(tmp_path / name)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--max_token_length", "100"), "--max_token_length must be a multiple of 75, got 100"),
        (("--tokenizer", "."), "no CLIP tokenizer there, and none downloaded"),
        (("--batch_size", "0"), "batch_size must be a whole number of at least 1"),
        (
            ("--batch_size", "9" * 30),
            "--batch_size must be a whole number of at least 1 and at most 1000000, got 999",
        ),
        (("--world_size", "9" * 30), "--world_size must be a whole number"),
        (("--seed", "9" * 30), "--seed must be a whole number"),
        (("--max_token_length", "75" + "0" * 30), "--max_token_length must be a multiple of 75"),
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


def test_of_kohyas_folder_only_kohyas_pictures_count_and_what_stops_it_is_named(tmp_path):
    for name in ("a.png", "b.PNG", "c.Png", "d.gif", ".e.png", "f.png", "a_b_g_1_2_3_4.png"):
        Image.new("RGB", (64, 64)).save(tmp_path / name, "PNG")
    (tmp_path / "a.txt").write_bytes(b"")
    (tmp_path / "b.txt").write_bytes("caf\xe9".encode("cp1252"))
    (tmp_path / "a_b_g.txt").write_text("a face, cut out")
    (dataset,) = read(toml(tmp_path, image_dir=str(tmp_path), num_repeat=2))
    assert [(sample.image.name, sample.caption) for sample in dataset.samples] == [
        ("a_b_g_1_2_3_4.png", "a face, cut out"),
        ("f.png", ""),
    ]
    stops = [problem for problem in dataset.problems if "kohya stops" in problem]
    assert len(stops) == 3 and "num_repeat is no key" in stops[0] and "did you mean num_repeats?" in stops[0]
    assert "a.txt: it is empty" in stops[1] and "b.txt: it is not UTF-8" in stops[2]
    left = [problem for problem in dataset.problems if "takes no such file" in problem]
    assert [problem.split(":")[0].rpartition("/")[2] for problem in left] == ["c.Png", "d.gif"]


def test_regularisation_images_repeat_up_to_the_training_images(tmp_path):
    # kohya's own counts (sd-scripts 0.11.1): 7 training draws; 2 regularisation images of 2 repeats get
    # 2 and 2, then one more each until 7
    for name, count in (("train", 7), ("reg", 2)):
        (tmp_path / name).mkdir()
        for number in range(count):
            Image.new("RGB", (64, 64)).save(tmp_path / name / f"{number}.png")
    subsets = [
        {"image_dir": str(tmp_path / "train"), "class_tokens": "t"},
        {"image_dir": str(tmp_path / "reg"), "class_tokens": "r", "is_reg": True, "num_repeats": 2},
    ]
    (tmp_path / "set.json").write_text(json.dumps({"datasets": [{"resolution": 64, "subsets": subsets}]}))
    (dataset,) = read(tmp_path / "set.json")
    assert [sample.repeats for sample in dataset.samples] == [1] * 7 + [4, 3] and dataset.problems == []
    # ... and of 3 of 5 repeats two are enough: the third is not trained
    Image.new("RGB", (64, 64)).save(tmp_path / "reg" / "2.png")
    subsets[1]["num_repeats"] = 5
    (tmp_path / "set.json").write_text(json.dumps({"datasets": [{"resolution": 64, "subsets": subsets}]}))
    assert [sample.repeats for sample in read(tmp_path / "set.json")[0].samples] == [1] * 7 + [5, 5]


# as kohya's own process_caption makes them (tests/kohya/real/test_real_counts.py asks it)
TAGS = {
    "secondary": ({"secondary_separator": ";;;"}, "a;;;b, c", "a,b, c"),
    "kept": ({"shuffle_caption": True, "keep_tokens_separator": "|||"}, "x ||| a,, b ||| z", "x, a, b, z"),
    "shuffled": ({"shuffle_caption": True, "caption_separator": ";"}, " a;b;; c ", "a; b; ; c"),
    "dropped": ({"caption_dropout_rate": 1.0}, "a, b", ""),
}


@pytest.mark.parametrize("case", TAGS)
def test_tags_are_joined_as_kohya_joins_them(case, tmp_path):
    options, text, expected = TAGS[case]
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text(text)
    (dataset,) = read(toml(tmp_path, image_dir=str(tmp_path), **options))
    assert [sample.caption for sample in dataset.samples] == [expected]


def test_images_that_a_set_leaves_out_are_not_counted(tmp_path):
    for number in range(10):
        side = 64 if number else 32
        Image.new("RGB", (side, side)).save(tmp_path / f"{number}.png")
    subsets = [{"image_dir": str(tmp_path), "class_tokens": "t"}] * 2

    def names(**settings):
        entry = {"resolution": 64, "subsets": subsets, **settings}
        (tmp_path / "set.json").write_text(json.dumps({"datasets": [entry]}))
        (dataset,) = read(tmp_path / "set.json")
        return [sample.image.stem for sample in dataset.samples], dataset.problems

    found, problems = names()  # the folder is there twice
    assert found == list("0123456789") and "is there twice, and kohya takes the first" in problems[0]
    assert names(skip_image_resolution=[32, 32])[0] == list("123456789")
    # Python's own shuffle of ten under kohya's seed: the first seven train
    assert names(validation_split=0.3, validation_seed=5)[0] == list("2310876")


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("set.toml", b"\xef\xbb\xbf[[datasets]]", "begins with a byte order mark"),
        ("set.json", b"\xef\xbb\xbf{}", "begins with a byte order mark"),
        ("set.json", b"[]", "holds a list"),
        ("set.json", b"{", "is not JSON"),
        ("set.json", b"{}", "has no [[datasets]]"),
    ],
)
def test_a_configuration_that_kohya_cannot_read_is_one_sentence(name, content, sentence, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        read(tmp_path / name)


def test_a_folder_of_folders_names_them(images):
    with pytest.raises(ValueError, match="only folders in it: images"):
        read(images.parent)


def test_a_picture_is_refused_before_anything_is_counted(images, tokenizer, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("sdxl_fixes.commands.buckets.read", None)  # not reached
    status, _, error = call(capsys, images, "--tokenizer", tokenizer, "--plot", tmp_path / "gone" / "x.png")
    assert status == 2 and "--plot" in error and "there is no folder" in error
