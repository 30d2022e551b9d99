"""--exact_resume in the real trainers: killed with SIGKILL at a step, or while a state is being written, and
resumed, the losses and the final model are those of the run that nobody killed, bit for bit. Set SD_SCRIPTS."""

import json
import shutil
import sys
from collections import Counter

import checkouts
import pytest
from test_real_trainer import assets, pytestmark, train  # noqa: F401  (fixtures)

EXACT = ("--exact_resume", "--save_state", "--save_every_n_steps", "1")
SCRIPTS = ("sdxl_train.py", "sdxl_train_network.py")
V = ("--zero_terminal_snr", "--v_parameterization")
DROPS = ("--network_dropout", "0.3")
# name -> flags; what the script alone knows is added
MODES = {
    "plain": (),
    "drawn data, workers": ("--max_data_loader_n_workers", "2", "--dataset_config", "{assets}/drawn.toml"),
    "persistent workers": ("--max_data_loader_n_workers", "2", "--persistent_data_loader_workers"),
    "accumulation, stratified": ("--gradient_accumulation_steps", "2", "--stratified_timesteps"),
    "chunk buckets": ("--chunk_buckets", "--max_token_length", "225", "--dataset_config", "{assets}/drawn.toml"),
    "keep_base": (*V, "--keep_base", "0.5"),
    "epochs, cosine, previews": (
        *("--max_train_epochs", "3", "--lr_scheduler", "cosine", "--lr_warmup_steps", "2"),
        *("--sample_every_n_epochs", "1", "--sample_at_first", "--sample_prompts", "{assets}/prompts.txt"),
        *("--save_every_n_epochs", "1"),
    ),
}  # fmt: skip


def drawn(folder):
    """The data set with everything that is drawn anew."""
    text = (folder / "dataset.toml").read_text()
    more = 'random_crop = true\nflip_aug = true\nshuffle_caption = true\ncaption_dropout_rate = 0.3\n'
    (folder / "drawn.toml").write_text(text.replace("num_repeats = 2", f"num_repeats = 1\n{more}"))


def of(script, flags):
    if script == "sdxl_train_network.py":
        return (*flags, *DROPS, *(("--network_train_unet_only",) if "--keep_base" in flags else ()))
    return flags


@pytest.fixture
def whole(train, assets, tmp_path, monkeypatch):  # noqa: F811
    """whole(script, flags, steps): the trace of the run that nobody kills; its folder is kept as "whole"."""
    drawn(assets)

    def run(script, flags, steps):
        trace = train("module", script, *EXACT, *flags, steps=steps)[1]
        shutil.move(tmp_path / "out", tmp_path / "whole")
        return trace

    monkeypatch.setenv("PYTHONHASHSEED", "0")
    return run


def killed(train, tmp_path, monkeypatch, script, flags, steps, at):  # noqa: F811
    """The trace of a run that is killed at backward pass ``at``, resumed from its last whole state."""
    monkeypatch.setenv("KILL_AT", str(at))
    process, _ = train("module", script, *EXACT, *flags, steps=steps, check=False)
    assert process.returncode == -9, process.stderr[-3000:]
    monkeypatch.delenv("KILL_AT")
    states = sorted((tmp_path / "out").glob("out-step*-state"))
    state = next(state for state in reversed(states) if (state / "sdxl_fixes.json").is_file())
    return train("module", script, *EXACT, *flags, "--resume", str(state), steps=steps)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_and_resumed_is_the_uninterrupted_run(train, whole, tmp_path, monkeypatch, script, mode):  # noqa: F811
    flags, steps = of(script, MODES[mode]), 12
    right = whole(script, flags, steps)
    count = len(right["losses"])
    each = count // 3  # about an epoch's end
    for at in sorted({2 if "accumulation" not in mode else 3, each, each + 1, count - 1}):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        process, trace = killed(train, tmp_path, monkeypatch, script, flags, steps, at)
        left = len(trace["losses"])
        assert 0 < left < count and trace["losses"] == right["losses"][-left:], (at, process.stderr[-2000:])
        assert trace["timesteps"] == right["timesteps"][-left:]
        assert trace["prompts"] == right["prompts"][-len(trace["prompts"]) :]
        ours, theirs = ({p.name for p in (tmp_path / d).rglob("*")} for d in ("out", "whole"))
        assert {n for n in theirs if n.endswith(".safetensors")} == {n for n in ours if n.endswith(".safetensors")}
        model = [(tmp_path / d / "out.safetensors").read_bytes() for d in ("out", "whole")]
        assert tensors(model[0]) == tensors(model[1])


def tensors(data):
    """A file's bytes after its header, which holds times and session ids."""
    return data[8 + int.from_bytes(data[:8], "little") :]
