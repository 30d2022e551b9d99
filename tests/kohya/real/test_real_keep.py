"""--keep_base in the real trainers: the loss that the frozen base, asked beside them in float64, makes it.
Set SD_SCRIPTS."""

import re

import frozen_base
import pytest
import torch
from closed_form import alphas_cumprod, loss
from test_real_trainer import assets, pytestmark, train  # noqa: F401  (fixtures)

V = ("--zero_terminal_snr", "--v_parameterization")
SCRIPTS = ("sdxl_train.py", "sdxl_train_network.py")
UNET_ONLY = {"sdxl_train.py": (), "sdxl_train_network.py": ("--network_train_unet_only",)}
FIXES = ("--loss_type", "huber", "--min_snr_gamma", "5", "--min_snr_floor", "--ip_noise_gamma", "0.1")
MODES = {
    "plain": (),
    "cached": ("--cache_latents",),
    "checkpointing": ("--gradient_checkpointing",),
    "accumulation": ("--gradient_accumulation_steps", "2"),
    "stable loss": ("--stable_loss_steps", "2", "--stable_loss_images", "2"),
}
ADAPTERS = {
    "dropout": ("--network_dropout", "0.3"),
    "loha": ("--network_module", "networks.loha"),
    "lokr": ("--network_module", "networks.lokr"),
    "dylora": ("--network_module", "networks.dylora", "--network_args", "unit=2"),
    "convolutions": ("--network_args", "conv_dim=2", "conv_alpha=2"),
}


def right(trace, share, rel=2e-5, **form):
    abar, found = alphas_cumprod(zero_snr=True), []
    for (x0, noise, prediction, said), timesteps in zip(trace["tensors"], trace["timesteps"], strict=True):
        goal = frozen_base.target(said, x0, noise, timesteps, share)
        found.append(loss(torch.tensor(prediction), goal, torch.tensor(timesteps), abar, **form))
    assert len(found) >= 3 and trace["losses"] == pytest.approx(found, rel=rel)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_loss_is_of_the_frozen_base_s_target(train, script, mode):  # noqa: F811
    flags = (*V, *UNET_ONLY[script], *MODES[mode], "--learning_rate", "1e-2", "--keep_base", "0.75")
    right(train("module", script, *flags, steps=3, tensors="base")[1], 0.75)


@pytest.mark.parametrize("script", SCRIPTS)
def test_with_every_other_fix(train, script):  # noqa: F811
    process, trace = train(
        "module", script, *V, *UNET_ONLY[script], *FIXES, "--keep_base", "1", tensors="base"
    )
    right(trace, 1.0, loss="huber", min_snr=5.0, floor=True)
    copied = re.search(r"a frozen copy of the U-Net, [\d.]+ GB", process.stderr + process.stdout)
    assert bool(copied) == (script == "sdxl_train.py")


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_beside_every_network_of_kohya_s(train, adapter):  # noqa: F811
    flags = (
        *V,
        "--network_train_unet_only",
        *ADAPTERS[adapter],
        "--learning_rate",
        "1e-2",
        "--keep_base",
        "1",
    )
    process, trace = train("module", "sdxl_train_network.py", *flags, check=False, tensors="base")
    if "No module named 'networks." in process.stderr:
        pytest.skip("this version has no such network")
    assert process.returncode == 0, process.stderr[-3000:]
    right(trace, 1.0)


@pytest.mark.slow
def test_a_resumed_finetuning_has_the_base_and_not_the_state(train, tmp_path):  # noqa: F811
    first = train(
        "module", "sdxl_train.py", *V, "--keep_base", "1", "--save_state", "--learning_rate", "1e-2"
    )
    assert first[0].returncode == 0
    (state,) = (tmp_path / "out").glob("*-state")
    moved = tmp_path / "state"
    state.rename(moved)
    process, trace = train("module", "sdxl_train.py", *V, "--keep_base", "1", "--resume", str(moved), steps=1)
    without = train("module", "sdxl_train.py", *V, "--resume", str(moved), steps=1)[1]
    assert trace["losses"][0] != without["losses"][0]
    assert process.stderr.count("a frozen copy") + process.stdout.count("a frozen copy") == 1


def test_a_text_encoder_that_is_trained_is_refused(train):  # noqa: F811
    process, _ = train("module", "sdxl_train_network.py", *V, "--keep_base", "1", check=False)
    assert process.returncode == 2 and "give --network_train_unet_only" in process.stderr
