"""Where the steps lie, against the definitions in closed form and diffusers' own spacings."""

import math

import diffusers
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdxl_fixes import NoiseSchedule
from sdxl_fixes.spacing import SPACINGS, timesteps

STOCK = NoiseSchedule.sdxl()
SCHEDULES = {
    "stock": STOCK,
    "beta_end 300": STOCK.with_terminal_sigma(300, "beta_end"),
    "rescale 20000": STOCK.with_terminal_sigma(20000, "rescale"),
    "tail 4096": STOCK.with_terminal_sigma(4096, "tail"),
    "last 20000": STOCK.with_terminal_sigma(20000, "last"),
    "zero snr": STOCK.zero_terminal_snr(),
    "last inf": STOCK.with_terminal_sigma(math.inf, "last"),
    "flow": NoiseSchedule.flow(3.0),
    "cosine 50": NoiseSchedule.cosine(num_timesteps=50),
    "two": NoiseSchedule.from_sigmas([1.0, math.inf]),
}


@given(name=st.sampled_from(sorted(SCHEDULES)), spacing=st.sampled_from(SPACINGS), data=st.data())
def test_any_number_of_steps_gives_that_many_falling_trained_timesteps(name, spacing, data):
    schedule = SCHEDULES[name]
    steps = data.draw(st.integers(1, len(schedule)))
    t = timesteps(schedule, steps, spacing)
    assert t.dtype == np.int64 and len(t) == steps
    assert (np.diff(t) < 0).all() and 0 <= t[-1] <= t[0] <= len(schedule) - 1
    if spacing != "leading":
        assert t[0] == len(schedule) - 1


@given(name=st.sampled_from(sorted(SCHEDULES)), data=st.data())
def test_log_sigma_shares_the_range_out_evenly(name, data):
    """Against the definition, with the share found by bisection: timestep i lies within half a step of i
    shares."""
    schedule = SCHEDULES[name]
    steps = data.draw(st.integers(1, len(schedule)))
    log_sigmas = [math.log(sigma) if sigma < math.inf else math.inf for sigma in schedule.sigmas]
    falls = [log_sigmas[t] - log_sigmas[t - 1] for t in range(len(schedule) - 1, 0, -1)]
    if math.isinf(falls[0]):
        falls[0] = falls[1] if len(falls) > 1 else 1.0
    falls.append(falls[-1])
    low, high = 0.0, sum(falls)
    for _ in range(100):
        share = (low + high) / 2
        low, high = (share, high) if sum(min(fall, share) for fall in falls) > steps * share else (low, share)
    passed = np.concatenate(([0.0], np.cumsum([min(fall, share) for fall in falls])))[:-1] / share
    at = len(schedule) - 1 - timesteps(schedule, steps)
    assert np.abs(passed[at] - np.arange(steps)).max() <= 0.5 + 1e-6


def test_log_sigma_is_even_where_timesteps_are_dense():
    steps = -np.diff(np.log(STOCK.sigmas[timesteps(STOCK, 10)]))
    assert steps == pytest.approx(np.full(9, np.log(STOCK.sigmas[999] / STOCK.sigmas[0]) / 10), rel=0.15)


def test_all_steps_are_all_timesteps():
    for schedule in SCHEDULES.values():
        for spacing in SPACINGS:
            assert timesteps(schedule, len(schedule), spacing).tolist() == list(range(len(schedule)))[::-1]


def test_a_wide_gap_is_one_step_and_its_neighbours_are_dense():
    assert timesteps(STOCK.with_terminal_sigma(20000, "rescale"), 25)[:4].tolist() == [999, 998, 997, 996]


@pytest.mark.parametrize("steps", [1, 2, 7, 25, 30, 333, 1000])
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_the_spacings_in_t_are_diffusers(spacing, steps):
    theirs = diffusers.EulerDiscreteScheduler(
        timestep_spacing=spacing, steps_offset=1 if spacing == "leading" and steps < 1000 else 0
    )
    theirs.set_timesteps(steps)
    if spacing == "linspace" and steps == 1:
        assert timesteps(STOCK, 1, spacing).tolist() == [999]  # diffusers starts at 0, the clean end
    else:
        expected = np.round(theirs.timesteps.numpy()).astype(int)
        assert timesteps(STOCK, steps, spacing, theirs.config.steps_offset).tolist() == expected.tolist()


def test_karras_takes_the_nearest_trained_timesteps():
    theirs = diffusers.EulerDiscreteScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        use_karras_sigmas=True,
        sigma_max=STOCK.terminal_sigma,
        sigma_min=STOCK.sigmas[0],
    )
    theirs.set_timesteps(12)
    wanted = np.log(theirs.sigmas[:-1].numpy())
    nearest = [int(np.abs(np.log(STOCK.sigmas) - log_sigma).argmin()) for log_sigma in wanted]
    assert timesteps(STOCK, 12, "karras").tolist() == nearest


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_an_impossible_number_of_steps_is_refused(steps):
    with pytest.raises(ValueError, match=rf"steps must lie in 1..1000, the trained timesteps, got {steps}"):
        timesteps(STOCK, steps)


def test_an_unknown_spacing_is_refused():
    with pytest.raises(ValueError, match="unknown timestep_spacing 'sqrt': expected one of log_sigma"):
        timesteps(STOCK, 10, "sqrt")
