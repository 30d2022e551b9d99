"""--chunk_buckets in the unmodified trainers: which prompts meet in a batch, and how long their context is.
Set SD_SCRIPTS to run these."""

import json
from collections import Counter

import pytest
from PIL import Image
from test_real_trainer import SCRIPTS, assets, pytestmark, train  # noqa: F401  (fixtures)

LIMIT = ("--max_token_length", "225")
CHUNKS = (*LIMIT, "--chunk_buckets")
# tokens; 300 is cut at 225
LENGTHS = [10, 60, 80, 20, 160, 75, 30, 76, 150, 5, 40, 151, 12, 100, 300, 33, 55, 90, 7, 44, 225]
EPOCH = 6  # batches of 4 in the two aspect buckets of 11 and 10 samples


def caption(number):
    return (
        (f"n{number:02}" + chr(97 + number) * LENGTHS[number])[: LENGTHS[number]]
        if LENGTHS[number] > 4
        else f"n{number:02}"
    )


@pytest.fixture
def dataset(tmp_path):
    """--dataset_config of 21 small images, prompts of 1, 2 and 3 chunks; ``more`` are lines for the
    subset."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(len(LENGTHS)):
        Image.new("RGB", [(96, 96), (128, 64)][number % 2], (number, 0, 0)).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(caption(number))

    def write(more="", batch_size=4):
        file = tmp_path / "chunks.toml"
        file.write_text(
            f"""[general]
caption_extension = ".txt"
enable_bucket = true
[[datasets]]
resolution = 96
batch_size = {batch_size}
min_bucket_reso = 64
max_bucket_reso = 128
bucket_reso_steps = 32
[[datasets.subsets]]
image_dir = {json.dumps(str(folder))}
{more}
"""
        )
        return ("--dataset_config", str(file))

    write.folder = folder
    return write


def chunks(prompt):
    return max(1, -(-len(prompt) // 75))


def check(trace, layout="75n+2", steps=2 * EPOCH):
    """Every batch's context is that of its own longest prompt; returns the epochs' prompts."""
    assert len(trace["contexts"]) == len(trace["prompts"]) == steps
    for (size, length), prompts in zip(trace["contexts"], trace["prompts"], strict=True):
        count = max(map(chunks, prompts))
        assert size == len(prompts) and length == (77 * count if layout == "77n" else 75 * count + 2)
    mixed = sum(len({chunks(prompt) for prompt in prompts}) > 1 for prompts in trace["prompts"][:EPOCH])
    assert mixed <= 4  # two aspect buckets, two borders between chunk counts in each
    return [
        Counter(prompt for batch in trace["prompts"][e : e + EPOCH] for prompt in batch)
        for e in range(0, steps, EPOCH)
    ]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("workers", ["0", "2 fork", "2 fork persistent", "1 spawn"])
def test_every_prompt_once_an_epoch_at_its_own_length(train, dataset, script, workers, monkeypatch):  # noqa: F811
    if "spawn" in workers:
        monkeypatch.setenv("START_METHOD", "spawn")
    flags = (
        "--max_data_loader_n_workers",
        workers[0],
        *(("--persistent_data_loader_workers",) if "persistent" in workers else ()),
    )
    process, trace = train("module", script, *CHUNKS, *dataset(), *flags, steps=2 * EPOCH)
    assert check(trace) == [Counter(caption(n)[:225] for n in range(21))] * 2
    assert trace["prompts"][:EPOCH] != trace["prompts"][EPOCH:]
    assert (
        "prompts of up to 225 tokens in batches of equal aspect and chunks, 75n+2 vectors" in process.stderr
    )
    if workers == "0":
        before = train("unpatched", script, *LIMIT, *dataset(), steps=EPOCH)[1]
        # as many batches, all of the greatest length
        assert [length for _, length in before["contexts"]] == [227] * EPOCH
        said = "1 of 21 captions are longer than 3 chunks (225 tokens)"
        assert said in process.stderr and "14.png (4 chunks)" in process.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_uis_layout(train, dataset, script):  # noqa: F811
    trace = train("module", script, *CHUNKS, "--chunk_layout", "77n", *dataset(), steps=EPOCH)[1]
    assert check(trace, "77n", EPOCH) == [Counter(caption(n)[:225] for n in range(21))]
    assert all(0 < loss < 10 for loss in trace["losses"])


def test_prompts_drawn_at_run_time_are_bucketed_as_drawn(train, dataset):  # noqa: F811
    for number in range(21):
        tags = ", ".join(f"{chr(97 + number)}{k:02}xx" for k in range(LENGTHS[number] // 6 + 1))
        (dataset.folder / f"{number:02}.txt").write_text(tags)
    drawn = "shuffle_caption = true\ncaption_tag_dropout_rate = 0.5\ncaption_dropout_rate = 0.2"
    traces = [
        train(
            "module",
            "sdxl_train.py",
            *CHUNKS,
            *dataset(drawn),
            "--max_data_loader_n_workers",
            n,
            steps=2 * EPOCH,
        )[1]
        for n in "02"
    ]
    for trace in traces:
        check(trace)
        prompts = [prompt for batch in trace["prompts"][:EPOCH] for prompt in batch]
        assert len(prompts) == 21 and 0 < sum(prompt == "" for prompt in prompts) < 15
        # each image once
        assert len({prompt[0] for prompt in prompts if prompt}) == sum(prompt != "" for prompt in prompts)
    assert len({len(prompt) for batch in traces[0]["prompts"] for prompt in batch}) > 8


@pytest.mark.parametrize("layout", ["75n+2", "77n"])
def test_caches_are_of_each_prompts_own_length_and_never_the_old_ones(train, dataset, layout):  # noqa: F811
    flags = ("--cache_text_encoder_outputs", "--cache_text_encoder_outputs_to_disk", *dataset())
    # batches
    epoch = sum(-(-n // 4) for n in Counter((n % 2, min(3, chunks(caption(n)))) for n in range(21)).values())
    train("unpatched", "sdxl_train.py", *LIMIT, *flags, steps=1)
    old = {file: file.stat().st_mtime_ns for file in dataset.folder.glob("*_te_outputs.npz")}
    assert len(old) == 21
    ours = (*CHUNKS, "--chunk_layout", layout, *flags)
    first = train("module", "sdxl_train.py", *ours, steps=epoch)[1]
    assert {file: file.stat().st_mtime_ns for file in old} == old
    names = sorted(file.name for file in dataset.folder.glob("*.npz") if file not in old)
    assert names == [f"{n:02}_te_outputs_{layout}_{min(3, chunks(caption(n)))}.npz" for n in range(21)]
    unit, more = (77, 0) if layout == "77n" else (75, 2)
    # no batch is mixed
    assert {length for _, length in first["contexts"]} == {unit * n + more for n in (1, 2, 3)}
    again = train("module", "sdxl_train.py", *ours, "--max_data_loader_n_workers", "1", steps=epoch)[1]
    assert not again["prompts"] and again["contexts"] == first["contexts"]  # nothing is encoded anew
    assert sum(size for size, _ in again["contexts"]) == 21


def test_weighted_captions(train, dataset):  # noqa: F811
    for number in range(21):
        (dataset.folder / f"{number:02}.txt").write_text(f"({caption(number)}:1.3)")
    for layout in ("75n+2", "77n"):
        trace = train(
            "module",
            "sdxl_train.py",
            *CHUNKS,
            "--weighted_captions",
            "--chunk_layout",
            layout,
            *dataset(),
            steps=EPOCH,
        )[1]
        # brackets are no tokens
        assert check(trace, layout, EPOCH) == [Counter(caption(n)[:225] for n in range(21))]
        assert all(0 < loss < 10 for loss in trace["losses"])


@pytest.mark.parametrize("layout", ["75n+2", "77n"])
def test_previews_of_unequal_prompts(train, dataset, tmp_path, layout):  # noqa: F811
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(
        f"{'a ' * 100} --n bad --w 64 --h 64 --s 2 --l 5 --d 1\ncat --n {'b ' * 200} --w 64 "
        "--h 64 --s 2 --l 5 --d 1\n"
    )
    preview = ("--sample_prompts", str(prompts), "--sample_every_n_steps", "1", "--sample_sampler", "ddim")
    trace = train(
        "module", "sdxl_train.py", *CHUNKS, "--chunk_layout", layout, *dataset(), *preview, steps=1
    )[1]
    assert len(list((tmp_path / "out" / "sample").glob("*.png"))) == 2 and len(trace["losses"]) == 1


@pytest.mark.parametrize(
    ("flags", "more", "sentence"),
    [
        (("--chunk_buckets",), "", "--chunk_buckets needs --max_token_length 150 or 225"),
        ((*LIMIT, "--chunk_layout", "77n"), "", "--chunk_layout needs --chunk_buckets"),
        ((*CHUNKS, "--dataset_class", "some.Class"), "", "not one of --dataset_class"),
        (CHUNKS, "token_warmup_step = 3", "does not go with token_warmup_step"),
    ],
)
def test_what_cannot_be_served_is_one_sentence(train, dataset, flags, more, sentence):  # noqa: F811
    process, _ = train("module", "sdxl_train.py", *flags, *dataset(more), check=False)
    last = process.stderr.strip().splitlines()[-1]
    assert (
        process.returncode != 0
        and last.startswith("sdxl-fixes: ")
        and sentence in last
        and "Traceback" not in process.stderr
    )
