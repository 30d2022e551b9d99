"""--stable_loss_steps in the real trainers: the training stays bit-identical, and the number depends on the
images. Set SD_SCRIPTS."""

import shutil
import sys

import pytest
from stable_loss_output import logged, printed
from test_real_trainer import SCRIPTS, assets, pytestmark, train  # noqa: F401  (fixtures)
from two_processes import TWO

CACHES = ("--cache_latents",)
STANDSTILL = ("--learning_rate", "1e-30")  # the network trainer takes no 0
MODES = {
    "plain": (),
    "cached": CACHES,
    "accumulation": ("--gradient_accumulation_steps", "2"),
    "checkpointing": ("--gradient_checkpointing",),
    "bf16": ("--mixed_precision", "bf16"),
    "full bf16": ("--mixed_precision", "bf16", "--full_bf16"),
    "chunks": ("--max_token_length", "225", "--chunk_buckets"),
    "fixes": (
        *(
            "--zero_terminal_snr",
            "--v_parameterization",
            "--loss_type",
            "huber",
            "--huber_l2_gradient",
            "batch",
        ),
        *("--min_snr_gamma", "5", "--min_snr_floor", "--ip_noise_gamma", "0.1", "--stratified_timesteps"),
    ),
}
DROPOUT = ("--network_dropout", "0.5")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("script", SCRIPTS)
def test_losses_are_bit_identical_to_the_run_without_the_flag(train, script, mode):  # noqa: F811
    flags = (*MODES[mode], *(DROPOUT if script == "sdxl_train_network.py" and mode == "accumulation" else ()))
    without = train("module" if mode in ("chunks", "fixes") else "unpatched", script, *flags, steps=4)[1]
    process, trace = train(
        "module", script, *flags, "--stable_loss_steps", "2", "--stable_loss_images", "2", steps=4
    )
    assert trace == without and len(trace["losses"]) == (8 if mode == "accumulation" else 4)
    numbers = printed(process)
    assert list(numbers) == [2, 4] and all(
        0 < loss < 10 and 0 < plain < 10 and n == 2 for loss, plain, n in numbers.values()
    )
    assert numbers[2] != numbers[4]


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_number_is_of_the_images_whatever_the_batch_and_order(train, assets, tmp_path, script):  # noqa: F811
    """All six images, in three shapes, at the same weights and with the same latents; every batch size and
    seed has another order."""
    shutil.copytree(assets / "images", tmp_path / "images")
    toml = (
        (assets / "dataset.toml")
        .read_text()
        .replace(str(assets / "images"), str(tmp_path / "images"))
        .replace("num_repeats = 2", "")
    )
    found = []
    for size, seed, steps in ((2, 7, 12), (1, 7, 24), (2, 8, 12)):
        (tmp_path / "dataset.toml").write_text(toml.replace("batch_size = 2", f"batch_size = {size}"))
        flags = (
            "--dataset_config",
            str(tmp_path / "dataset.toml"),
            *STANDSTILL,
            *CACHES,
            "--cache_latents_to_disk",
            "--seed",
            str(seed),
        )
        process, _ = train(
            "module", script, *flags, "--stable_loss_steps", "12", "--stable_loss_images", "6", steps=steps
        )
        found.append(printed(process)[steps])
    assert all(n == 6 for *_, n in found) and [loss for loss, *_ in found] == pytest.approx(
        [found[0][0]] * 3, rel=1e-5
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_tracker_gets_every_number_at_its_step(train, tmp_path, script):  # noqa: F811
    tracking = ("--logging_dir", str(tmp_path / "logs"), "--log_with", "tensorboard")
    process, _ = train(
        "module", script, *tracking, "--stable_loss_steps", "3", "--stable_loss_images", "2", steps=6
    )
    found = logged(tmp_path / "logs")
    assert list(found["stable_loss/loss"]) == [3, 6]
    assert [found["stable_loss/loss"][step] for step in (3, 6)] == pytest.approx(
        [loss for loss, *_ in printed(process).values()], rel=1e-6
    )
    points = [tag for tag in found if tag.startswith("stable_loss/loss_unweighted/t")]
    assert len(points) == 10 and "stable_loss/loss_unweighted/t999" in points
    mean = sum(found[point][6] for point in points) / 10
    assert mean == pytest.approx(found["stable_loss/loss_unweighted"][6], rel=1e-5)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_resumed_run_goes_on_with_the_images_of_the_first(train, tmp_path, script):  # noqa: F811
    flags = (
        "--stable_loss_steps",
        "2",
        "--stable_loss_images",
        "4",
        *STANDSTILL,
        "--save_state",
        "--save_every_n_steps",
        "2",
    )
    first = printed(train("module", script, *flags, steps=2)[0])
    state = shutil.move(next((tmp_path / "out").glob("*-state")), tmp_path / "state")
    again = ("--resume", str(state), "--seed", "8")
    process, trace = train("module", script, *flags, *again, steps=4)
    resumed = printed(process)
    assert resumed and {loss for loss, *_ in resumed.values()} == {first[2][0]}
    assert trace == train("unpatched", script, *flags[4:], *again, steps=4)[1]
    (tmp_path / "out" / "stable_loss_1_of_1.pt").unlink()
    process = train("module", script, *flags, *again, steps=4)[0]
    assert "no images of an earlier stable loss here" in process.stderr
    assert {loss for loss, *_ in printed(process).values()} != {first[2][0]}


def test_two_processes_share_the_images(train, monkeypatch):  # noqa: F811
    """sdxl_train.py alone: upstream's network trainer does not start with two processes on the CPU."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    two = [sys.executable, *TWO]
    flags = ("--ddp_timeout", "5", *CACHES)
    without = train([*two, "unpatched"], "sdxl_train.py", *flags)[1]
    process, trace = train(
        [*two, "module"], "sdxl_train.py", *flags, "--stable_loss_steps", "3", "--stable_loss_images", "4"
    )
    assert trace == without and [n for *_, n in printed(process).values()] == [4]


def test_network_dropout_is_off_meanwhile(train, tmp_path):  # noqa: F811
    """A network that does something, at a learning rate that does nothing: the same number twice."""
    train("module", "sdxl_train_network.py", "--learning_rate", "1e-2", steps=2)
    flags = ("--network_weights", str(tmp_path / "out" / "out.safetensors"), *DROPOUT, *STANDSTILL)
    numbers = printed(
        train(
            "module",
            "sdxl_train_network.py",
            *flags,
            "--stable_loss_steps",
            "2",
            "--stable_loss_images",
            "4",
            steps=4,
        )[0]
    )
    assert numbers[2] == numbers[4]


def test_upstreams_own_validation_is_left_alone(train):  # noqa: F811
    own = ("--validation_split", "0.4", "--validate_every_n_steps", "2", "--validation_seed", "1")
    without = train("unpatched", "sdxl_train_network.py", *own, steps=4)[1]
    process, trace = train(
        "module",
        "sdxl_train_network.py",
        *own,
        "--stable_loss_steps",
        "2",
        "--stable_loss_images",
        "2",
        steps=4,
    )
    assert trace == without and list(printed(process)) == [2, 4]
