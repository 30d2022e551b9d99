"""What a run says of its draws and weights, and what it refuses before anything is loaded."""

import argparse
from dataclasses import replace

import pytest

from sdxl_fixes import NoiseSchedule
from sdxl_fixes.checkpoint import Sampling
from sdxl_fixes.errors import FlagError
from sdxl_fixes.flags import TrainingFlags
from sdxl_fixes.trainers.fixes import Fix
from sdxl_fixes.trainers.report import disappointments, report
from sdxl_fixes.trainers.run import Trainer, prepare
from sdxl_fixes.trainers.stable_loss import StableLoss

TRAINER = Trainer("somebody/some-trainer", "--v", {"timesteps": Fix(), "weighting": Fix()})
ZTSNR = NoiseSchedule.sdxl().zero_terminal_snr()


def run(prediction_type="v_prediction", schedule=ZTSNR, args=None, **flags):
    flags = TrainingFlags(**flags)
    on = frozenset(["timesteps", "weighting"])
    weightings = tuple(flags.weightings.values())
    trained = Sampling(schedule, prediction_type)
    return prepare(TRAINER, args or argparse.Namespace(), on, {}, flags, trained, weightings)


@pytest.mark.parametrize(
    ("flags", "data", "warnings"),
    [
        (
            dict(timestep_density="logit_normal"),
            "timesteps, logit-normal, mean 0, std 1, so the expected loss is another\n",
            ["hardly draws the last timestep, where sampling begins on pure noise (0 times as often"],
        ),
        (
            dict(timestep_density="beta", timestep_density_weighted=True, stratified_timesteps=True),
            "over the optimizer step, beta, alpha 1, beta 1 (uniform in s), importance-weighted\n",
            [],
        ),
        (
            dict(timestep_density="laplace", timestep_density_weighted=True, timestep_uniform_share=0.1),
            "Laplace in log SNR, mean 0, scale 0.5 but for 10 % uniform, importance-weighted\n",
            ["the importance weights of --timestep_density laplace leave 21 % of the samples' worth"],
        ),
        (
            dict(timestep_density="mode", terminal_timestep_share=0.2, resolution_shift=1024),
            "mode, scale 1.29, so the expected loss is another, 20 % above SDXL's last sigma, "
            "importance-weighted, sigma times the canvas's side over 1024\n",
            [],
        ),
        (dict(resolution_shift=512), "timesteps, sigma times the canvas's side over 512\n", []),
        (dict(), "timesteps drawn uniformly\n", []),
    ],
    ids=str,
)
def test_the_draws_are_said_and_what_disappoints_in_them(flags, data, warnings):
    made = run(**flags)
    assert data in report(made, "")
    found = disappointments(made)
    assert len(found) == len(warnings) and all(a in b for a, b in zip(warnings, found, strict=True))


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (dict(max_train_steps=4), True),
        (dict(max_train_steps=5), False),
        (dict(max_train_steps=4, max_train_epochs=2), False),  # kohya: epochs overrule steps
        (dict(max_train_steps=None), False),
        (dict(), False),
    ],
    ids=str,
)
def test_a_training_too_short_for_its_stable_loss_is_told(args, said):
    made = replace(run(args=argparse.Namespace(**args)), stable_loss=StableLoss(None, 5, 4))
    sentence = "--stable_loss_steps 5: no number in a training of 4 steps: give fewer steps"
    assert disappointments(made) == [sentence] * said


def test_flows_weight_is_said_and_refused_where_it_means_nothing():
    assert "  weights    weighted as rectified flow's loss\n" in report(run(flow_weighting=True), "")
    with pytest.raises(FlagError, match="--flow_weighting: flow_prediction's loss is flow's already"):
        run("flow_prediction", flow_weighting=True)
    with pytest.raises(FlagError, match="--flow_weighting: epsilon has no flow loss at zero terminal SNR"):
        run("epsilon", flow_weighting=True)
    assert run("epsilon", NoiseSchedule.sdxl(), flow_weighting=True).weighting is not None
