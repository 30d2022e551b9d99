"""Rectified flow in the unmodified SDXL example scripts of diffusers: the loss in closed form from the
recorded latents, noise and prediction, what the U-Net is given and told, validation images, and what is
saved. Set DIFFUSERS_EXAMPLES to run these."""

import os
import subprocess
import sys

import pytest
import run_script as runner
import torch
from closed_form import flow_alphas_cumprod, flow_levels, flow_rows

from sdxl_fixes import NoiseSchedule
from sdxl_fixes.checkpoint import Sampling
from sdxl_fixes.model_files.model_file import read_sampling

pytestmark = [
    pytest.mark.diffusers,
    pytest.mark.skipif("DIFFUSERS_EXAMPLES" not in os.environ, reason="set DIFFUSERS_EXAMPLES to run"),
]
FLOW = ("--prediction_type", "flow_prediction", "--flow_shift", "3")
WEIGHTED = ("--loss_type", "huber", "--snr_gamma", "5", "--min_snr_floor", "--stratified_timesteps")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return runner.assets(tmp_path_factory.mktemp("assets") / "made")


def right(trace, halves=False, **form):
    """The losses are the closed form; the U-Net was given (1 - s) x0 + s noise and told 1000 s."""
    told = trace["timesteps"]
    rows = [flow_rows(step, shift=3).tolist() for step in told]
    assert any(t != round(t) for step in told for t in step)  # not floored
    known = {**trace, "timesteps": rows}
    expected = runner.expected(known, flow_alphas_cumprod(3), halves=halves, v=False, flow=True, **form)
    assert trace["losses"] == pytest.approx(expected, rel=2e-5)
    names = ("latents", "noise", "noisy")
    for step, *tensors in zip(rows, *(trace["tensors"][name] for name in names), strict=True):
        latents, noise, noisy = (torch.tensor(tensor, dtype=torch.float64) for tensor in tensors)
        s = flow_levels(3)[step].reshape(-1, 1, 1, 1)
        assert torch.allclose(noisy, (1 - s) * latents + s * noise, rtol=1e-5, atol=1e-6)
    assert rows
    return True


PREVIEWS = {
    "dreambooth": "DPMSolverMultistepScheduler",  # of the class that the script asks for
    "t2i": "UniPCMultistepScheduler",
    "t2i_lora": "UniPCMultistepScheduler",
}


@pytest.mark.parametrize("script", PREVIEWS)
def test_the_loss_is_the_closed_form_and_validation_images_are_sampled_as_flow(made, tmp_path, script):
    process, trace = runner.run_script(
        *("module", script, made, tmp_path, *FLOW, *WEIGHTED),
        *("--validation_prompt", "a cat", "--num_validation_images", "1"),
        tensors=True,
    )
    assert right(trace, loss="huber", min_snr=5.0, floor=True) and len(trace["losses"]) == 3
    assert trace["previews"]
    for preview in trace["previews"]:
        assert preview["prediction_type"] == "flow_prediction" and preview["class"] == PREVIEWS[script]
    trained = Sampling(NoiseSchedule.flow(3), "flow_prediction")
    name = "unet/diffusion_pytorch_model" if script == "t2i" else "pytorch_lora_weights"
    assert read_sampling(tmp_path / "out" / f"{name}.safetensors") == trained
    assert "flow_prediction on shift 3" in process.stderr


OTHERS = ("controlnet", "instruct", "inversion", "advanced")


@pytest.mark.parametrize("script", OTHERS)
def test_the_other_scripts_train_flow(made, tmp_path, script):
    _, trace = runner.run_script("module", script, made, tmp_path, *FLOW, *WEIGHTED, tensors=True)
    assert right(trace, loss="huber", min_snr=5.0, floor=True)


@pytest.mark.parametrize("script", ["adapter", "lpl"])
def test_scripts_that_cannot_refuse_in_one_sentence(made, tmp_path, script):
    process, _ = runner.run_script("module", script, made, tmp_path, *FLOW, check=False)
    assert process.returncode == 2
    said = process.stderr.strip().splitlines()[-1]
    assert said.startswith("sdxl-fixes: this script") and "--prediction_type" in said


STOCK = """
import sys
sys.modules["sdxl_fixes"] = None  # as if it were not installed
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
told, forward = [], UNet2DConditionModel.forward
def traced(self, sample, timestep, *args, **kwargs):
    told.append(float(timestep))
    return forward(self, sample, timestep, *args, **kwargs)
UNet2DConditionModel.forward = traced
pipe = StableDiffusionXLPipeline.from_pretrained(sys.argv[1])
image = pipe("a cat", num_inference_steps=4, height=64, width=64, output_type="latent").images
config, finite = pipe.scheduler.config, bool(image.isfinite().all())
print(type(pipe.scheduler).__name__, config.prediction_type, config.flow_shift, told[0], finite)
"""


def test_the_saved_folder_is_sampled_as_flow_by_stock_diffusers(made, tmp_path):
    runner.run_script("module", "t2i", made, tmp_path, *FLOW, base="base-whole", steps=1)
    loaded = subprocess.run(
        [sys.executable, "-c", STOCK, str(tmp_path / "out")], capture_output=True, text=True, cwd=tmp_path
    )
    name, predicts, shift, first, finite = loaded.stdout.split() or [loaded.stderr[-2000:]] * 5
    assert (name, predicts, shift) == ("UniPCMultistepScheduler", "flow_prediction", "3.0")
    assert finite == "True"
    assert 990 < float(first) <= 1000  # stock UniPC begins a little below pure noise
