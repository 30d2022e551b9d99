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
def test_the_average_is_the_closed_form(run, tmp_path, script):  # noqa: F811
    flags, (model, average) = (*V, "--ema_decay", "0.25", "--checkpointing_steps", "1"), FILES[script]
    run("module", script, *flags, steps=4, folder="a")
    process, _ = run("module", script, *flags, "--resume_from_checkpoint", "latest", check=False, folder="b")
    assert process.returncode == 2 and "the average of a resumed run" in process.stderr
    (out,) = {file.parent for file in tmp_path.rglob("checkpoint-4")}
    recorded = [load_file(out / f"checkpoint-{n}" / model) for n in range(1, 5)]
    found = load_file(out / average)
    changed = [name for name in found if (recorded[0][name] != recorded[3][name]).any()]
    assert len(changed) > 3 and sorted(found) == sorted(recorded[0])
    for name in changed:
        expected = 0.0
        for d, weights in zip((0.0, 2 / 11, 0.25, 0.25), recorded, strict=True):
            expected = d * expected + (1 - d) * weights[name].double()
        assert (found[name].double() - expected).abs().max() < 1e-6
    said = read_sampling(out / average)
    assert (
        said.prediction_type == "v_prediction" and said.schedule == NoiseSchedule.sdxl().zero_terminal_snr()
    )


def test_the_script_s_own_average_is_respected(run):  # noqa: F811
    process, _ = run("module", "t2i", "--use_ema", "--ema_decay", "0.9", steps=1, check=False)
    assert process.returncode == 2 and "own --use_ema both keep an average" in process.stderr
