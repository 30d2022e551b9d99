"""The diffusers adapter on a made-up script: every combination of what makes a step's loss against the closed
form, in float64."""

import itertools

import pytest
import torch
from closed_form import FLOW, LOSSES, TIMESTEPS, alphas_cumprod, covering, evenly, loss, nearest, weights
from made_up_script import environment, model, run

# name -> (flags, schedule, v-prediction); the second ends at sigma 300
V = ["--zero_terminal_snr", "--prediction_type", "v_prediction"]
EPSILON = ["--terminal_sigma", "300", "--terminal_sigma_method", "beta_end"]
SCHEDULES = {
    "v, zero SNR": (V, alphas_cumprod(zero_snr=True), True),
    "epsilon, 300": (EPSILON, alphas_cumprod(beta_end=0.02817676), False),
}
PRIOR = {"alone": [], "prior": ["--with_prior_preservation"]}
WEIGHTS = weights("--snr_gamma")
FACTORS = (LOSSES, WEIGHTS, TIMESTEPS, PRIOR, SCHEDULES)
ROWS = list(itertools.product(*FACTORS))


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """train(*flags): the steps that the script recorded."""
    folder = tmp_path_factory.mktemp("training")
    base = model(folder)
    with pytest.MonkeyPatch.context() as monkeypatch:
        environment(monkeypatch)
        yield lambda *flags: run(folder / "out", base, *flags)


def expected(step, prior, abar, v, **form):
    """The step's loss, from what the script recorded.

    With prior preservation each half is a loss of its own; the script adds them: "batch" means the half."""
    parts = (step["model_pred"], step["target"], step["timesteps"])
    halves = zip(*(part.chunk(2) for part in parts), strict=True) if prior else [parts]
    return sum(loss(*half, abar, v=v, **form) for half in halves)


def check(train, row, *more):
    """One combination's losses, and those of ``more``, against the closed form."""
    flags, abar, v = SCHEDULES[row[4]]
    parts = [*(factor[name] for factor, name in zip(FACTORS[:3], row[:3], strict=True)), *more]
    recorded = train(*flags, *(flag for part in parts for flag in part[0]), *PRIOR[row[3]])
    form = {key: value for part in parts for key, value in part[1].items()}
    assert len(recorded) == 2
    for step in recorded:
        right = expected(step, row[3] == "prior", abar, v, **form)
        assert step["loss"].item() == pytest.approx(right, rel=2e-5), row


def test_every_triple_of_what_makes_a_loss_is_the_closed_form(train):
    for row in covering(ROWS):
        check(train, row)


@pytest.mark.slow
def test_every_combination_is_the_closed_form(train):
    for row in ROWS:
        check(train, row)


@pytest.mark.parametrize("prior", PRIOR)
@pytest.mark.parametrize("timesteps", ["stratified", "terminal"])
@pytest.mark.parametrize("name", ["l2", "l1"])
def test_min_snr_with_a_timestep_sampler_weights_once(train, name, timesteps, prior):
    """Three fixes have their place in one function, F.mse_loss. Each once had a row of its own in the table:
    --snr_gamma with --stratified_timesteps trained on squared weights, and with prior preservation each half
    of a batch got the other's timesteps."""
    flags, abar, v = SCHEDULES["v, zero SNR"]
    sampled, form = TIMESTEPS[timesteps]
    form = dict(loss=name, min_snr=5.0, **form)
    for step in train(*flags, "--snr_gamma", "5", "--loss_type", name, *sampled, *PRIOR[prior]):
        once = expected(step, prior == "prior", abar, v, **form)
        assert step["loss"].item() == pytest.approx(once, rel=2e-5)
        if prior == "prior":
            first, second = step["timesteps"].chunk(2)
            swapped = expected({**step, "timesteps": torch.cat([second, first])}, True, abar, v, **form)
            assert swapped != pytest.approx(once, rel=1e-3)  # the mistake would be seen
        else:
            snr = abar[step["timesteps"]] / (1 - abar[step["timesteps"]])
            parts = (step["model_pred"], step["target"], step["timesteps"], abar)
            assert loss(*parts, later=snr.clamp(max=5) / (snr + 1), **form) < 0.95 * once


@pytest.mark.parametrize(
    "row",
    [
        ("l2", "unweighted", "stratified", "prior", "v, zero SNR"),
        ("huber batch", "unweighted", "terminal", "alone", "epsilon, 300"),
    ],
)
def test_flow_weighting_multiplies_any_loss(train, row):
    check(train, row, FLOW)


@pytest.mark.parametrize("share", [None, "0.2"])
def test_a_smaller_canvas_sees_less_noise(train, share):
    """The script's latents, 8 x 8, are of 64 x 64 pixels: half the side of the base, so half of sigma; the
    importance weights are then those of several timesteps that became one."""
    flags, abar, v = SCHEDULES["v, zero SNR"]
    flags = [*flags, "--stratified_timesteps"]
    if share:
        flags += [
            "--timestep_density",
            "beta",
            "--timestep_density_weighted",
            "--timestep_uniform_share",
            share,
        ]
    drawn, become = [step["timesteps"] for step in train(*flags)], nearest(torch.arange(1000), abar, 0.5)
    for step, timesteps in zip(train(*flags, "--resolution_shift", "128"), drawn, strict=True):
        seen = step["timesteps"]
        assert torch.equal(seen, nearest(timesteps, abar, 0.5)) and not torch.equal(seen, timesteps)
        weights = torch.ones(len(seen), dtype=torch.float64)
        if share:
            count = torch.bincount(become, minlength=1000)
            weights = count[seen] / 1000 / torch.bincount(become, evenly(abar, 0.2), minlength=1000)[seen]
        assert step["loss"].item() == pytest.approx(expected(step, False, abar, v, u=weights), rel=2e-5)


def test_the_shift_alone_draws_as_torch_does(train):
    """No other flag of the timesteps: the sampler's own draw is the script's torch.randint, too."""
    flags, abar, _ = SCHEDULES["v, zero SNR"]
    drawn = [step["timesteps"] for step in train(*flags)]
    for step, timesteps in zip(train(*flags, "--resolution_shift", "128"), drawn, strict=True):
        assert torch.equal(step["timesteps"], nearest(timesteps, abar, 0.5))
