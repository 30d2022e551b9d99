"""Densities of noise levels: scipy's distributions and diffusers' own draws, in the cells of schedules."""

import math

import numpy as np
import pytest
import torch
from closed_form import alphas_cumprod
from scipy import integrate, special, stats

from sdxl_fixes import NoiseSchedule
from sdxl_fixes.densities import MOST_MODE_SCALE, Beta, Laplace, LogitNormal, Mode, shifted_rows

SDXL, ZTSNR = NoiseSchedule.sdxl(), NoiseSchedule.sdxl().zero_terminal_snr()
SCHEDULES = {
    "sdxl": (SDXL, alphas_cumprod()),
    "ztsnr": (ZTSNR, alphas_cumprod(zero_snr=True)),
    "300": (SDXL.with_terminal_sigma(300), alphas_cumprod(sigma=300)),
    "flow": (NoiseSchedule.flow(3), None),
}
# density -> scipy's distribution of logit s = -log SNR/2, or of s
LOGIT = {
    LogitNormal(): stats.norm(),
    LogitNormal(-0.7, 0.4): stats.norm(-0.7, 0.4),
    Laplace(): stats.laplace(scale=0.25),
    Laplace(1.5, 2.0): stats.laplace(-0.75, 1.0),
}
LEVEL = {
    Beta(): stats.uniform(),
    Beta(2, 5): stats.beta(2, 5),
    Beta(0.5, 0.3): stats.beta(0.5, 0.3),
    Beta(30, 12.5): stats.beta(30, 12.5),
    Mode(0.0): stats.uniform(),
}


def ends(name):
    """Where the cells begin and end: s, and 1 - s."""
    if name == "flow":
        u = np.arange(1, 1001) / 1000
        s, rest = 3 * u / (1 + 2 * u), (1 - u) / (1 + 2 * u)
    else:
        alpha, sigma = SCHEDULES[name][1].sqrt().numpy(), (1 - SCHEDULES[name][1]).sqrt().numpy()
        s, rest = sigma / (alpha + sigma), alpha / (alpha + sigma)
    found = []
    for x in (s, rest):
        middle = (x[1:] + x[:-1]) / 2
        first, last = x[0] + x[0] - middle[0], x[-1] + x[-1] - middle[-1]
        found.append(np.clip(np.concatenate([[first], middle, [last]]), 0, 1))
    return found


def expected(of, low, high):
    """Mass between neighbouring ends, from the nearer tail."""
    lower, upper = of.cdf(high) - of.cdf(low), of.sf(low) - of.sf(high)
    return np.where(of.cdf(high) < 0.5, lower, upper)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("density", [*LOGIT, *LEVEL], ids=str)
def test_a_rows_mass_is_scipys_between_the_ends_of_its_cell(density, schedule):
    s, rest = ends(schedule)
    if density in LOGIT:
        with np.errstate(divide="ignore"):
            logit = np.log(s) - np.log(rest)
        right = expected(LOGIT[density], logit[:-1], logit[1:])
    else:
        of = LEVEL[density]
        mirrored = stats.beta(density.beta, density.alpha) if isinstance(density, Beta) else of
        upper = expected(mirrored, rest[1:], rest[:-1])
        right = np.where(of.cdf(s[1:]) < 0.5, of.cdf(s[1:]) - of.cdf(s[:-1]), upper)
    masses = density.masses(SCHEDULES[schedule][0])
    assert masses.dtype == np.float64 and masses.shape == (1000,)
    # both are differences of neighbours: 1e-16 of the larger
    np.testing.assert_allclose(masses, right, rtol=1e-9, atol=1e-300)


@pytest.mark.parametrize("scale", [-1.0, -0.4, 1.29, MOST_MODE_SCALE])
def test_modes_mass_is_the_papers_map_inverted(scale):
    """F(s) is 1 - u where the paper's map of u is s: the map's own values put it to the test."""
    v = np.linspace(0, 1, 4001)[1:-1]
    s = v + scale * (np.cos(math.pi / 2 * v) ** 2 - 1 + v)  # 1 - the map of v, which is the map of 1 - v
    density = Mode(scale)
    assert np.all(np.diff(s) > -1e-15)
    found = density.below(s, 1 - s)
    ok = np.gradient(s, v) > 0.01  # where the map is flat, s says little of v
    np.testing.assert_allclose(found[ok], v[ok], atol=1e-12)
    assert density.below(np.array([0.0, 1.0]), np.array([1.0, 0.0])).tolist() == [0, 1]


@pytest.mark.parametrize("a", [0.01, 0.3, 1, 2.5, 40, 1000])
@pytest.mark.parametrize("b", [0.01, 0.7, 1, 6, 1000])
def test_incomplete_beta_is_scipys(a, b):
    s = np.concatenate([10.0 ** -np.arange(1, 12), np.linspace(0.001, 0.999, 200)])
    right = special.betainc(a, b, s)
    ok = right > 1e-100
    np.testing.assert_allclose(Beta(a, b).below(s, 1 - s)[ok], right[ok], rtol=1e-8)


@pytest.mark.parametrize(
    ("density", "flags"),
    [
        (LogitNormal(-0.5, 0.8), dict(weighting_scheme="logit_normal", logit_mean=0.5, logit_std=0.8)),
        (Mode(1.29), dict(weighting_scheme="mode", mode_scale=1.29)),
        (Beta(), dict(weighting_scheme="none")),
    ],
    ids=str,
)
def test_diffusers_own_draws_have_the_densities(density, flags):
    """Its scripts look u up in timesteps that fall, so their s is 1 - u: their logit_mean draws less
    noise."""
    try:
        from diffusers.training_utils import compute_density_for_timestep_sampling as draw
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"this diffusers has no densities, or does not import here: {error}")
    torch.manual_seed(0)
    s = 1 - draw(batch_size=200_000, **flags).numpy()
    edges = np.linspace(0.02, 0.98, 25)
    share = np.diff([np.mean(s < edge) for edge in edges])
    right = np.diff(density.below(edges, 1 - edges))
    np.testing.assert_allclose(share, right, atol=5 * np.sqrt(right.max() / 200_000))


def test_uniform_in_s_is_each_cells_width():
    s, _ = ends("sdxl")
    for density in (Beta(), Mode(0)):
        np.testing.assert_allclose(density.masses(SDXL), np.diff(s), rtol=1e-11)
    assert Beta().masses(SDXL).sum() == pytest.approx(s[-1] - s[0])  # what the table covers, not heaped


def test_a_density_is_the_same_noise_on_every_schedule():
    """The share of levels between sigma 0.5 and 2, by quadrature, within the width of a cell."""
    density, pdf = LogitNormal(0.3, 0.9), stats.norm(0.3, 0.9).pdf
    right = integrate.quad(pdf, math.log(0.5), math.log(2))[0]
    for schedule, _ in SCHEDULES.values():
        masses = density.masses(schedule)
        inside = (schedule.sigmas > 0.5) & (schedule.sigmas < 2)
        assert masses[inside].sum() == pytest.approx(right, abs=0.003)


def test_pure_noise_has_the_mass_of_its_cell():
    s, _ = ends("ztsnr")
    for density, right in ((Beta(), 1 - s[-2]), (Beta(1, 0.5), (1 - s[-2]) ** 0.5)):
        assert density.masses(ZTSNR)[-1] == pytest.approx(right, rel=1e-9) and s[-1] == 1


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: LogitNormal(math.nan), "logit_mean must be a number, got nan"),
        (lambda: LogitNormal(0, 0), "logit_std must be a positive number, got 0"),
        (lambda: Laplace(0, -1), "laplace_scale must be a positive number"),
        (lambda: Laplace(math.inf), "laplace_mean must be a number"),
        (lambda: Mode(1.8), r"mode_scale must lie in \[-1, 1.75194\], got 1.8"),
        (lambda: Mode(math.nan), "mode_scale must lie in"),
        (lambda: Beta(0, 1), r"beta_alpha must lie in \[0.01, 1000\], got 0"),
        (lambda: Beta(1, math.inf), "beta_beta must lie in"),
    ],
)
def test_nonsense_is_refused_in_a_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


# ---------------------------------------------------------------- resolution


@pytest.mark.parametrize("schedule", [SDXL, ZTSNR, NoiseSchedule.flow(1)], ids=["sdxl", "ztsnr", "flow"])
@pytest.mark.parametrize("ratio", [0.5, 0.9, 1.25, 2.0])
def test_a_shifted_row_is_the_nearest_to_sigma_times_the_ratio(schedule, ratio):
    rows = shifted_rows(schedule, ratio)
    with np.errstate(divide="ignore"):
        sigmas = np.sqrt(1 / schedule.alphas_cumprod - 1)
    for t in (*range(0, 1000, 83), 998, 999):
        wanted = 1 / (1 + 1 / (ratio * sigmas[t]))  # sigma'/(1 + sigma')
        distance = np.abs(1 / (1 + 1 / sigmas) - wanted)
        assert distance[rows[t]] <= distance.min() + 1e-15
    assert (rows[-1] == 999) == (ratio > 1 or schedule.zero_terminal)


def test_a_ratio_of_1_moves_nothing():
    for schedule, _ in SCHEDULES.values():
        assert shifted_rows(schedule, 1.0).tolist() == list(range(1000))
