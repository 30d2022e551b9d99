"""The kohya adapter on a made-up trainer: every combination of what makes a step's loss against the closed
form, in float64."""

import itertools

import pytest
import torch
from closed_form import (
    FLOW,
    LOSSES,
    TIMESTEPS,
    alphas_cumprod,
    covering,
    evenly,
    flow_alphas_cumprod,
    flow_rows,
    loss,
    nearest,
    weights,
)
from made_up_trainer import build, forget, run, steps

SCRIPTS = ("sdxl_train.py", "sdxl_train_network.py")


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    yield build(tmp_path_factory.mktemp("trainer"))
    forget()


def expected(step, flow=False, **form):
    """The step's loss, from what the script recorded."""
    mask = step["masks"]
    if mask is not None:
        mask = mask.double().reshape(-1, 1, 8, 2, 8, 2).mean((3, 5))  # as large as the latents
    rows, abar = step["timesteps"], alphas_cumprod(zero_snr=True)
    if flow:
        rows, abar = flow_rows(step["timesteps"], SHIFT), flow_alphas_cumprod(SHIFT)
    parts = (step["prediction"], step["target"], rows, abar)
    return loss(*parts, v=not flow, flow=flow, mask=mask, later=step["later"], **form)


MASKS = {"whole": [], "masked": ["--masked_loss"]}
PRIOR = {"alone": [], "prior": ["--regularise", "--prior_loss_weight", "0.25"]}
SHIFT = 3.0
PREDICTIONS = {
    "v, zero SNR": (["--zero_terminal_snr", "--v_parameterization"], {}),
    "flow": (["--prediction_type", "flow_prediction", "--flow_shift", str(SHIFT)], dict(flow=True)),
}
V = PREDICTIONS["v, zero SNR"][0]
FACTORS = (LOSSES, weights("--min_snr_gamma"), TIMESTEPS, MASKS, PRIOR, PREDICTIONS)


def combinations(script):
    """Every combination that the script can be given: upstream's full finetune knows no loss weights."""
    return [row for row in itertools.product(*FACTORS) if row[4] == "alone" or script != "sdxl_train.py"]


def check(trainer, script, row, *more):
    """One combination's losses, and those of ``more``, against the closed form."""
    parts = [*(factor[name] for factor, name in zip(FACTORS[:3], row[:3], strict=True)), PREDICTIONS[row[5]]]
    parts += more
    run(trainer, script, *(flag for part in parts for flag in part[0]), *MASKS[row[3]], *PRIOR[row[4]])
    form = {key: value for part in parts for key, value in part[1].items()}
    recorded = steps(trainer)
    assert len(recorded) == 3
    for step in recorded:
        assert float(step["loss"]) == pytest.approx(expected(step, **form), rel=2e-5), row
        if row[5] == "flow":  # x = (1 - s) x0 + s noise = x0 + s (noise - x0), told 1000 s
            s = step["timesteps"].double().reshape(-1, 1, 1, 1) / 1000
            moved = step["latents"].double() + s * step["target"].double()
            assert torch.allclose(step["noisy"].double(), moved, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_triple_of_what_makes_a_loss_is_the_closed_form(trainer, script):
    for row in covering(combinations(script)):
        check(trainer, script, row)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_combination_is_the_closed_form(trainer, script):
    for row in combinations(script):
        check(trainer, script, row)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("row", [("l2", "stratified", "masked"), ("huber batch", "terminal", "whole")])
def test_flow_weighting_multiplies_any_loss(trainer, script, row):
    check(trainer, script, (row[0], "unweighted", *row[1:], "alone", "v, zero SNR"), FLOW)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("share", [None, "0.2"])
def test_a_smaller_canvas_sees_less_noise(trainer, script, share):
    """The made-up latents, 8 x 8, are of 64 x 64 pixels: half the side of the base, so half of sigma; the
    importance weights are then those of several timesteps that became one."""
    flags = [*V, "--stratified_timesteps"]
    flags += ["--timestep_density", "beta", "--timestep_uniform_share", share] if share else []
    flags += ["--timestep_density_weighted"] if share else []
    run(trainer, script, *flags)
    drawn = [step["timesteps"] for step in steps(trainer)]
    run(trainer, script, *flags, "--resolution_shift", "128")
    abar = alphas_cumprod(zero_snr=True)
    become = nearest(torch.arange(1000), abar, 0.5)
    for step, timesteps in zip(steps(trainer), drawn, strict=True):
        seen = step["timesteps"]
        assert torch.equal(seen, nearest(timesteps, abar, 0.5)) and not torch.equal(seen, timesteps)
        weights = torch.ones(len(seen), dtype=torch.float64)
        if share:
            count = torch.bincount(become, minlength=1000)
            weights = count[seen] / 1000 / torch.bincount(become, evenly(abar, 0.2), minlength=1000)[seen]
        assert float(step["loss"]) == pytest.approx(expected(step, u=weights), rel=2e-5)
