"""Rectified flow in the unmodified trainers of sd-scripts: the loss in closed form from the recorded latents,
noise and prediction, what the U-Net is told, previews, and what is saved. Set SD_SCRIPTS to run these."""

import json
import subprocess
import sys

import checkouts
import pytest
import runs
from closed_form import flow_alphas_cumprod, flow_rows
from safetensors import safe_open

from sdxl_fixes import NoiseSchedule
from sdxl_fixes.checkpoint import Sampling
from sdxl_fixes.model_files.model_file import read_sampling

pytestmark = [
    pytest.mark.kohya,
    pytest.mark.skipif(not checkouts.named(), reason=checkouts.SKIP),
]
FLOW = ("--prediction_type", "flow_prediction", "--flow_shift", "3")
WEIGHTED = ("--loss_type", "huber", "--min_snr_gamma", "5", "--min_snr_floor", "--stratified_timesteps")


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    return runs.make_assets(tmp_path_factory.mktemp("kohya"))


def train(assets, folder, script, *flags, steps=3):
    process, trace = runs.run(
        "module", script, *FLOW, *flags, assets=assets, folder=folder, steps=steps, tensors=True
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stderr, trace


def right(trace, **form):
    """The losses are the closed form at the levels that the U-Net was told, in whatever timestep's row."""
    told = trace["timesteps"]
    rows = {**trace, "timesteps": [flow_rows(step, shift=3).tolist() for step in told]}
    assert trace["losses"] == pytest.approx(
        runs.expected(rows, flow_alphas_cumprod(3), flow=True, **form), rel=2e-5
    )
    assert trace["alphas_cumprod_999"] == trace["all_snr_999"] == 0
    assert any(t != round(t) for step in told for t in step)  # and not floored
    return True


@pytest.mark.parametrize("script", ["sdxl_train.py", "sdxl_train_network.py"])
def test_the_loss_is_the_closed_form_and_the_file_says_flow(assets, tmp_path, script):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cat --w 128 --h 128 --s 4 --d 1\n")
    preview = ("--sample_prompts", str(prompts), "--sample_every_n_steps", "3", "--sample_sampler", "euler")
    said, trace = train(assets, tmp_path, script, *WEIGHTED, *preview)
    assert right(trace, loss="huber", min_snr=5.0, floor=True)
    assert trace["preview"]["prediction_type"] == "flow_prediction"
    assert trace["preview"]["timesteps"][0] == 1000 and len(trace["preview"]["timesteps"]) == 4
    for part in ("flow_prediction on shift 3", "modelspec sd3", "previews sample the same"):
        assert part in said
    saved = tmp_path / "out" / "out.safetensors"
    assert read_sampling(saved) == Sampling(NoiseSchedule.flow(3), "flow_prediction")
    with safe_open(saved, "pt") as file:
        assert file.metadata()["modelspec.prediction_type"] == "sd3"
        assert not {"v_pred", "ztsnr"} & set(file.keys())
    inspected = subprocess.run(
        [sys.executable, "-m", "sdxl_fixes.cli", "inspect", str(saved)], capture_output=True, text=True
    ).stdout
    assert "flow_prediction" in inspected


def test_plain_flow_has_the_plain_loss(assets, tmp_path):
    """No loss and no weight of ours: upstream's own mse of our target."""
    assert right(train(assets, tmp_path, "sdxl_train.py")[1])


OTHERS = ("sdxl_train_textual_inversion.py", "sdxl_train_control_net.py", "sdxl_train_control_net_lllite.py")


@pytest.mark.parametrize("script", OTHERS)
def test_the_other_scripts_train_flow(assets, tmp_path, script):
    trace = train(assets, tmp_path, script, *WEIGHTED)[1]
    told = trace["timesteps"]
    if script == "sdxl_train_control_net.py":  # the ControlNet is told first
        assert told[::2] == told[1::2]
        trace["timesteps"] = told[1::2]
    assert right(trace, loss="huber", min_snr=5.0, floor=True)


STOCK = """
import sys
sys.modules["sdxl_fixes"] = None  # as if it were not installed
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
image = pipe("a cat", num_inference_steps=3, height=64, width=64, output_type="latent").images
config = pipe.scheduler.config
print(type(pipe.scheduler).__name__, config.prediction_type, config.flow_shift, bool(image.isfinite().all()))
"""


def test_a_diffusers_folder_is_sampled_as_flow_by_stock_diffusers(assets, tmp_path):
    base = ("--pretrained_model_name_or_path", str(assets / "diffusers"))
    train(assets, tmp_path, "sdxl_train.py", *base, "--save_model_as", "diffusers_safetensors", steps=1)
    folder = tmp_path / "out" / "out"
    loaded = subprocess.run([sys.executable, "-c", STOCK, str(folder)], capture_output=True, text=True)
    assert loaded.stdout.split() == ["UniPCMultistepScheduler", "flow_prediction", "3.0", "True"], (
        loaded.stderr[-2000:]
    )
    assert json.loads((folder / "model_index.json").read_text())["scheduler"][1] == "UniPCMultistepScheduler"


def test_the_trainers_own_validation_loss_is_of_flow(assets, tmp_path):
    """The network trainer fixes the timestep of a held-out image: the row, of which the U-Net is told T s."""
    flags = ("--validation_split", "0.3", "--validate_every_n_steps", "2", "--max_validation_steps", "1")
    said, trace = train(assets, tmp_path, "sdxl_train_network.py", *flags, steps=2)
    assert right(trace) and "nan" not in said.lower().partition("steps:")[2]
