"""Where the steps lie, against the definitions in closed form and diffusers' own spacings."""

import functools
import itertools
import math

import diffusers
import gaussian
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


def log_sigma_falls(schedule):
    """How far log sigma falls after each timestep, from the last; for ever at both ends, as its neighbour
    then."""
    log_sigmas = [math.log(sigma) if sigma < math.inf else math.inf for sigma in schedule.sigmas]
    falls = [log_sigmas[t] - log_sigmas[t - 1] for t in range(len(schedule) - 1, 0, -1)]
    if math.isinf(falls[0]):
        falls[0] = falls[1] if len(falls) > 1 else 1.0
    return [*falls, falls[-1]]


def density(u):
    """first_order's, as its page has it; the difference of two hyperbolic tangents without cancellation."""
    low, high = math.log(0.25), math.log(128)
    return 1 / np.sqrt(np.cosh(u - low) * np.cosh(u - high))


@functools.cache
def first_order_falls(schedule):
    """The integral of its density over each gap, by the midpoints of 64 parts of each; e^-20 ends it."""
    ends = np.clip(np.append(schedule.log_sigmas[::-1], -math.inf), -22, 25)
    falls = []
    for above, below in itertools.pairwise(ends):
        parts = 64 if above - below < 1 else 4000
        u = below + (above - below) * (np.arange(parts) + 0.5) / parts
        falls.append(float(density(u).sum() * (above - below) / parts))
    return falls


@given(
    name=st.sampled_from(sorted(SCHEDULES)),
    spacing=st.sampled_from(["log_sigma", "first_order"]),
    data=st.data(),
)
def test_our_spacings_share_their_measure_out_evenly(name, spacing, data):
    """Against the definition, with the share found by bisection: timestep i lies within half a step of i
    shares."""
    schedule = SCHEDULES[name]
    steps = data.draw(st.integers(1, len(schedule)))
    falls = (log_sigma_falls if spacing == "log_sigma" else first_order_falls)(schedule)
    low, high = 0.0, sum(falls)
    for _ in range(100):
        share = (low + high) / 2
        low, high = (share, high) if sum(min(fall, share) for fall in falls) > steps * share else (low, share)
    passed = np.concatenate(([0.0], np.cumsum([min(fall, share) for fall in falls])))[:-1] / share
    at = len(schedule) - 1 - timesteps(schedule, steps, spacing)
    assert np.abs(passed[at] - np.arange(steps)).max() <= 0.5 + (
        1e-6 if spacing == "log_sigma" else 0.005
    )  # quadrature


def spread(schedule, steps, spacing, scale, fresh=False):
    """What a perfect model of N(0, scale^2) returns of it in first-order steps, in closed form: the product
    of cos(phi - phi') with tan(phi) = sigma/scale; with fresh noise, from variances, with c = cos(phi)^2:
    1 - sum (c' - c)^2/(1 - c)."""
    phi = np.arctan(np.append(schedule.sigmas[timesteps(schedule, steps, spacing)], 0) / scale)
    c = np.cos(phi) ** 2
    noisy = math.sqrt(1 - float((np.diff(c) ** 2 / (1 - c[:-1])).sum()))
    return noisy if fresh else float(np.cos(np.diff(phi)).prod())


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("name", ["zero snr", "flow"])
def test_first_order_loses_less_at_every_scale_and_nobody_can_lose_little(name, fresh):
    schedule = SCHEDULES[name]
    for scale in 2.0 ** np.arange(7):
        ours, even = (spread(schedule, 25, one, scale, fresh) for one in ("first_order", "log_sigma"))
        assert even + (0.04 if fresh else 0.009) < ours < math.cos(math.pi / 50) ** 25 < 0.952
    # trailing keeps more at scale 1 and 4, and a few percent or little of brightness and of fine detail
    assert spread(schedule, 25, "trailing", 1, fresh) > spread(schedule, 25, "first_order", 1, fresh)
    for scale in (1 / 8, 1 / 4, 64, 128):
        assert spread(schedule, 25, "trailing", scale, fresh) < spread(
            schedule, 25, "first_order", scale, fresh
        )


def test_the_closed_form_of_a_spread_is_what_samplers_return():
    for name, fresh in (("ddim", False), ("euler", False), ("euler_a", True)):
        sampler = SCHEDULES["zero snr"].scheduler(name, "v_prediction")
        _, got = gaussian.sampled(
            sampler, SCHEDULES["zero snr"], "v_prediction", 25, samples=20000 if fresh else 2
        )
        expected = [spread(SCHEDULES["zero snr"], 25, "first_order", a, fresh) for a in gaussian.SCALES]
        assert got.tolist() == pytest.approx(expected, abs=0.01 if fresh else 1e-4)


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
    with pytest.raises(
        ValueError, match="unknown timestep_spacing 'sqrt': expected one of first_order, log_sigma"
    ):
        timesteps(STOCK, 10, "sqrt")
