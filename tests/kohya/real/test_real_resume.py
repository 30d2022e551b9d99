"""--exact_resume in the real trainers: killed with SIGKILL at a step and resumed, the losses and the final
model are those of the run that nobody killed, bit for bit. Set SD_SCRIPTS."""

import shutil
import sys

import pytest
import torch
from stable_loss_output import logged
from test_real_heldout import held  # noqa: F401  (a fixture)
from test_real_trainer import assets, pytestmark, train  # noqa: F401  (fixtures)
from two_processes import TWO

EXACT = ("--exact_resume", "--save_state", "--save_every_n_steps", "2")
SCRIPTS = ("sdxl_train.py", "sdxl_train_network.py")
V = ("--zero_terminal_snr", "--v_parameterization")
STEPS = 8
# flags, and the backward pass that kills the run: an epoch has 6 batches, those of drawn.toml 3
DRAWN = ("--dataset_config", "{assets}/drawn.toml")
WORKERS = ("--max_data_loader_n_workers", "2")
PREVIEWS = ("--sample_every_n_epochs", "1", "--sample_at_first", "--sample_prompts", "{assets}/prompts.txt")
# flags, and the backward pass that kills the run: an epoch has 6 batches, of what is drawn 3
MODES = {
    "plain": ((), 4),
    "an epoch's end": (("--save_every_n_epochs", "1"), 8),
    "drawn data, workers": ((*WORKERS, *DRAWN), 6),
    "persistent workers": ((*WORKERS, "--persistent_data_loader_workers"), 5),
    "accumulation, stratified": (("--gradient_accumulation_steps", "2", "--stratified_timesteps"), 11),
    "chunk buckets": (("--chunk_buckets", "--max_token_length", "225", *DRAWN), 7),
    "keep_base": ((*V, "--keep_base", "0.5"), 6),
    "cosine": (("--max_train_epochs", "2", "--lr_scheduler", "cosine", "--lr_warmup_steps", "2"), 9),
    "previews": (PREVIEWS, 6),
}


def drawn(folder):
    """The data set with everything that is drawn anew."""
    text = (folder / "dataset.toml").read_text()
    more = "random_crop = true\nflip_aug = true\nshuffle_caption = true\ncaption_dropout_rate = 0.3\n"
    (folder / "drawn.toml").write_text(text.replace("num_repeats = 2", f"num_repeats = 1\n{more}"))


def of(script, flags):
    """The flags, with what the network trainer needs, and its dropout."""
    only = ("--network_train_unet_only",) if "--keep_base" in flags else ()
    return (*flags, "--network_dropout", "0.3", *only) if script == "sdxl_train_network.py" else flags


def tensors(file):
    """A file's bytes after its header, which holds times and session ids."""
    data = file.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


def names(folder):
    """What was saved, without the times in the previews' names."""
    return sorted(
        {file.name for file in folder.rglob("*.safetensors")}
        | {"_".join(file.stem.split("_")[:3]) for file in folder.rglob("*.png")}
    )


def last_state(folder):
    return max(file.parent for file in folder.glob("out-step*-state/sdxl_fixes.json"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_and_resumed_is_the_uninterrupted_run(
    train,  # noqa: F811
    assets,  # noqa: F811
    tmp_path,
    monkeypatch,
    script,
    mode,
):
    drawn(assets)
    flags, at = (*EXACT, *of(script, MODES[mode][0])), MODES[mode][1]
    whole, out = tmp_path / "whole", tmp_path / "out"
    right = train("module", script, *flags, steps=STEPS)[1]
    out.rename(whole)
    monkeypatch.setenv("KILL_AT", str(at))
    process, _ = train("module", script, *flags, steps=STEPS, check=False)
    assert process.returncode == -9, process.stderr[-3000:]
    monkeypatch.delenv("KILL_AT")
    resumed = train("module", script, *flags, "--resume", str(last_state(out)), steps=STEPS)[1]
    left = len(resumed["losses"])
    assert 0 < left < len(right["losses"])
    for what in ("losses", "timesteps", "contexts"):
        assert resumed[what] == right[what][-left:]
    assert names(out) == names(whole)
    assert tensors(out / "out.safetensors") == tensors(whole / "out.safetensors")


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_is_measured_and_averaged_goes_on_too(train, held, tmp_path, monkeypatch, script):  # noqa: F811
    """Stable and held-out loss, the average of the weights and the log, beside the training itself."""
    logs, out, whole = tmp_path / "logs", tmp_path / "out", tmp_path / "whole"
    flags = (
        *(*EXACT, "--stratified_timesteps", "--learning_rate", "1e-3"),
        *("--stable_loss_steps", "1", "--stable_loss_images", "2"),
        *("--heldout_steps", "1", "--heldout_dir", str(held), "--ema_decay", "0.5", "--ema_evaluated"),
        *("--logging_dir", str(logs), "--log_with", "tensorboard"),
        *of(script, ("--network_train_unet_only",) if script == "sdxl_train_network.py" else ()),
    )
    right = train("module", script, *flags, steps=4)[1]
    out.rename(whole)
    logs.rename(tmp_path / "logs of the whole")
    monkeypatch.setenv("KILL_AT", "4")
    assert train("module", script, *flags, steps=4, check=False)[0].returncode == -9
    monkeypatch.delenv("KILL_AT")
    shutil.rmtree(logs)
    resumed = train("module", script, *flags, "--resume", str(last_state(out)), steps=4)[1]
    assert resumed["losses"] == right["losses"][2:] and resumed["timesteps"] == right["timesteps"][2:]
    before, after = logged(tmp_path / "logs of the whole"), logged(logs)
    tags = [tag for tag in before if "loss" in tag]
    assert {"heldout/loss", "stable_loss/loss"} < {*tags} and len(set(before["heldout/loss"].values())) == 4
    for tag in tags:
        assert after[tag] and after[tag] == {step: before[tag][step] for step in after[tag]}
        assert len(after[tag]) == len([step for step in before[tag] if step > 2 or len(before[tag]) == 1])
    for name in ("out.safetensors", "out-ema.safetensors"):
        assert tensors(out / name) == tensors(whole / name)
    assert tensors(out / "out.safetensors") != tensors(out / "out-ema.safetensors")
    states = [folder / "out-step00000004-state" / "sdxl_fixes_ema.pt" for folder in (out, whole)]
    averages = [torch.load(state, weights_only=True)["shadow_params"] for state in states]
    assert len(averages[0]) > 20 and all(map(torch.equal, *averages))


def test_an_unfinished_state_is_never_taken_for_a_whole_one(train, tmp_path, monkeypatch):  # noqa: F811
    script, out = "sdxl_train_network.py", tmp_path / "out"
    monkeypatch.setenv("KILL_IN_STATE", "out-step00000002-state")
    process, _ = train("module", script, *EXACT, steps=3, check=False)
    assert process.returncode == -9, process.stderr[-3000:]
    monkeypatch.delenv("KILL_IN_STATE")
    state = out / "out-step00000002-state"
    assert list(state.iterdir())  # begun
    process, _ = train("module", script, *EXACT, "--resume", str(state), steps=3, check=False)
    assert process.returncode == 1
    said = " ".join(process.stderr.split())
    assert f"--exact_resume: {state} holds no sdxl_fixes.json, so its writing was cut off" in said


def test_another_seed_and_other_data_are_refused(train, assets, tmp_path):  # noqa: F811
    drawn(assets)
    script, out = "sdxl_train_network.py", tmp_path / "out"
    train("module", script, *EXACT, steps=2)
    shutil.move(out / "out-step00000002-state", tmp_path / "state")
    resume = (*EXACT, "--resume", str(tmp_path / "state"))
    for flags, sentence in (
        (("--seed", "8"), "was trained with --seed 7, and this run has --seed 8"),
        (("--dataset_config", "{assets}/drawn.toml"), "was trained with other data"),
        (("--loss_type", "huber"), "was trained with no --loss_type, and this run is with --loss_type huber"),
        ((), "is at step 2 of 2, so nothing is left to train"),
    ):
        process, _ = train("module", script, *resume, *flags, steps=2 if not flags else 4, check=False)
        assert process.returncode == 1 and sentence in " ".join(process.stderr.split()), process.stderr[
            -2000:
        ]


@pytest.mark.slow
def test_two_processes_go_on_bit_for_bit_and_one_with_the_same_samples(train, tmp_path, monkeypatch):  # noqa: F811
    """sdxl_train.py alone: upstream's network trainer does not start with two processes on the CPU."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    two = [sys.executable, *TWO, "module"]
    flags = (*EXACT, "--stratified_timesteps")
    whole = train(two, "sdxl_train.py", *flags, "--ddp_timeout", "5", steps=4)[1]
    state = ("--resume", str(tmp_path / "out" / "out-step00000002-state"))
    again = train(two, "sdxl_train.py", *flags, "--ddp_timeout", "5", *state, steps=4)[1]
    assert again["losses"] == whole["losses"][2:] and again["timesteps"] == whole["timesteps"][2:]
    # an epoch has 3 steps of two batches, and the last two batches are left of it
    alone = train("module", "sdxl_train.py", *flags, *state, steps=4)[1]
    assert alone["prompts"][0] == whole["prompts"][2] and len(alone["losses"]) == 2
