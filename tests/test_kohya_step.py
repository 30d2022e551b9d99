"""The kohya adapter on a made-up trainer: every combination of what makes a step's loss against the closed form, in float64."""

import itertools

import numpy as np
import pytest
import torch
from made_up_trainer import build, forget, run, steps

SCRIPTS = ("sdxl_train.py", "sdxl_train_network.py")


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    yield build(tmp_path_factory.mktemp("trainer"))
    forget()


def tables(zero_snr, sigma=None):
    """alphas_cumprod by the formulas of arXiv:2305.08891 and of latent diffusion, float64."""
    abar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    if zero_snr:
        root = np.sqrt(abar)
        abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return torch.from_numpy(abar)


def expected(step, loss="l2", c=0.1, gradient=None, min_snr=None, floor=False, debiased=False, share=0.0, v=True, zero_snr=True):
    """The step's loss, from what the script recorded."""
    abar = tables(zero_snr)
    t, r = step["timesteps"], step["prediction"].double() - step["target"].double()
    column = (slice(None), None, None, None)
    snr = abar[t] / (1 - abar[t])
    delta = ((1 - c) / (1 + snr**-0.5) ** 2 + c)[column]
    root = torch.sqrt(r**2 + delta**2)
    rho = {"l2": r**2, "l1": r.abs(), "smooth_l1": 2 * (root - delta), "huber": 2 * delta * (root - delta)}[loss]
    slope = {"l2": 2 * r, "l1": r.sign(), "smooth_l1": 2 * r / root, "huber": 2 * delta * r / root}[loss]
    m = torch.ones(len(t), 1, 8, 8, dtype=torch.float64)
    if step["masks"] is not None:
        m = step["masks"].double().reshape(len(t), 1, 8, 2, 8, 2).mean((3, 5))
    w = torch.ones(len(t), dtype=torch.float64)
    if min_snr:
        w = w * ((snr + floor).clamp(max=min_snr) / (snr + 1) if v else min_snr / snr.clamp(min=min_snr))
    if debiased:
        w = w / (snr.clamp(max=1000) + 1 if v else snr.clamp(max=1000).sqrt())
    if share:
        above = (1 / abar - 1).sqrt() > 14.6146 + 1e-3
        p = (1 - share) / 1000 + share * above.double() / above.sum()
        w = w / (1000 * p[t])
    later = torch.ones(len(t), dtype=torch.float64) if step["later"] is None else step["later"].double()
    if gradient == "sample":
        gain = ((2 * r * m).flatten(1).norm(dim=1) / (slope * m).flatten(1).norm(dim=1))[column]
    elif gradient == "batch":
        total = (w * later)[column] * m
        gain = (2 * r * total).norm() / (slope * total).norm()
    else:
        gain = 1.0
    return float((rho * m * gain * (w * later)[column]).mean())


LOSSES = {
    **{loss: (["--loss_type", loss], dict(loss=loss)) for loss in ("l2", "l1", "huber", "smooth_l1")},
    **{
        f"{loss} {gradient}": (["--loss_type", loss, "--huber_l2_gradient", gradient], dict(loss=loss, gradient=gradient))
        for loss in ("huber", "smooth_l1")
        for gradient in ("sample", "batch")
    },
}
WEIGHTS = {
    "unweighted": ([], {}),
    "min-SNR": (["--min_snr_gamma", "5"], dict(min_snr=5.0)),
    "floor": (["--min_snr_gamma", "5", "--min_snr_floor"], dict(min_snr=5.0, floor=True)),
    "debiased": (["--debiased_estimation_loss"], dict(debiased=True)),
}
TIMESTEPS = {
    "uniform": ([], {}),
    "stratified": (["--stratified_timesteps"], {}),
    "terminal": (["--stratified_timesteps", "--terminal_timestep_share", "0.3"], dict(share=0.3)),
}
MASKS = {"whole": [], "masked": ["--masked_loss"]}
PRIOR = {"alone": [], "prior": ["--regularise", "--prior_loss_weight", "0.25"]}
V = ["--zero_terminal_snr", "--v_parameterization"]


FACTORS = (LOSSES, WEIGHTS, TIMESTEPS, MASKS, PRIOR)


def combinations(script):
    """Every combination that the script can be given: upstream's full finetune knows no loss weights."""
    return [row for row in itertools.product(*FACTORS) if row[4] == "alone" or script != "sdxl_train.py"]


def covering(rows, strength=3):
    """Some of ``rows`` in which every ``strength`` values of different factors that occur together do so at least once, greedily."""
    sets = {row: {tuple(zip(places, (row[k] for k in places), strict=True)) for places in PLACES[strength]} for row in rows}
    open_ = set().union(*sets.values())
    while open_:
        best = max(rows, key=lambda row: len(sets[row] & open_))
        open_ -= sets[best]
        yield best


PLACES = {strength: list(itertools.combinations(range(len(FACTORS)), strength)) for strength in (2, 3)}


def check(trainer, script, row):
    """One combination's losses against the closed form."""
    parts = [factor[name] for factor, name in zip(FACTORS[:3], row[:3], strict=True)]
    run(trainer, script, *V, *(flag for part in parts for flag in part[0]), *MASKS[row[3]], *PRIOR[row[4]])
    form = {key: value for part in parts for key, value in part[1].items()}
    recorded = steps(trainer)
    assert len(recorded) == 3
    for step in recorded:
        assert float(step["loss"]) == pytest.approx(expected(step, **form), rel=2e-5), row


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_triple_of_what_makes_a_loss_is_the_closed_form(trainer, script):
    for row in covering(combinations(script)):
        check(trainer, script, row)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_combination_is_the_closed_form(trainer, script):
    for row in combinations(script):
        check(trainer, script, row)
