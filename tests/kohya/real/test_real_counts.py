"""sdxl-fixes buckets against sd-scripts' own data sets, in this process: the same pictures, as often, with
the same prompts in the same buckets, and a stop where they stop. Set SD_SCRIPTS to run these."""

import argparse
import json
import os
import random
import sys

import numpy as np
import pytest
from PIL import Image
from test_real_trainer import pytestmark  # noqa: F401

from sdxl_fixes.commands.buckets import _aspects, report
from sdxl_fixes.training_sets.read import read

if "SD_SCRIPTS" in os.environ:
    sys.path.insert(0, os.environ["SD_SCRIPTS"])
# before 0.11, tags without a caption were lost with enable_wildcard, and shuffled tags joined by ", " alone
OLD = not os.path.exists(os.path.join(os.environ.get("SD_SCRIPTS", ""), "library", "dataset.py"))

WORDS = ["a", "cat", "1girl", "red {hat|large scarf}", "{{smile}}", "b,c", "x ||| y", "d;;;e", "", " f "]
ENDS = [".png"] * 6 + [".jpg", ".PNG", ".Png", ".bmp", ".gif", ".webp"]


# what our sentences say where kohya stops; of an empty set the limits are not looked at
TELLING = ("kohya stops", "fit no bucket", "holds no usable image")


def text(draw):
    lines = [
        ", ".join(draw.choices(WORDS, k=draw.randint(1, 5))) for _ in range(draw.choice([1, 1, 1, 2, 3]))
    ]
    return draw.choice(["\n", "\r\n"]).join(lines) + draw.choice(["", "\n"])


def folder(draw, path, rare):
    """Pictures with captions, some odd."""
    path.mkdir()
    for number in range(draw.randint(1, 7)):
        name = draw.choice([f"{number}", f".{number}" if rare else f"{number}x", f"a_b_{number}_1_2_3_4"])
        size = (draw.randint(20, 200), draw.randint(20, 200))
        end = draw.choice(ENDS)
        Image.new("RGB", size).save(path / (name + end), {".bmp": "BMP", ".gif": "GIF"}.get(end, "PNG"))
        stem = name if draw.random() < 0.8 else f"a_b_{number}"
        if draw.random() < 0.8:
            (path / (stem + ".txt")).write_bytes(text(draw).encode())
    if rare and draw.random() < 0.3:
        (path / "0x.txt").write_bytes(draw.choice([b"", b"caf\xe9", "\ufeffa cat".encode()]))
    if rare and draw.random() < 0.2:
        (path / "broken.png").write_bytes(b"no picture")


def wording(draw):
    """Options of a subset."""
    options = {
        "caption_prefix": "pre",
        "caption_suffix": "suf",
        "enable_wildcard": True,
        "shuffle_caption": True,
        "keep_tokens": 1,
        "keep_tokens_separator": "|||",
        "secondary_separator": ";;;",
        "caption_tag_dropout_rate": 0.02,
        "caption_dropout_rate": 0.02,
        "caption_separator": draw.choice([",", "," if OLD else ";"]),
    }
    return {key: value for key, value in options.items() if draw.random() < 0.2}


def config(draw, root, rare):
    """A --dataset_config of folders or of metadata, and what it reads."""
    datasets = []
    for number in range(draw.randint(1, 2)):
        finetuning, subsets = draw.random() < 0.35, []
        for place in range(draw.randint(1, 3)):
            path = root / f"{number}-{place}"
            folder(draw, path, rare)
            subset = {"image_dir": str(path), "num_repeats": draw.choice([1, 1, 2, 3, 0]), **wording(draw)}
            if finetuning:
                subset["metadata_file"] = str(root / f"{number}-{place}.{draw.choice(['json', 'jsonl'])}")
                metadata(draw, path, subset["metadata_file"])
            else:
                subset |= {"caption_extension": draw.choice([".txt", "txt"]), "is_reg": draw.random() < 0.3}
                subset |= {"class_tokens": "a thing"} if draw.random() < 0.3 else {}
            subsets.append(subset)
        subsets += [dict(subsets[0])] if draw.random() < 0.1 else []
        subsets += (
            [{"image_dir": str(root / "gone")}] if rare and not finetuning and draw.random() < 0.2 else []
        )
        entry = {
            "resolution": draw.choice([96, [96, 128]]),
            "batch_size": draw.randint(1, 4),
            "subsets": subsets,
        }
        entry |= draw.choice(
            [{"enable_bucket": True}, {"enable_bucket": True, "bucket_no_upscale": True}, {}]
        )
        entry |= {
            "bucket_reso_steps": draw.choice([16, 32]),
            "min_bucket_reso": draw.choice([32, 60, 64]),
            "max_bucket_reso": draw.choice([128, 150, 192]),
        }
        if draw.random() < 0.2 and not OLD:
            entry["skip_image_resolution"] = draw.choice([100, [60, 120]])
        if draw.random() < 0.2 and not (finetuning or rare):
            entry |= {"validation_split": 0.3, "validation_seed": 5}
        if rare and draw.random() < 0.2:
            entry |= draw.choice([{"num_repeat": 2}, {"is_reg": True}, {"min_bucket_reso": 128}])
        datasets.append(entry)
    content = {"general": {"num_repeats": 1}, "datasets": datasets}
    file = root / "set.json"
    file.write_text(json.dumps(content))
    return file


def metadata(draw, path, file):
    entries = {}
    for picture in sorted(path.glob("*.*")):
        if picture.suffix == ".txt" or picture.name.startswith("."):
            continue
        entry = {"caption": text(draw).strip() or "a" * OLD} if draw.random() < 0.8 or OLD else {}
        entry |= {"tags": text(draw).replace("\r", "")} if draw.random() < 0.5 else {}
        entry |= {"image_size": [draw.randint(20, 200), draw.randint(20, 200)]} if draw.random() < 0.5 else {}
        entries[draw.choice([picture.name, str(picture)])] = entry
    if file.endswith("jsonl"):
        lines = ({"image_path": name, **entry} for name, entry in entries.items())
        content = "\n".join(map(json.dumps, lines))
    else:
        content = json.dumps(entries)
    with open(file, "w") as out:
        out.write(content)


def theirs(file):
    """[({image: (repeats, longest prompts' lengths, bucket)}, batches)] of every data set."""
    from library import config_util

    sanitizer = config_util.ConfigSanitizer(True, True, False, True)
    arguments = argparse.Namespace(
        debug_dataset=False, keep_tokens_separator="", caption_separator=",", caption_extension=".caption"
    )
    user = config_util.load_user_config(str(file))
    blueprint = config_util.BlueprintGenerator(sanitizer).generate(user, arguments)
    made = config_util.generate_dataset_group_by_blueprint(blueprint.dataset_group)
    group = made[0] if isinstance(made, tuple) else made
    found = []
    for dataset in group.datasets:
        dataset.max_train_steps = 10
        images = {}
        for info in dataset.image_data.values():
            subset = dataset.image_to_subset[info.image_key]
            drawn = {dataset.process_caption(subset, info.caption) for _ in range(60)}
            images[info.absolute_path] = (info.num_repeats, max(map(len, drawn)), tuple(info.bucket_reso))
        found += [(images, len(dataset))] if images else []
    return found


def ours(file):
    """The same, and all sentences."""
    found, sentences = [], []
    for dataset in read(file):
        counts = np.ones(len(dataset.samples), int)
        made = report(dataset, counts, 3)
        aspects = _aspects(dataset, "kohya")
        images = {
            str(sample.image): (sample.repeats, len(sample.caption), tuple(aspects.resolutions[k].tolist()))
            for sample, k in zip(dataset.samples, aspects.index, strict=True)
            if k >= 0
        }
        found.append((images, made.aspect["batches"]))
        sentences += made.problems
    return found, sentences


@pytest.mark.parametrize("rare", [False, True])
@pytest.mark.parametrize("seed", range(80))
def test_pictures_repeats_prompts_and_buckets_are_kohyas(seed, rare, tmp_path, monkeypatch):
    from library import strategy_base, strategy_sd

    latents = strategy_sd.SdSdxlLatentsCachingStrategy(False, False, 1, False)
    monkeypatch.setattr(strategy_base.LatentsCachingStrategy, "_strategy", latents)
    file = config(random.Random(f"{seed} {rare}"), tmp_path, rare)
    random.seed(seed)
    try:
        expected = theirs(file)
    except Exception as error:
        stopped = error
    else:
        stopped = None
    try:
        found, sentences = ours(file)
    except (ValueError, OSError) as error:
        found, sentences = None, [str(error)]
    if stopped is not None:
        assert found is None or any(word in each for each in sentences for word in TELLING), (
            stopped,
            sentences,
        )
    elif found is None:  # nothing at all to train: kohya says so later
        assert not expected, sentences
    else:
        assert not any("kohya stops" in each for each in sentences), sentences
        for (mine, batches), (kohyas, kohyas_batches) in zip(found, expected, strict=True):
            fitting = {name: facts for name, facts in kohyas.items() if min(facts[2])}
            assert sorted(mine.items()) == sorted(fitting.items())
            assert batches == kohyas_batches or len(fitting) < len(kohyas)
