"""--heldout_steps and --ema_decay in the real scripts: the training stays bit-identical, the average is that
of the weights that were saved. Set DIFFUSERS_EXAMPLES."""

import shutil

import pytest
from safetensors.torch import load_file
from test_real_scripts import made, pytestmark, run  # noqa: F401  (fixtures)

from sdxl_fixes import NoiseSchedule
from sdxl_fixes.model_files.model_file import read_sampling

V = ("--zero_terminal_snr", "--prediction_type", "v_prediction")
# where a checkpoint has the model, and the finished run its average
FILES = {
    "t2i": ("unet/diffusion_pytorch_model.safetensors", "unet_ema/diffusion_pytorch_model.safetensors"),
    "t2i_lora": ("pytorch_lora_weights.safetensors", "ema/pytorch_lora_weights.safetensors"),
}


@pytest.fixture
def held(made, tmp_path):  # noqa: F811
    folder = tmp_path / "held"
    folder.mkdir()
    for number, file in enumerate(sorted((made / "plain").glob("*.png"))[:2]):
        shutil.copy(file, folder)
        (folder / file.name).with_suffix(".txt").write_text(f"picture {number}")
    return folder


@pytest.mark.parametrize("script", FILES)
def test_losses_are_bit_identical_to_the_run_without(run, held, script):  # noqa: F811
    ours = ("--heldout_steps", "2", "--heldout_dir", str(held), "--ema_decay", "0.9", "--ema_evaluated")
    without = run("unpatched", script, steps=4, folder="a")[1]
    process, trace = run("module", script, *ours, steps=4, folder="b")
    assert trace == without
    assert process.stderr.count(": held-out loss ") == 2 and "2 pictures are held out" in process.stderr


@pytest.mark.parametrize("script", FILES)
def test_the_average_is_the_closed_form(run, script, tmp_path):  # noqa: F811
    """Of all weights that were saved, before a stop and after. A resumed script begins its epoch anew and
    enters the last epoch with nothing left to do, where it makes a step past --max_train_steps, the fifth."""
    flags, (model, average) = (*V, "--ema_decay", "0.3", "--checkpointing_steps", "1"), FILES[script]
    out = tmp_path / "run" / "out"
    run("module", script, *flags, steps=2)
    assert _off(out, model, average, 2) < 1e-6
    run("module", script, *flags, "--resume_from_checkpoint", "latest", steps=4)
    assert _off(out, model, average, 5) < 1e-6
    said = read_sampling(out / average)
    assert (
        said.prediction_type == "v_prediction" and said.schedule == NoiseSchedule.sdxl().zero_terminal_snr()
    )


def _off(out, model, average, steps):
    """How far the average is from float64's of the checkpoints."""
    assert {file.name for file in out.glob("checkpoint-*")} == {f"checkpoint-{n + 1}" for n in range(steps)}
    recorded = [load_file(out / f"checkpoint-{n + 1}" / model) for n in range(steps)]
    found = load_file(out / average)
    changed = [name for name in found if (recorded[0][name] != recorded[-1][name]).any()]
    assert len(changed) > 3 and sorted(found) == sorted(recorded[0])
    expected = {name: weights.double() for name, weights in recorded[0].items()}
    for n, weights in enumerate(recorded[1:], 2):
        d = min(0.3, n / (9 + n))
        expected = {name: d * s + (1 - d) * weights[name].double() for name, s in expected.items()}
    return max(float((found[name].double() - expected[name]).abs().max()) for name in changed)


def test_the_script_s_own_average_is_respected(run):  # noqa: F811
    process, _ = run("module", "t2i", "--use_ema", "--ema_decay", "0.9", steps=1, check=False)
    assert process.returncode == 2 and "own --use_ema both keep an average" in process.stderr
