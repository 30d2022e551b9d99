"""--heldout_steps and --ema_decay in the real trainers: the training stays bit-identical, the held-out loss
is that of float64, the average that of the weights that were saved. Set SD_SCRIPTS."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from closed_form import average
from runs import _environment
from safetensors.torch import load_file
from stable_loss_output import logged
from test_real_trainer import assets, pytestmark, train  # noqa: F401  (fixtures)
from two_processes import TWO

from sdxl_fixes import NoiseSchedule
from sdxl_fixes.model_files.model_file import read_sampling

HERE = Path(__file__).resolve().parent
V = ("--zero_terminal_snr", "--v_parameterization")
EACH = ("--save_every_n_steps", "1", "--save_state")
ACCUMULATED = ("--cache_latents", "--gradient_accumulation_steps", "2")
CACHED = ("--cache_latents", "--cache_text_encoder_outputs", "--network_train_unet_only")
BRAIN = ("--mixed_precision", "bf16", "--full_bf16")
MODES = {
    "finetuning": ("sdxl_train.py", ACCUMULATED),
    "finetuning, bfloat16": ("sdxl_train.py", BRAIN),
    "LoRA": ("sdxl_train_network.py", (*CACHED, "--network_dropout", "0.3")),
    "LoRA, autocast": ("sdxl_train_network.py", (*CACHED, *BRAIN[:2])),
}


def printed(process):
    """step -> held-out loss."""
    found = re.findall(r"sdxl-fixes: step (\d+): held-out loss (\S+),", process.stderr)
    return {int(step): float(loss) for step, loss in found}


@pytest.fixture
def held(assets, tmp_path):  # noqa: F811
    """A folder of two pictures; the trainers still train on the originals."""
    folder = tmp_path / "held"
    folder.mkdir()
    for name in ("0", "3"):
        for end in ("png", "txt"):
            shutil.copy(assets / "images" / f"{name}.{end}", folder)
    return folder


@pytest.mark.parametrize("mode", MODES)
def test_losses_are_bit_identical_to_the_run_without(train, held, tmp_path, mode):  # noqa: F811
    script, upstream_s = MODES[mode]
    flags = (*upstream_s, "--logging_dir", str(tmp_path / "logs"), "--log_with", "tensorboard")
    without = train("unpatched", script, *upstream_s, steps=4)[1]
    ours = ("--heldout_steps", "2", "--heldout_dir", str(held), "--ema_decay", "0.9", "--ema_evaluated")
    process, trace = train("module", script, *flags, *ours, steps=4)
    for each in (trace, without):
        each.pop("prompts")  # ours are encoded, too
    assert trace == without
    numbers, found = printed(process), logged(tmp_path / "logs")
    assert list(numbers) == [2, 4] and all(0 < loss < 10 for loss in numbers.values())
    assert [found["heldout/loss"][step] for step in (2, 4)] == pytest.approx([*numbers.values()], rel=1e-6)
    assert len([tag for tag in found if tag.startswith("heldout/loss_unweighted/t")]) == 10


def test_the_loss_is_that_of_float64_by_kohya_s_own_functions(train, held, monkeypatch, tmp_path, assets):  # noqa: F811
    monkeypatch.setenv("TRACE_EVALUATED", "1")
    for file in held.glob("3.*"):
        file.unlink()
    flags = ("--learning_rate", "1e-30", "--heldout_steps", "1", "--heldout_dir", str(held))
    process, trace = train("module", "sdxl_train.py", *flags, steps=1)
    assert process.returncode == 0 and sum(len(t) for _, t in trace["evaluated"]) == 10
    command = [sys.executable, str(HERE / "heldout_loss.py"), str(assets), str(held / "0.png")]
    told = subprocess.run(
        [*command, str(tmp_path / "trace.json")],
        check=True,
        capture_output=True,
        text=True,
        env=_environment(None),
    )
    found = json.loads(told.stdout.splitlines()[-1])
    assert len(found) == 10 and printed(process)[1] == pytest.approx(sum(found.values()) / 10, rel=1e-5)


@pytest.mark.parametrize(
    ("script", "more"),
    [("sdxl_train.py", ()), ("sdxl_train_network.py", ()), ("sdxl_train_network.py", BRAIN)],
    ids=["finetuning", "LoRA", "LoRA, bfloat16"],
)
def test_the_average_is_the_closed_form_and_is_resumed(train, tmp_path, script, more):  # noqa: F811
    """Two steps, then two from their state: the average of all four (rounded, where the weights are)."""
    flags, recorded = (*V, "--ema_decay", "0.25", "--learning_rate", "1e-2", *EACH, *more), []
    out = tmp_path / "out"
    for resume in ((), ("--resume", str(tmp_path / "state"))):
        steps = 4 if resume and script == "sdxl_train_network.py" else 2  # that counts on
        assert train("module", script, *flags, *resume, steps=steps)[0].returncode == 0
        files = [file for file in sorted(out.glob("out-step*.safetensors")) if "-ema" not in file.name]
        recorded += [{name: w.clone() for name, w in load_file(file).items()} for file in files]
        if not resume:
            shutil.move(out / "out-step00000002-state", tmp_path / "state")
            shutil.rmtree(out)
    found = load_file(out / "out-ema.safetensors")
    assert len(recorded) >= 4
    changed = [
        name for name in found if found[name].numel() and (recorded[0][name] != recorded[-1][name]).any()
    ]
    assert len(changed) > 20 and sorted(found) == sorted(recorded[0])
    for name in changed:
        exact = average([weights[name] for weights in recorded], 0.25)
        rounding = 2**-8 * exact.abs() if found[name].dtype == torch.bfloat16 else 0.0
        assert ((found[name].double() - exact).abs() < 1e-6 + rounding).all()
        assert found[name].dtype == (torch.bfloat16 if more else torch.float32)
    said = read_sampling(out / "out-ema.safetensors")
    assert (
        said.prediction_type == "v_prediction" and said.schedule == NoiseSchedule.sdxl().zero_terminal_snr()
    )


def test_the_split_of_kohya_s_own_is_held_out_of_finetuning(train):  # noqa: F811
    process, _ = train("module", "sdxl_train.py", "--heldout_steps", "2", "--heldout_split", "0.35", steps=2)
    assert "2 pictures are held out" in process.stderr and list(printed(process)) == [2]
    process, _ = train("module", "sdxl_train.py", "--heldout_steps", "2", steps=2, check=False)
    assert process.returncode != 0 and "no picture is held out: give --heldout_dir" in process.stderr


@pytest.mark.slow
def test_two_processes_have_one_average_and_the_loss_of_one(train, held, tmp_path, monkeypatch):  # noqa: F811
    """Against one process with the same batches: --exact_resume deals them, and every batch's draws are its
    own. (Upstream's network trainer does not start with two processes on the CPU.)"""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("TRACE_AVERAGE", "1")
    two = [sys.executable, *TWO, "module"]
    flags = (
        *("--exact_resume", "--ema_decay", "0.25", "--optimizer_type", "SGD", "--learning_rate", "0.1"),
        *("--heldout_steps", "1", "--heldout_dir", str(held), "--ema_evaluated", "--max_grad_norm", "0"),
    )
    found, out = [], tmp_path / "out"
    for how, more in ((two, ("--ddp_timeout", "5")), ("module", ("--gradient_accumulation_steps", "2"))):
        process, _ = train(how, "sdxl_train.py", *flags, *more, steps=3)
        ranks = [torch.load(file) for file in sorted(tmp_path.glob("trace.json.*.pt"))]
        names = sorted(file.name for file in out.glob("*.safetensors"))
        assert names == ["out-ema.safetensors", "out.safetensors"]
        assert all(map(torch.equal, ranks[0], ranks[-1])) and len(ranks[0]) > 100
        found.append((printed(process), len(ranks), load_file(out / "out-ema.safetensors")))
        shutil.rmtree(out)
        for file in tmp_path.glob("trace.json.*.pt"):
            file.unlink()
    (losses, processes, both), (right, _, alone) = found
    assert processes == 2 and list(losses) == [1, 2, 3]
    assert [*losses.values()] == pytest.approx([*right.values()], rel=1e-5)
    assert len(set(losses.values())) == 3
    for name, weights in alone.items():
        assert torch.allclose(both[name], weights, rtol=1e-5, atol=1e-6), name
