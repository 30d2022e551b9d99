"""Rectified flow in the diffusers adapter, on the made-up script with a U-Net of diffusers' own class: what
it is told, the loss in closed form, what is refused, and what stock diffusers makes of the saved folder."""

import argparse
import itertools
import json

import pytest
import torch
from closed_form import LOSSES, TIMESTEPS, covering, flow_alphas_cumprod, flow_levels, loss, weights
from diffusers import DPMSolverMultistepScheduler, PNDMScheduler, UniPCMultistepScheduler
from made_up_script import environment, model, run

from sdxl_fixes import NoiseSchedule, schedulers
from sdxl_fixes.checkpoint import Sampling, sampling_of_config
from sdxl_fixes.diffusers import schedule
from sdxl_fixes.diffusers.anchors import computes_with_predictions
from sdxl_fixes.diffusers.flags import FLAGS_HERE
from sdxl_fixes.diffusers.run import SESSION, start
from sdxl_fixes.model_files.model_file import read_sampling
from sdxl_fixes.trainers.patching import PatchSet

SHIFT = 3.0
FLOW = ["--prediction_type", "flow_prediction", "--flow_shift", str(SHIFT), "--unet"]
WEIGHTS = weights("--snr_gamma") | {"soft": (["--soft_min_snr_gamma", "5"], dict(soft=5.0))}
PRIOR = {"alone": [], "prior": ["--with_prior_preservation"]}
DTYPES = {"float32": [], "bfloat16": ["--mixed_precision", "bf16"]}
PERTURBED = {"still": [], "perturbed": ["--ip_noise_gamma", "0.1", "--ip_noise_gamma_random_strength"]}
FACTORS = (LOSSES, WEIGHTS, TIMESTEPS, PRIOR, DTYPES, PERTURBED)
ROWS = list(itertools.product(*FACTORS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def train(folder):
    """train(*flags): the steps that the script recorded."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        environment(monkeypatch)
        yield lambda *flags, **base: run(folder / "out", model(folder, **base), *flags)


def check(train, row):
    """One combination: finite, told T s, aiming at noise - image, and of the closed form's loss."""
    parts = [factor[name] for factor, name in zip(FACTORS[:3], row[:3], strict=True)]
    form = {key: value for part in parts for key, value in part[1].items()}
    flags = [flag for part in parts for flag in part[0]]
    recorded = train(*FLOW, *flags, *PRIOR[row[3]], *DTYPES[row[4]], *PERTURBED[row[5]])
    assert len(recorded) == 2
    for step in recorded:
        s = flow_levels(SHIFT)[step["timesteps"]]
        assert step["told"].dtype == torch.float32, row
        assert torch.allclose(step["told"].double(), 1000 * s, rtol=1e-7, atol=0), row
        image, noise = step["model_input"].double(), step["noise"].double()
        assert step["target"].dtype == torch.float32, row
        assert torch.allclose(step["target"].double(), noise - image, rtol=1e-6, atol=1e-6), row
        if row[5] == "still":
            s = s.reshape(-1, 1, 1, 1)
            noisy = ((1 - s) * image + s * noise).to(step["noisy"].dtype).double()
            assert torch.allclose(step["noisy"].double(), noisy, rtol=1e-5, atol=1e-6), row
        names = ("model_pred", "target", "timesteps")
        halves = zip(*(step[name].chunk(2) for name in names), strict=True)
        halves = halves if row[3] == "prior" else [[step[name] for name in names]]
        right = sum(loss(*half, flow_alphas_cumprod(SHIFT), v=False, flow=True, **form) for half in halves)
        assert step["loss"].item() == pytest.approx(right, rel=2e-5), row


def test_every_pair_of_what_makes_a_step_is_the_closed_form(train):
    """Of some losses; the others are the same function of a residual and a delta."""
    some = [row for row in ROWS if row[0] in ("l2", "huber", "smooth_l1 batch")]
    for row in covering(some, strength=2):
        check(train, row)


@pytest.mark.slow
def test_every_combination_is_the_closed_form(train):
    assert len(ROWS) == 8 * 5 * 3 * 2 * 2 * 2
    for row in ROWS:
        check(train, row)


def test_the_saved_folder_and_lora_say_flow_to_stock_diffusers(train, folder):
    train(*FLOW)
    config = json.loads((folder / "out" / "scheduler" / "scheduler_config.json").read_text())
    assert config["_class_name"] == "UniPCMultistepScheduler"  # of which pipelines' folders are made
    stock = UniPCMultistepScheduler.from_config(config)
    assert stock.config.prediction_type == "flow_prediction" and stock.config.flow_shift == SHIFT
    trained = Sampling(NoiseSchedule.flow(SHIFT), "flow_prediction")
    assert sampling_of_config(config) == read_sampling(folder / "out" / "lora.safetensors") == trained
    before = json.loads((folder / "out" / "class_images" / "scheduler_config.json").read_text())
    assert before["prediction_type"] == "epsilon"  # made by the base model


def test_a_base_of_flow_is_trained_on_as_it_is(train):
    """Its shift, or another that is asked for."""
    match = dict(_class_name="FlowMatchEulerDiscreteScheduler", shift=2.0)
    unipc = dict(_class_name="UniPCMultistepScheduler", use_flow_sigmas=True, flow_shift=2.0)
    for config in (match, unipc):
        config = {**config, "prediction_type": "flow_prediction"}
        for flags, shift in ((FLOW[:2], 2.0), (FLOW[:4], SHIFT), (["--snr_gamma", "5"], 2.0)):
            for step in train(*flags, "--unet", **config):
                levels = flow_levels(shift)[step["timesteps"]]
                assert torch.allclose(step["told"].double(), 1000 * levels, rtol=1e-7, atol=0)


REFUSED = [
    (["--zero_terminal_snr"], "--zero_terminal_snr does not go with flow_prediction"),
    (["--do_edm_style_training"], "--do_edm_style_training noises by sigma, which is not flow_prediction"),
    (["--snr_gamma", "5", "--fixes", "all,-weighting"], "flow_prediction needs the fix 'weighting'"),
]


@pytest.mark.parametrize(("flags", "sentence"), REFUSED)
def test_what_makes_no_sense_with_flow_is_one_sentence(train, capsys, flags, sentence):
    with pytest.raises(SystemExit):
        train(*FLOW, *flags)
    assert sentence in capsys.readouterr().err.splitlines()[-1]


def test_a_base_of_flow_has_no_other_prediction(train, capsys):
    base = dict(_class_name="UniPCMultistepScheduler", use_flow_sigmas=True)
    with pytest.raises(SystemExit):
        train("--prediction_type", "v_prediction", **base, **{"prediction_type": "flow_prediction"})
    assert "--prediction_type v_prediction: the base model is rectified flow" in capsys.readouterr().err


def test_a_network_that_is_not_told_stops_the_training(train):
    """The made-up convolution is no U-Net of diffusers: nobody could tell it T s."""
    with pytest.raises(SystemExit, match=r"UNet2DConditionModel\.forward"):
        train(*FLOW[:-1])


def test_a_perceptual_loss_beside_it_is_told_by_its_source():
    assert computes_with_predictions("from lpl_loss import LatentPerceptualLoss")
    assert not computes_with_predictions("loss = F.mse_loss(model_pred, target)")


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        (DPMSolverMultistepScheduler, schedulers.DPMSolverMultistepScheduler),
        (UniPCMultistepScheduler, schedulers.UniPCMultistepScheduler),
        (PNDMScheduler, schedulers.UniPCMultistepScheduler),  # which cannot sample flow
    ],
)
def test_a_scheduler_that_the_script_makes_for_its_images_samples_flow_exactly(folder, asked, given):
    """As DreamBooth's, textual inversion's and ControlNet's scripts do with stock classes, whose
    use_flow_sigmas floors the timesteps."""
    flags = {name: flag.default for name, flag in FLAGS_HERE.items()}
    flags |= {"prediction_type": "flow_prediction", "flow_shift": SHIFT}
    base = str(model(folder))
    SESSION.begin(start(argparse.Namespace(**flags, pretrained_model_name_or_path=base), PatchSet(())))
    SESSION.script, config = globals(), SESSION.run.schedule.scheduler("unipc", "flow_prediction").config

    def from_config(config):  # where the patch stands
        return schedule.configured(lambda cls, config: cls.from_config(config), asked, config)

    try:
        assert type(from_config(config)) is asked  # images of the base model, before the training
        SESSION.training = True
        made = from_config(config)
    finally:
        SESSION.reset()
    assert type(made) is given
    made.set_timesteps(7)
    table = 1000 * flow_levels(SHIFT)
    assert made.timesteps[0] == 1000
    assert all((table - float(t)).abs().min() < 1e-3 for t in made.timesteps)
