"""The data sets of --chunk_buckets on sd-scripts' own, in this process: which images and prompts a batch
holds, in every supported version the same. Set SD_SCRIPTS to run these."""

import argparse
import json
import multiprocessing
import os
import random
import sys
import types
from collections import Counter

import pytest
import torch
from PIL import Image
from test_real_buckets import LENGTHS, caption, chunks
from test_real_trainer import assets, pytestmark  # noqa: F401  (fixtures)

if "SD_SCRIPTS" in os.environ:
    sys.path.insert(0, os.environ["SD_SCRIPTS"])

# images of every batch in epochs 1 and 2, as first planned on sd-scripts 0.10.1
PLANNED = [
    [[18, 12, 0, 10], [19, 3, 9, 5], [20, 4, 14], [17, 11], [1, 15, 7, 13], [6, 16, 2, 8]],
    [[13, 11], [6, 12, 8, 2], [19, 9, 17, 7], [16, 18, 10, 0], [15, 5, 3, 1], [14, 20, 4]],
]


@pytest.fixture
def group(assets, tmp_path, monkeypatch):  # noqa: F811
    """group(kind, more="", **options) -> the data set group of 21 images, each of its own colour, by our
    classes."""
    from library import config_util, strategy_base, strategy_sd

    from sdxl_fixes.kohya import datasets
    from sdxl_fixes.kohya.chunk_flags import Options

    folder = tmp_path / "images"
    folder.mkdir()
    entries = {}
    for number in range(len(LENGTHS)):
        file = folder / f"{number:02}.png"
        Image.new("RGB", [(96, 96), (128, 64)][number % 2], (10 * number, 0, 0)).save(file)
        file.with_suffix(".txt").write_text(caption(number))
        entries[str(file)] = {"caption": caption(number)}
    (tmp_path / "metadata.json").write_text(json.dumps(entries))
    sources = {
        "dreambooth": 'caption_extension = ".txt"\nnum_repeats = 1',
        "finetuning": f"metadata_file = {json.dumps(str(tmp_path / 'metadata.json'))}",
    }

    latents = strategy_sd.SdSdxlLatentsCachingStrategy(False, False, 1, False)  # finetuning sets ask for it
    monkeypatch.setattr(strategy_base.LatentsCachingStrategy, "_strategy", latents)

    def build(kind, more="", **options):
        strategy = datasets.ChunkTokenizeStrategy(225, str(assets / "tokenizers"))
        monkeypatch.setattr(strategy_base.TokenizeStrategy, "_strategy", strategy)
        strategy.options = Options(3, "75n+2", **{"cached": False, "weighted": False, **options})
        for name in ("DreamBoothDataset", "FineTuningDataset"):
            monkeypatch.setattr(config_util, name, getattr(datasets, f"Chunk{name}"))
        file = tmp_path / "chunks.toml"
        file.write_text(f"""[general]
enable_bucket = true
[[datasets]]
resolution = 96
batch_size = 4
min_bucket_reso = 64
max_bucket_reso = 128
bucket_reso_steps = 32
[[datasets.subsets]]
image_dir = {json.dumps(str(folder))}
{sources[kind]}
{more}
""")
        random.seed(11)  # upstream draws the data sets' seed
        sanitizer = config_util.ConfigSanitizer(True, True, False, True)
        blueprint = config_util.BlueprintGenerator(sanitizer).generate(
            config_util.load_user_config(str(file)),
            argparse.Namespace(debug_dataset=False, keep_tokens_separator="", caption_separator=","),
        )
        made, _ = config_util.generate_dataset_group_by_blueprint(blueprint.dataset_group)
        made.set_current_strategies()
        return made

    build.folder = folder
    return build


def images_of(example):
    """Numbers of a batch's images, by their colour."""
    return [round((float(image[0].mean()) + 1) * 127.5 / 10) for image in example["images"]]


def read(strategy, example):
    """A batch's prompts, read back from their ids."""
    texts = strategy.tokenizer1.batch_decode(
        example["input_ids_list"][0].flatten(1), skip_special_tokens=True
    )
    return ["".join(text.split()) for text in texts]


@pytest.mark.parametrize("kind", ["dreambooth", "finetuning"])
def test_batches_are_of_one_shape_and_length_and_the_same_in_every_version(group, kind):
    made = group(kind)
    strategy, planned = made.datasets[0].strategy, []
    for epoch in (1, 2):
        made.set_current_epoch(epoch)
        batches = [made[index] for index in range(len(made))]
        planned.append([images_of(batch) for batch in batches])
        assert Counter(number for batch in planned[-1] for number in batch) == Counter(range(21))
        for numbers, batch in zip(planned[-1], batches, strict=True):
            assert batch["captions"] == [caption(number) for number in numbers]  # each image with its own
            assert read(strategy, batch) == [caption(number)[:225] for number in numbers]
            assert batch["input_ids_list"][0].shape == (
                len(numbers),
                min(3, max(map(chunks, batch["captions"]))),
                77,
            )
            assert len({number % 2 for number in numbers}) == 1  # of one shape
    assert planned == PLANNED


def test_prompts_drawn_at_run_time_are_those_that_were_planned(group):
    for number in range(21):
        tags = ", ".join(f"{chr(97 + number)}{k:02}xx" for k in range(LENGTHS[number] // 6 + 1))
        (group.folder / f"{number:02}.txt").write_text(tags)
    made = group(
        "dreambooth", "shuffle_caption = true\ncaption_tag_dropout_rate = 0.5\ncaption_dropout_rate = 0.2"
    )
    made.set_current_epoch(1)
    batches = [made[index] for index in range(len(made))]
    for batch in batches:
        letters = [chr(97 + number) for number in images_of(batch)]
        assert all(text[:1] in ("", letter) for text, letter in zip(batch["captions"], letters, strict=True))
        tokens = [len(text.replace(" ", "")) for text in batch["captions"]]  # one a character
        assert batch["input_ids_list"][0].shape[1] == min(3, max(1, -(-max(tokens) // 75)))
    texts = [text for batch in batches for text in batch["captions"]]
    assert 0 < texts.count("") < 15 and len(set(texts)) > 5


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_read_the_trainers_epoch(group, start):
    made = group("dreambooth")
    context = multiprocessing.get_context(start)
    epoch = context.Value("i", 2)
    made.datasets[0].strategy.epoch_now = epoch
    loader = torch.utils.data.DataLoader(
        made, batch_size=1, collate_fn=_first, num_workers=1, multiprocessing_context=context
    )
    assert [images_of(batch) for batch in loader] == PLANNED[1]


def _first(examples):
    return examples[0]


@torch.no_grad()
def test_cached_outputs_are_each_prompts_own(group, tmp_path, monkeypatch):
    """Encoded once and read from disk; batches hold one number of chunks."""
    import tiny
    from library import strategy_base, strategy_sdxl
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    from sdxl_fixes.kohya import prompts
    from sdxl_fixes.kohya.chunk_flags import Options
    from sdxl_fixes.kohya.run import SESSION

    torch.manual_seed(0)
    models = [
        CLIPTextModel(tiny.text_config("te1")).eval(),
        CLIPTextModelWithProjection(tiny.text_config("te2")).eval(),
    ]
    options = Options(limit=3, layout="75n+2", cached=True, weighted=False)
    monkeypatch.setattr(SESSION, "run", types.SimpleNamespace(on={"buckets"}, options=options))
    caching = strategy_sdxl.SdxlTextEncoderOutputsCachingStrategy(True, 4, False)
    encoding = strategy_sdxl.SdxlTextEncodingStrategy()
    monkeypatch.setattr(strategy_base.TextEncoderOutputsCachingStrategy, "_strategy", caching)
    monkeypatch.setattr(strategy_base.TextEncodingStrategy, "_strategy", encoding)
    upstream = strategy_sdxl.SdxlTextEncoderOutputsCachingStrategy.cache_batch_outputs
    monkeypatch.setattr(
        strategy_sdxl.SdxlTextEncoderOutputsCachingStrategy,
        "cache_batch_outputs",
        lambda *given: prompts.cache_outputs(upstream, *given),
    )
    made = group("dreambooth", cached=True)
    accelerator = types.SimpleNamespace(num_processes=1, process_index=0, wait_for_everyone=lambda: None)
    made.new_cache_text_encoder_outputs(models, accelerator)
    assert sorted(file.name for file in group.folder.glob("*.npz")) == [
        f"{number:02}_te_outputs_75n+2_{min(3, chunks(caption(number)))}.npz" for number in range(21)
    ]
    made.set_current_strategies()
    made.set_current_epoch(1)
    batches = [made[index] for index in range(len(made))]
    assert Counter(number for batch in batches for number in images_of(batch)) == Counter(range(21))
    for batch in batches:
        counts = {min(3, chunks(caption(number))) for number in images_of(batch)}
        assert len(counts) == 1 and batch["text_encoder_outputs_list"][0].shape[1] == 75 * counts.pop() + 2
        own = encoding.encode_tokens(
            made.datasets[0].strategy, models, made.datasets[0].strategy.tokenize(batch["captions"])
        )
        for cached, encoded in zip(batch["text_encoder_outputs_list"], own, strict=True):
            torch.testing.assert_close(cached, encoded)
