"""--stable_loss_steps in the real scripts: training stays bit-identical, and the number depends on the
images. Set DIFFUSERS_EXAMPLES."""

import pytest
from stable_loss_output import logged, printed
from test_real_scripts import FIXES, made, pytestmark, run  # noqa: F401  (fixtures)
from two_processes import TWO

MODES = {
    "plain": (),
    "accumulation": ("--gradient_accumulation_steps", "2"),
    "checkpointing": ("--gradient_checkpointing",),
    "bf16": ("--mixed_precision", "bf16"),
    "chunks": ("--max_token_length", "225"),
    "fixes": FIXES,
}
STABLE = ("--stable_loss_steps", "2", "--stable_loss_images", "4")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("script", ["t2i", "t2i_lora"])
def test_losses_are_bit_identical_to_the_run_without_the_flag(run, script, mode):  # noqa: F811
    without = run(
        "module" if mode in ("chunks", "fixes") else "unpatched", script, *MODES[mode], steps=4, folder="a"
    )[1]
    process, trace = run("module", script, *MODES[mode], *STABLE, steps=4, folder="b")
    assert trace == without
    numbers = printed(process)
    assert list(numbers) == [2, 4] and all(
        0 < loss < 10 and 0 < plain < 10 and n == 4 for loss, plain, n in numbers.values()
    )
    assert numbers[2] != numbers[4] and (numbers[2][0] != numbers[2][1]) == (mode == "fixes")


@pytest.mark.parametrize("script", ["dreambooth", "advanced"])
def test_dreambooth_with_prior_preservation(run, made, script):  # noqa: F811
    """Both halves of a batch are images."""
    prior = (
        "--with_prior_preservation",
        "--class_data_dir",
        str(made / "plain"),
        "--class_prompt",
        "cat",
        "--num_class_images",
        "6",
    )
    flags = prior if script == "dreambooth" else ()  # the other stops with it by itself
    without = run("unpatched", script, *flags, folder="a")[1]
    process, trace = run(
        "module", script, *flags, "--stable_loss_steps", "1", "--stable_loss_images", "4", folder="b"
    )
    assert trace == without and printed(process)[3][2] == 4
    assert min(printed(process)) == (1 if flags else 2)  # a batch of two is one of four


def test_a_trained_text_encoder_is_said(run):  # noqa: F811
    process, _ = run("module", "dreambooth", "--train_text_encoder", *STABLE, steps=2)
    assert (
        "text embeddings stay as first seen, though the text encoder is trained" in process.stderr
        and printed(process)
    )


def test_two_processes_share_the_images(run):  # noqa: F811
    for script in ("t2i", "t2i_lora"):
        without = run("unpatched", script, launcher=TWO, folder="a")[1]
        process, trace = run("module", script, *STABLE, launcher=TWO, folder="b")
        assert trace == without and printed(process)[2][2] == 4


def test_the_tracker_gets_every_number_at_its_step(run, tmp_path):  # noqa: F811
    process, _ = run("module", "t2i", *STABLE, "--report_to", "tensorboard", steps=4)
    found = logged(tmp_path / "run" / "out")
    assert found["stable_loss/loss"] == pytest.approx(
        {step: loss for step, (loss, *_) in printed(process).items()}, rel=1e-6
    )
    assert "stable_loss/loss_unweighted/t999" in found and list(found["train_loss"]) == [1, 2, 3, 4]


@pytest.mark.parametrize("script", ["t2i", "t2i_lora"])
def test_a_resumed_run_goes_on_with_the_images_of_the_first(run, script, tmp_path):  # noqa: F811
    """The resumed run has another seed, batch size and hence order, and the same weights."""
    flags = ("--learning_rate", "0", "--checkpointing_steps", "2")
    again = (*flags, "--resume_from_checkpoint", "latest", "--seed", "8", "--train_batch_size", "3")
    first = printed(run("module", script, *STABLE, *flags, steps=2)[0])
    process, trace = run("module", script, *STABLE, *again, steps=6)
    resumed = printed(process)
    assert list(resumed) == [4, 6] and [loss for loss, *_ in resumed.values()] == pytest.approx(
        [first[2][0]] * 2, rel=1e-5
    )
    run("unpatched", script, *flags, steps=2, folder="without")
    assert trace == run("unpatched", script, *again, steps=6, folder="without")[1]


def test_controlnet_is_refused_before_anything_is_loaded(run):  # noqa: F811
    process, _ = run("module", "controlnet", *STABLE, check=False)
    last = process.stderr.strip().splitlines()[-1]
    assert process.returncode != 0 and "Traceback" not in process.stderr
    assert (
        last.startswith("sdxl-fixes: the fix 'validation', which your flags ask for, does not fit")
        and "residuals" in last
    )
