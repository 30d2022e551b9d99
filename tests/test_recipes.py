"""examples/recipes and docs/recipes.md: our flags in them, their arithmetic, and that the page says what the
files say. What the real trainers make of the files is in tests/kohya/real and tests/diffusers/real.

``python tests/test_recipes.py`` prints the page's tables.
"""

import argparse
import re
import shutil

import pytest
import recipes
from recipes import ADAFACTOR, FULL, KEPT, LORA, LORA_32, RECOMPUTED, TEXT_ENCODERS, UNET

from sdxl_fixes import NoiseSchedule
from sdxl_fixes.command_line import add_flags
from sdxl_fixes.flags import FLAGS, TrainingFlags
from sdxl_fixes.kohya import chunk_flags
from sdxl_fixes.kohya.flags import add_arguments

PAGE = recipes.FOLDER.parent.parent / "docs" / "recipes.md"
FILES = sorted(recipes.FOLDER.iterdir())

CARDS = {"H100 SXM": 989, "RTX 4090": 165}  # dense bfloat16, TFLOP/s
MFU = 0.25


def memory(per_parameter, fixed, batch):
    """GB of a card, from and to."""
    still = UNET * per_parameter / 1e9 + fixed
    return [f"{still + batch * (KEPT + RECOMPUTED) * factor:.0f}" for factor in (1, 2)]


def memories():
    texts, lora = TEXT_ENCODERS * 2 / 1e9, LORA_32 * 16 / 1e9
    rows = [
        ("1, kohya, 8 images", "4 + 4 + 8 + 2", 18, texts, 8, "80 GB"),
        ("1, diffusers, 32 cards, 2 images", "4 + 4 + 8 + 2 + 4", 22, 0, 2, "80 GB"),
        ("1, diffusers, 16 cards, 8 images", "4 + 4 + 8 + 2 + 4", 22, 0, 8, "80 GB, barely"),
        ("2 and 4, kohya, 4 images", "2", 2, ADAFACTOR * 4 / 1e9 + texts, 4, "24 GB"),
        ("2, kohya, AdamW with 8-bit states, 4 images", "2 + 2.03", 2 + 2.03, texts, 4, "24 GB"),
        ("2, kohya, the same, 2 images", "2 + 2.03", 2 + 2.03, texts, 2, "24 GB"),
        ("3, 4 images", "2", 2, lora, 4, "24 GB"),
        ("3, 1 image", "2", 2, lora, 1, "12 GB"),
        ("4, diffusers, 4 images", "4 + 4 + 2 + 2", 12, 0, 4, "48 GB"),
    ]
    lines = ["| recipe | bytes a parameter | GB | card |", "|---|---|---:|---|"]
    return lines + [
        f"| {name} | {sums} | {' to '.join(memory(bytes_, fixed, n))} | {card} |"
        for name, sums, bytes_, fixed, n, card in rows
    ]


def hours():
    rows = [
        ("1", 40_000_000, FULL, "H100 SXM", 8),
        ("1", 40_000_000, FULL, "H100 SXM", 16),
        ("1", 40_000_000, FULL, "H100 SXM", 32),
        ("2 and 4", 100_000, FULL, "RTX 4090", 1),
        ("3", 8_000, LORA, "RTX 4090", 1),
    ]
    lines = ["| recipe | samples | cards | samples/s | hours |", "|---|---:|---|---:|---:|"]
    for name, samples, flop, card, count in rows:
        rate = count * CARDS[card] * MFU / flop
        lines.append(
            f"| {name} | {samples:,} | {count} x {card} | {rate:.3g} | {samples / rate / 3600:.3g} |"
        )
    return lines


@pytest.mark.parametrize("make", [memories, hours])
def test_the_pages_estimates_follow_from_its_formulas(make):
    assert "\n".join(make()) in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("recipe", recipes.KOHYA)
def test_our_flags_in_a_recipe_are_flags_of_ours_that_make_sense_together(recipe):
    parser = argparse.ArgumentParser()
    add_flags(parser, FLAGS)  # with those that upstream has too
    add_arguments(lambda parser: None, parser)
    ours = {
        key: value
        for key, value in recipes.keys(recipe).items()
        if key in {**FLAGS, **chunk_flags.CHUNK_FLAGS}
    }
    arguments = [f"--{key}" if value is True else f"--{key}={value}" for key, value in ours.items()]
    args = parser.parse_args(arguments)
    assert {key: getattr(args, key) for key in ours} == ours
    flags, flow = TrainingFlags.from_args(args), recipe == "big_flow"
    v, sdxl = not flow and recipe != "epsilon", NoiseSchedule.sdxl()
    wanted = NoiseSchedule.flow() if flow else sdxl.zero_terminal_snr() if v else sdxl
    assert flags.schedule() == wanted and recipes.keys(recipe).get("v_parameterization", False) == v
    assert flags.min_snr_gamma == (None if flow else 5)
    assert flags.stratified_timesteps and args.chunk_buckets
    chunk_flags.Options.from_args(argparse.Namespace(**{**recipes.keys(recipe), **vars(args)}))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_recipe_names_no_place_of_one_machine(file):
    text = file.read_text()
    assert not re.search(r'["\s=](/\w|~/|[A-Z]:\\)', text.replace("#!/usr/bin/env", "")) and "\t" not in text
    assert all(len(line) <= 140 for line in text.splitlines())


def test_the_big_finetune_is_2048_samples_a_step_and_40_million_in_all():
    keys, images = recipes.keys("big_v_ztsnr"), recipes.data("big_v_ztsnr")["datasets"][0]["batch_size"]
    assert 8 * images * keys["gradient_accumulation_steps"] == 2048
    assert (keys["max_train_steps"] - 1) * 2048 < 40_000_000 <= keys["max_train_steps"] * 2048
    assert keys["lr_warmup_steps"] * 40_000_000 == 100_000
    assert recipes.data("big_v_ztsnr")["general"]["caption_dropout_rate"] == 0.05
    assert (
        keys["learning_rate"] == 1e-4
        and keys["optimizer_args"] == ["weight_decay=0.1"]
        and keys["min_snr_gamma"] == 5
    )


def test_the_big_flow_is_4096_samples_a_step_and_150_million_in_all(tmp_path):
    keys, images = recipes.keys("big_flow"), recipes.data("big_flow")["datasets"][0]["batch_size"]
    assert 32 * images * keys["gradient_accumulation_steps"] == 4096
    assert (keys["max_train_steps"] - 1) * 4096 < 150_000_000 <= keys["max_train_steps"] * 4096
    assert keys["lr_warmup_steps"] * 150_000_000 == pytest.approx(100_000, rel=0.01)
    for name in ("learning_rate", "optimizer_args", "max_grad_norm"):
        assert keys[name] == recipes.keys("big_v_ztsnr")[name]
    command = recipes.command("big_flow", tmp_path)
    told = {flag: command[command.index(f"--{flag}") + 1] for flag in ("train_batch_size", "max_train_steps")}
    assert 32 * 32 * int(told["train_batch_size"]) == 4096
    assert int(told["max_train_steps"]) == keys["max_train_steps"]


@pytest.mark.parametrize("recipe", ["one_card_v_ztsnr", "lora_v_ztsnr", "epsilon"])
def test_the_small_recipes_have_the_samples_that_they_say(recipe):
    keys, text = recipes.keys(recipe), (recipes.FOLDER / f"{recipe}.toml").read_text()
    samples, images = re.search(r"max_train_steps = \d+ +# ([\d,]+) samples / (\d+)", text).groups()
    assert keys["max_train_steps"] * int(images) == int(samples.replace(",", ""))
    assert int(images) == recipes.data(recipe)["datasets"][0]["batch_size"]
    if "fused_backward_pass" in keys:  # kohya's conditions
        assert (
            keys["optimizer_type"] == "Adafactor"
            and "gradient_accumulation_steps" not in keys
            and keys["max_grad_norm"] == 0
        )
    if "cache_text_encoder_outputs" in keys:  # kohya's conditions
        assert (
            keys["network_train_unet_only"] and "caption_dropout_rate" not in recipes.data(recipe)["general"]
        )


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(("gpus", "images"), [("32", "2"), ("16", "8"), ("8", "32")])
def test_the_shell_recipe_accumulates_as_often_as_there_are_cards(gpus, images, tmp_path):
    command = recipes.command("big_v_ztsnr", tmp_path, "--seed", "7", GPUS=gpus)
    for flag, value in {
        "num_processes": gpus,
        "gradient_accumulation_steps": gpus,
        "train_batch_size": images,
    }.items():
        assert command[command.index(f"--{flag}") + 1] == value
    assert command[-2:] == ["--seed", "7"]
    steps, warm_up = (
        int(command[command.index(f"--{flag}") + 1]) for flag in ("max_train_steps", "lr_warmup_steps")
    )
    assert steps == recipes.keys("big_v_ztsnr")["max_train_steps"] and warm_up == round(100_000 / 2048)


def test_the_numbers_in_the_pages_sentences_are_the_counted_ones():
    text = " ".join(PAGE.read_text(encoding="utf-8").split())
    assert (
        f"{UNET / 1e9:.3f} billion parameters" in text
        and f"text encoders {TEXT_ENCODERS / 1e9:.3f} billion x 2" in text
    )
    assert (
        f"Adafactor's state {ADAFACTOR / 1e9:.3f} billion x 4; a LoRA of rank 32 {LORA_32 / 1e9:.3f} "
        "billion x 16" in text
    )
    assert (
        f"checkpointing {KEPT:.2f} GB of block inputs and {RECOMPUTED:.2f} GB inside the largest block"
        in text
    )
    assert f"$F={FULL}$ TFLOP" in text and f"LoRA {LORA}:" in text
    assert f"H100 SXM {CARDS['H100 SXM']}, RTX 4090 {CARDS['RTX 4090']} TFLOP/s" in text
    recomputing, not_recomputing = (
        300 / 32 * flop / CARDS["H100 SXM"] for flop in (FULL, FULL * 3 / 4)
    )  # bigASP v2.5's samples/s
    assert f"$u={100 * MFU:.0f}$ %" in text and recomputing == pytest.approx(MFU, abs=0.006)
    assert f"({100 * not_recomputing:.0f} % if not)" in text
    assert f"{12 * UNET / 1e9:.0f} GB" in text


def test_the_pages_excerpts_are_lines_of_the_files():
    file, inside, seen = None, False, 0
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            inside = not inside
        elif inside and file is not None:
            assert line in file.read_text().splitlines() or not line, (file.name, line)
            seen += 1
        for name in [] if inside else re.findall(r"\]\(\.\./examples/recipes/([\w.]+)\)", line):
            file = recipes.FOLDER / name
            assert file.exists()
    assert seen > 20


def test_the_page_links_every_file():
    assert {file.name for file in FILES} == set(
        re.findall(r"\.\./examples/recipes/([\w.]+)\)", PAGE.read_text(encoding="utf-8"))
    )


if __name__ == "__main__":
    print(*memories(), "", *hours(), sep="\n")
