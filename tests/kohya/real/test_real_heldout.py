"""--heldout_steps and --ema_decay in the real trainers: the training stays bit-identical, the held-out loss
is that of float64, the average that of the weights that were saved. Set SD_SCRIPTS."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from runs import _environment
from safetensors.torch import load_file
from stable_loss_output import logged
from test_real_trainer import SCRIPTS, assets, pytestmark, train  # noqa: F401  (fixtures)

from sdxl_fixes import NoiseSchedule
from sdxl_fixes.model_files.model_file import read_sampling

HERE = Path(__file__).resolve().parent
V = ("--zero_terminal_snr", "--v_parameterization")
EACH = ("--save_every_n_steps", "1", "--save_state")
MODES = {
    "sdxl_train.py": ("--cache_latents", "--gradient_accumulation_steps", "2"),
    "sdxl_train_network.py": (
        *("--cache_latents", "--cache_text_encoder_outputs", "--network_train_unet_only"),
        *("--network_dropout", "0.3"),
    ),
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


@pytest.mark.parametrize("script", SCRIPTS)
def test_losses_are_bit_identical_to_the_run_without(train, held, tmp_path, script):  # noqa: F811
    flags = (*MODES[script], "--logging_dir", str(tmp_path / "logs"), "--log_with", "tensorboard")
    without = train("unpatched", script, *MODES[script], steps=4)[1]
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


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_average_is_the_closed_form_and_is_resumed(train, tmp_path, script):  # noqa: F811
    """Two steps, then two from their state: the average of all four."""
    flags, recorded = (*V, "--ema_decay", "0.25", "--learning_rate", "1e-2", *EACH), []
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
    ds = [0.0, *(min(0.25, n / (9 + n)) for n in range(2, len(recorded) + 1))]
    assert len(recorded) >= 4
    changed = [
        name for name in found if found[name].numel() and (recorded[0][name] != recorded[-1][name]).any()
    ]
    assert len(changed) > 20 and sorted(found) == sorted(recorded[0])
    for name in changed:
        average = 0.0
        for d, weights in zip(ds, recorded, strict=True):
            average = d * average + (1 - d) * weights[name].double()
        assert (found[name].double() - average).abs().max() < 1e-6
    said = read_sampling(out / "out-ema.safetensors")
    assert (
        said.prediction_type == "v_prediction" and said.schedule == NoiseSchedule.sdxl().zero_terminal_snr()
    )


def test_the_split_of_kohya_s_own_is_held_out_of_finetuning(train):  # noqa: F811
    process, _ = train("module", "sdxl_train.py", "--heldout_steps", "2", "--heldout_split", "0.35", steps=2)
    assert "2 pictures are held out" in process.stderr and list(printed(process)) == [2]
    process, _ = train("module", "sdxl_train.py", "--heldout_steps", "2", steps=2, check=False)
    assert process.returncode != 0 and "no picture is held out: give --heldout_dir" in process.stderr
