"""NoiseSchedule against closed forms, published numbers and diffusers' own tables."""

import copy
import dataclasses
import json
import math
import pickle

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from hypothesis import given, settings
from hypothesis import strategies as st

from sdxl_fixes import NoiseSchedule
from sdxl_fixes.schedule import Made

SDXL = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
}
STEADY = settings(max_examples=60)


def strict_json(text):
    """json.loads that refuses the NaN and Infinity that JSON does not have."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def sigmas_of(betas):
    """Sigmas without a product: log alpha_bar is a sum of log1p."""
    log_alpha_bar = np.cumsum(np.log1p(-np.asarray(betas, dtype=np.float64)))
    return np.sqrt(-np.expm1(log_alpha_bar)) / np.exp(log_alpha_bar / 2)


# ---------------------------------------------------------------- the three laws


@pytest.mark.parametrize(
    ("schedule", "residual", "snr", "sigma"),
    [
        (NoiseSchedule.sdxl(), 0.068265, 4.6819e-3, 14.6146),
        (NoiseSchedule.linear(), 0.006353, 4.036e-5, 157.41),
        (NoiseSchedule.cosine(), 4.928e-5, 2.4288e-9, 20291),
    ],
    ids=["scaled_linear", "linear", "cosine"],
)
def test_terminal_signal_of_each_law_is_the_published_number(schedule, residual, snr, sigma):
    assert len(schedule) == 1000
    assert schedule.residual_signal == pytest.approx(residual, rel=1e-4)
    assert schedule.snr[-1] == pytest.approx(snr, rel=2e-4)
    assert schedule.terminal_sigma == pytest.approx(sigma, rel=5e-5)


def test_sdxl_starts_at_its_published_first_sigma():
    assert NoiseSchedule.sdxl().sigmas[0] == pytest.approx(0.02917, abs=5e-6)
    assert NoiseSchedule.sdxl().sigmas[0] == pytest.approx(math.sqrt(0.00085 / (1 - 0.00085)), rel=1e-12)


def test_sdxl_betas_are_squares_of_an_even_ladder_of_roots():
    low, high = math.sqrt(0.00085), math.sqrt(0.012)
    expected = [(low + (high - low) * t / 999) ** 2 for t in range(1000)]
    np.testing.assert_allclose(NoiseSchedule.sdxl().betas, expected, rtol=1e-13)


def test_linear_betas_are_an_even_ladder():
    np.testing.assert_allclose(
        NoiseSchedule.linear(0.001, 0.02, 20).betas, [0.001 + 0.001 * t for t in range(20)], rtol=1e-13
    )


def test_cosine_alphas_cumprod_are_the_papers_squared_cosine_below_the_cap():
    def f(t):
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    expected = [f(t + 1) / f(0) for t in range(998)]
    np.testing.assert_allclose(NoiseSchedule.cosine().alphas_cumprod[:998], expected, rtol=1e-11)
    assert NoiseSchedule.cosine().betas[-1] == 0.999


@pytest.mark.parametrize("shift", [0.3, 1.0, 3.0])
def test_flow_levels_are_the_shifted_line(shift):
    schedule = NoiseSchedule.flow(shift)
    u = np.arange(1, 1001) / 1000
    s = schedule.sqrt_one_minus_alphas_cumprod / (
        schedule.sqrt_alphas_cumprod + schedule.sqrt_one_minus_alphas_cumprod
    )
    np.testing.assert_allclose(s, 1 / (1 + (1 / u - 1) / shift), rtol=1e-9)
    assert schedule.terminal_sigma == math.inf


@pytest.mark.parametrize(
    ("schedule", "config"),
    [
        (NoiseSchedule.sdxl(), SDXL),
        (NoiseSchedule.linear(), {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}),
        (NoiseSchedule.cosine(), {"beta_schedule": "squaredcos_cap_v2"}),
        (
            NoiseSchedule.scaled_linear(0.001, 0.03, 250),
            SDXL | {"num_train_timesteps": 250, "beta_start": 0.001, "beta_end": 0.03},
        ),
    ],
    ids=["scaled_linear", "linear", "cosine", "scaled_linear-250"],
)
def test_tables_agree_with_diffusers(schedule, config):
    scheduler = diffusers.DDPMScheduler(**config)
    np.testing.assert_allclose(schedule.betas, scheduler.betas.double(), rtol=2e-6)
    np.testing.assert_allclose(schedule.alphas_cumprod, scheduler.alphas_cumprod.double(), rtol=1e-4)
    np.testing.assert_allclose(
        schedule.sigmas, diffusers.EulerDiscreteScheduler(**config).sigmas.flip(0)[1:].double(), rtol=1e-3
    )
    assert NoiseSchedule.from_config(config) == schedule
    assert NoiseSchedule.from_config(scheduler.config) == schedule
    assert NoiseSchedule.from_scheduler(scheduler) == schedule


def test_every_table_derives_from_the_betas():
    s = NoiseSchedule.sdxl()
    expected = sigmas_of(s.betas)
    np.testing.assert_allclose(s.sigmas, expected, rtol=1e-11)
    np.testing.assert_allclose(s.snr, expected**-2.0, rtol=1e-11)
    np.testing.assert_allclose(s.log_snr, -2 * np.log(expected), atol=1e-11)
    np.testing.assert_allclose(s.alphas_cumprod, np.exp(np.cumsum(np.log1p(-s.betas))), rtol=1e-12)
    np.testing.assert_allclose(s.sqrt_alphas_cumprod**2 + s.sqrt_one_minus_alphas_cumprod**2, 1, rtol=1e-14)
    np.testing.assert_allclose(s.sqrt_one_minus_alphas_cumprod / s.sqrt_alphas_cumprod, expected, rtol=1e-11)
    for table in (
        s.betas,
        s.alphas_cumprod,
        s.sqrt_alphas_cumprod,
        s.sqrt_one_minus_alphas_cumprod,
        s.sigmas,
        s.snr,
        s.log_snr,
    ):
        assert table.dtype == np.float64 and table.shape == (1000,)


# ---------------------------------------------------------------- zero terminal SNR


def test_zero_terminal_snr_ends_in_the_published_sigmas():
    z = NoiseSchedule.sdxl().zero_terminal_snr()
    np.testing.assert_allclose(z.sigmas[-6:-1], [447, 560, 748, 1125, 2254], atol=0.5)
    assert (
        z.terminal_sigma == math.inf
        and z.residual_signal == 0.0
        and z.snr[-1] == 0.0
        and z.log_snr[-1] == -math.inf
    )


@pytest.mark.parametrize("schedule", [NoiseSchedule.sdxl(), NoiseSchedule.linear(), NoiseSchedule.cosine()])
def test_zero_terminal_snr_is_diffusers_algorithm_in_float64(schedule):
    theirs = rescale_zero_terminal_snr(torch.from_numpy(np.array(schedule.betas))).numpy()
    np.testing.assert_allclose(schedule.zero_terminal_snr().betas, theirs, rtol=1e-9, atol=1e-12)
    assert schedule.zero_terminal_snr().betas[-1] == 1.0


def test_zero_terminal_snr_twice_changes_nothing():
    z = NoiseSchedule.sdxl().zero_terminal_snr()
    np.testing.assert_allclose(z.zero_terminal_snr().betas, z.betas, rtol=1e-9)


# ---------------------------------------------------------------- another terminal sigma


@pytest.mark.parametrize(
    ("sigma", "beta_end"),
    [
        (20, 0.01364720),
        (29, 0.01561360),
        (56, 0.01912482),
        (100, 0.02223972),
        (200, 0.02598133),
        (300, 0.02817676),
        (500, 0.03094804),
        (1000, 0.03471571),
        (20000, 0.05104365),
    ],
)
def test_beta_end_is_the_published_number(sigma, beta_end):
    schedule = NoiseSchedule.sdxl().with_terminal_sigma(sigma, "beta_end")
    assert schedule.to_config()["beta_end"] == pytest.approx(beta_end, abs=5.1e-9)
    assert schedule.to_config()["beta_start"] == 0.00085
    assert sigmas_of(schedule.betas)[-1] == pytest.approx(sigma, rel=1e-10)


def test_beta_end_moves_the_middle_as_published():
    s = NoiseSchedule.sdxl()
    middle = [
        x.sigmas[499]
        for x in (s, s.with_terminal_sigma(100, "beta_end"), s.with_terminal_sigma(300, "beta_end"))
    ]
    np.testing.assert_allclose(middle, [1.613, 2.388, 2.901], atol=6e-4)


def test_beta_end_of_a_linear_law_stays_linear():
    schedule = NoiseSchedule.linear().with_terminal_sigma(300, "beta_end")
    assert schedule.terminal_sigma == pytest.approx(300, rel=1e-10)
    np.testing.assert_allclose(np.diff(schedule.betas, 2), 0, atol=1e-15)


@pytest.mark.parametrize(("sigma", "last_beta"), [(100, 0.97880085), (300, 0.99764433)])
def test_last_moves_the_last_timestep_only(sigma, last_beta):
    s = NoiseSchedule.sdxl()
    changed = s.with_terminal_sigma(sigma, "last")
    assert changed.betas[-1] == pytest.approx(last_beta, abs=6e-9)
    assert np.array_equal(changed.betas[:-1], s.betas[:-1]) and np.array_equal(
        changed.sigmas[:-1], s.sigmas[:-1]
    )


@pytest.mark.parametrize("method", ["beta_end", "rescale", "tail", "last"])
@pytest.mark.parametrize("sigma", [20, 100, 300, 4518.76, 20000])
def test_every_method_ends_exactly_at_the_sigma_and_rises(method, sigma):
    s = NoiseSchedule.sdxl()
    changed = s.with_terminal_sigma(sigma, method)
    assert sigmas_of(changed.betas)[-1] == pytest.approx(sigma, rel=1e-9)
    assert changed.terminal_sigma == pytest.approx(sigma, rel=1e-9)
    assert changed.residual_signal == pytest.approx((1 + sigma**2) ** -0.5, rel=1e-9)
    assert (np.diff(changed.sigmas) > 0).all()
    assert changed.sigmas[0] == pytest.approx(s.sigmas[0], rel=1e-12)
    assert len(changed) == 1000


@pytest.mark.parametrize("method", ["rescale", "tail", "last"])
def test_infinite_terminal_sigma_is_exact(method):
    changed = NoiseSchedule.sdxl().with_terminal_sigma(math.inf, method)
    assert (
        changed.terminal_sigma == math.inf and changed.betas[-1] == 1.0 and changed.alphas_cumprod[-1] == 0.0
    )
    assert np.isfinite(changed.sigmas[:-1]).all() and (np.diff(changed.sigmas[:-1]) > 0).all()


def test_rescale_to_infinity_is_zero_terminal_snr():
    s = NoiseSchedule.sdxl()
    assert s.with_terminal_sigma(math.inf, "rescale") == s.zero_terminal_snr()


def test_rescale_is_an_affine_map_of_the_signal_that_keeps_the_first():
    s = NoiseSchedule.sdxl()
    changed = s.with_terminal_sigma(300, "rescale")
    slope = np.diff(changed.sqrt_alphas_cumprod) / np.diff(s.sqrt_alphas_cumprod)
    first, last, target = math.sqrt(1 - 0.00085), 0.0682650, 1 / math.sqrt(1 + 300**2)
    np.testing.assert_allclose(slope, (first - target) / (first - last), rtol=1e-6)
    assert changed.alphas_cumprod[0] == pytest.approx(1 - 0.00085, rel=1e-14)


@pytest.mark.parametrize(("start", "given"), [(750, None), (900, 900), (500, 500), (0, 0)])
def test_tail_leaves_everything_up_to_its_start_bit_identical(start, given):
    s = NoiseSchedule.sdxl()
    changed = s.with_terminal_sigma(300, "tail", start=given)
    assert np.array_equal(changed.betas[: start + 1], s.betas[: start + 1])
    assert np.array_equal(changed.sigmas[: start + 1], s.sigmas[: start + 1])
    assert (changed.sigmas[start + 1 :] > s.sigmas[start + 1 :]).all()


@pytest.mark.parametrize("sigma", [100, 300, 20000, math.inf])
def test_tail_has_no_kink_at_its_start(sigma):
    s = NoiseSchedule.sdxl()
    bend = np.diff(np.log(s.with_terminal_sigma(sigma, "tail").sigmas[:-1]), 2) - np.diff(
        np.log(s.sigmas[:-1]), 2
    )
    # a square of 2 D/(249^2) in alpha, D <= 0.0683, seen through d log sigma = d alpha/(alpha (1 - alpha^2))
    # at alpha(750) = 0.26
    assert abs(bend[748:752]).max() < 1.2e-5  # a linear fade would make 1.1e-3, a step 0.3
    assert np.abs(np.diff(bend[740:850])).max() < 1.2e-5


def test_tail_signal_difference_grows_as_a_square():
    s = NoiseSchedule.sdxl()
    moved = s.sqrt_alphas_cumprod - s.with_terminal_sigma(300, "tail", start=799).sqrt_alphas_cumprod
    assert moved[899] / moved[-1] == pytest.approx(0.25, rel=1e-6)  # half way from 799 to 999
    assert moved[849] / moved[-1] == pytest.approx(0.0625, rel=1e-6)


@STEADY
@given(sigma=st.floats(15.5, 1e5), method=st.sampled_from(["beta_end", "rescale", "tail", "last"]))
def test_any_larger_sigma_is_reached_and_sigmas_still_rise(sigma, method):
    changed = NoiseSchedule.sdxl().with_terminal_sigma(sigma, method)
    assert changed.terminal_sigma == pytest.approx(sigma, rel=1e-8)
    assert (np.diff(changed.sigmas) > 0).all()


@pytest.mark.parametrize("method", ["beta_end", "rescale", "last"])
@pytest.mark.parametrize("steps", [2, 3, 10])
def test_short_schedules_reach_their_sigma(method, steps):
    s = NoiseSchedule.scaled_linear(num_timesteps=steps)
    assert s.with_terminal_sigma(5, method).terminal_sigma == pytest.approx(5, rel=1e-10)
    assert s.with_terminal_sigma(5, method).sigmas[0] == pytest.approx(s.sigmas[0], rel=1e-12)


def test_a_sigma_below_the_stock_one_is_reached_by_rescale():
    s = NoiseSchedule.sdxl()
    assert s.with_terminal_sigma(0.03, "rescale").terminal_sigma == pytest.approx(0.03, rel=1e-9)
    assert s.with_terminal_sigma(10, "beta_end").terminal_sigma == pytest.approx(10, rel=1e-10)


def test_resolution_rule_doubles_sigma_with_the_length_of_the_canvas():
    s = NoiseSchedule.sdxl()
    assert s.for_resolution(512, 512).terminal_sigma == pytest.approx(14.6146, rel=1e-5)
    assert s.for_resolution(1024, 1024).terminal_sigma == pytest.approx(29.2293, rel=1e-5)
    assert s.for_resolution(2048, 512).terminal_sigma == pytest.approx(29.2293, rel=1e-5)
    assert s.for_resolution(1024, 1024, base=1024).terminal_sigma == pytest.approx(14.6146, rel=1e-5)
    assert s.for_resolution(2048, 2048, method="last").betas[500] == s.betas[500]
    z = s.zero_terminal_snr()
    assert z.for_resolution(1024, 1024) == z


# ---------------------------------------------------------------- other makers


def test_sigmas_make_the_schedule_that_has_them():
    sigmas = np.array([0.1, 0.5, 2.0, 30.0, math.inf])
    np.testing.assert_allclose(NoiseSchedule.from_sigmas(sigmas).sigmas, sigmas, rtol=1e-12)
    np.testing.assert_allclose(
        NoiseSchedule.from_sigmas(list(NoiseSchedule.sdxl().sigmas)).betas,
        NoiseSchedule.sdxl().betas,
        rtol=1e-9,
    )


def test_alphas_cumprod_make_the_schedule_that_has_them():
    table = np.array([0.99, 0.5, 0.01, 0.0])
    np.testing.assert_allclose(NoiseSchedule.from_alphas_cumprod(table).alphas_cumprod, table, rtol=1e-13)
    scheduler = diffusers.DDIMScheduler(**SDXL, rescale_betas_zero_snr=True)
    schedule = NoiseSchedule.from_alphas_cumprod(scheduler.alphas_cumprod)  # a torch tensor
    np.testing.assert_allclose(schedule.alphas_cumprod, scheduler.alphas_cumprod.double(), rtol=1e-12)


@pytest.mark.parametrize(
    "name",
    ["DDIMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "UniPCMultistepScheduler"],
)
def test_a_scheduler_that_obeys_the_rescale_flag_reads_as_zero_terminal_snr(name):
    scheduler = getattr(diffusers, name)(**SDXL, rescale_betas_zero_snr=True)
    assert NoiseSchedule.from_scheduler(scheduler) == NoiseSchedule.sdxl().zero_terminal_snr()


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "PNDMScheduler", "DEISMultistepScheduler"])
def test_a_scheduler_that_ignores_the_rescale_flag_is_refused(name):
    scheduler = getattr(diffusers, name).from_config(SDXL | {"rescale_betas_zero_snr": True})
    assert scheduler.config[
        "rescale_betas_zero_snr"
    ]  # it keeps the promise in its config and does not obey it
    with pytest.raises(ValueError, match=f"{name}'s alphas_cumprod .* is not what its config says"):
        NoiseSchedule.from_scheduler(scheduler)


def test_a_scheduler_with_overwritten_tables_is_refused():
    scheduler = diffusers.DDPMScheduler(**SDXL)
    scheduler.alphas_cumprod = torch.from_numpy(
        np.array(NoiseSchedule.sdxl().zero_terminal_snr().alphas_cumprod)
    )
    with pytest.raises(ValueError, match="not what its config says"):
        NoiseSchedule.from_scheduler(scheduler)
    scheduler = diffusers.DDPMScheduler(**SDXL)
    scheduler.alphas_cumprod[500] *= 1.01
    with pytest.raises(ValueError, match="not what its config says"):
        NoiseSchedule.from_scheduler(scheduler)


def test_a_scheduler_without_betas_is_refused():
    with pytest.raises(ValueError, match="describes no noise schedule"):
        NoiseSchedule.from_scheduler(diffusers.EDMEulerScheduler())


flow_matching = pytest.mark.skipif(
    not hasattr(diffusers, "FlowMatchEulerDiscreteScheduler"), reason="this diffusers has no such class"
)


@flow_matching
@pytest.mark.parametrize("shift", [1.0, 2.5, 3.0])
def test_a_flow_matching_scheduler_reads_as_flow_of_its_shift(shift, tmp_path):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.save_pretrained(tmp_path)
    config = strict_json((tmp_path / "scheduler_config.json").read_text())
    for schedule in (NoiseSchedule.from_scheduler(scheduler), NoiseSchedule.from_config(config)):
        assert schedule == NoiseSchedule.flow(shift)
        _, sigmas, told = schedule.levels(flow=True)
        np.testing.assert_allclose(scheduler.sigmas.flip(0), sigmas, rtol=1e-6)
        np.testing.assert_allclose(scheduler.timesteps.flip(0), told, rtol=1e-6)


@flow_matching
def test_a_shift_that_depends_on_the_canvas_is_no_one_schedule():
    with pytest.raises(ValueError, match="use_dynamic_shifting"):
        NoiseSchedule.from_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))


def test_above_and_log_sigmas_and_alphas():
    schedule = NoiseSchedule.sdxl().zero_terminal_snr()
    higher = schedule.above(NoiseSchedule.sdxl().terminal_sigma)
    assert higher.sum() == 120 and higher[-120:].all()
    # rounding is not above: the law's own end, a unit in the last place higher
    assert not NoiseSchedule.sdxl().above(math.nextafter(NoiseSchedule.sdxl().terminal_sigma, 0)).any()
    assert schedule.log_sigmas[-1] == math.inf and schedule.zero_terminal
    np.testing.assert_allclose(schedule.log_sigmas[:-1], np.log(schedule.sigmas[:-1]), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(np.cumprod(schedule.alphas), schedule.alphas_cumprod, rtol=1e-12)
    assert not NoiseSchedule.sdxl().zero_terminal


def test_rescale_flag_of_a_config_also_rescales_trained_betas():
    betas = NoiseSchedule.sdxl().betas.tolist()
    config = {"num_train_timesteps": 1000, "trained_betas": betas, "rescale_betas_zero_snr": True}
    assert NoiseSchedule.from_config(config) == NoiseSchedule.sdxl().zero_terminal_snr()


# ---------------------------------------------------------------- records

EXAMPLES = [
    NoiseSchedule.sdxl(),
    NoiseSchedule.linear(),
    NoiseSchedule.cosine(),
    NoiseSchedule.flow(3.0),
    NoiseSchedule.sdxl().zero_terminal_snr(),
    NoiseSchedule.sdxl().with_terminal_sigma(300, "beta_end"),
    NoiseSchedule.sdxl().with_terminal_sigma(300, "tail", start=800),
    NoiseSchedule.linear().with_terminal_sigma(math.inf, "last"),
    NoiseSchedule.from_betas([0.1, 0.2]),
]


@pytest.mark.parametrize("schedule", EXAMPLES, ids=repr)
def test_json_gives_the_equal_schedule_back_and_is_strict(schedule):
    record = strict_json(schedule.to_json())
    back = NoiseSchedule.from_json(schedule.to_json())
    assert np.array_equal(np.array(record["betas"]), schedule.betas)
    assert (
        back == schedule and hash(back) == hash(schedule) and back.betas.tobytes() == schedule.betas.tobytes()
    )
    assert (back.made, back.changes) == (schedule.made, schedule.changes)
    assert back.to_json() == schedule.to_json() and repr(back) == repr(schedule)


@pytest.mark.parametrize(
    ("name", "schedule"),
    [(name, x) for name in ("DDPMScheduler", "DDIMScheduler") for x in EXAMPLES]
    + [("HeunDiscreteScheduler", x) for x in EXAMPLES if math.isfinite(x.terminal_sigma)],
    ids=repr,
)
def test_a_saved_scheduler_folder_gives_the_equal_schedule_back(name, schedule, tmp_path):
    cls = getattr(diffusers, name)
    scheduler = cls.from_config(schedule.to_config("v_prediction"))
    np.testing.assert_allclose(
        scheduler.alphas_cumprod.double(), schedule.alphas_cumprod, rtol=1e-3, atol=1e-9
    )
    scheduler.save_pretrained(tmp_path)
    config = strict_json((tmp_path / "scheduler_config.json").read_text())
    assert NoiseSchedule.from_config(config) == schedule
    loaded = cls.from_pretrained(tmp_path)
    assert NoiseSchedule.from_scheduler(loaded) == schedule
    assert loaded.config.prediction_type == "v_prediction" and loaded.config.timestep_spacing == "trailing"
    assert not loaded.config.get("rescale_betas_zero_snr")


def test_config_names_the_law_where_there_is_one():
    law = NoiseSchedule.sdxl().with_terminal_sigma(300, "beta_end").to_config()
    assert law["beta_schedule"] == "scaled_linear" and law["trained_betas"] is None
    assert "prediction_type" not in law
    assert len(NoiseSchedule.sdxl().with_terminal_sigma(300, "tail").to_config()["trained_betas"]) == 1000


@st.composite
def beta_tables(draw):
    betas = draw(st.lists(st.floats(1e-7, 0.5), min_size=2, max_size=50))
    return [*betas[:-1], 1.0] if draw(st.booleans()) else betas


@STEADY
@given(betas=beta_tables())
def test_any_valid_betas_rise_and_survive_json_and_config(betas):
    schedule = NoiseSchedule.from_betas(betas)
    assert schedule.betas.tolist() == betas
    with np.errstate(divide="ignore", over="ignore"):
        expected = sigmas_of(betas) if betas[-1] < 1 else np.append(sigmas_of(betas[:-1]), math.inf)
    np.testing.assert_allclose(schedule.sigmas, expected, rtol=1e-7)
    assert (schedule.sigmas[1:] > schedule.sigmas[:-1]).all()
    strict_json(schedule.to_json())
    assert NoiseSchedule.from_json(schedule.to_json()) == schedule
    assert NoiseSchedule.from_config(strict_json(json.dumps(schedule.to_config()))) == schedule


@STEADY
@given(
    sigmas=st.lists(st.floats(1e-2, 1e4), min_size=2, max_size=30, unique_by=lambda x: round(math.log(x), 3))
)
def test_any_rising_sigmas_are_kept(sigmas):
    np.testing.assert_allclose(NoiseSchedule.from_sigmas(sorted(sigmas)).sigmas, sorted(sigmas), rtol=1e-8)


# ---------------------------------------------------------------- identity


def test_a_schedule_cannot_be_changed():
    betas = np.full(4, 0.1)
    schedule, direct = NoiseSchedule.from_betas(betas), NoiseSchedule(betas)
    betas[0] = 0.9  # the caller's array stays the caller's
    assert schedule.betas[0] == direct.betas[0] == 0.1
    for name in (
        "betas",
        "alphas_cumprod",
        "sqrt_alphas_cumprod",
        "sqrt_one_minus_alphas_cumprod",
        "sigmas",
        "snr",
        "log_snr",
    ):
        with pytest.raises(ValueError, match="read-only"):
            getattr(schedule, name)[0] = 0.5
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.betas = betas


def test_changes_return_new_schedules():
    s = NoiseSchedule.sdxl()
    before = s.to_json()
    (
        s.zero_terminal_snr(),
        s.with_terminal_sigma(300, "tail"),
        s.with_terminal_sigma(300, "last"),
        s.for_resolution(1024, 1024),
    )
    assert s.to_json() == before and s == NoiseSchedule.sdxl()


def test_equality_and_hash_are_of_the_betas():
    a, b = NoiseSchedule.sdxl(), NoiseSchedule.from_betas(NoiseSchedule.sdxl().betas)
    assert a == b and hash(a) == hash(b) and len({a, b}) == 1
    nudged = np.array(a.betas)
    nudged[500] = np.nextafter(nudged[500], 1)
    assert a != NoiseSchedule.from_betas(nudged)
    assert a != "schedule" and a != NoiseSchedule.scaled_linear(num_timesteps=999)


@pytest.mark.parametrize(
    "clone",
    [lambda s: pickle.loads(pickle.dumps(s)), copy.deepcopy, copy.copy],
    ids=["pickle", "deepcopy", "copy"],
)
def test_clones_are_equal(clone):
    s = NoiseSchedule.sdxl().zero_terminal_snr()
    assert s.snr[-1] == 0  # a cached table travels too
    twin = clone(s)
    assert (
        twin == s
        and hash(twin) == hash(s)
        and twin.to_json() == s.to_json()
        and twin.terminal_sigma == math.inf
    )


def test_repr_tells_how_it_was_made():
    text = repr(NoiseSchedule.sdxl().with_terminal_sigma(300, "tail"))
    assert "scaled_linear" in text and "sigma=300" in text and "tail" in text and "1000 timesteps" in text


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: NoiseSchedule.from_betas([0.1, math.nan, 0.3]),
            r"betas must be finite, but betas\[1\] is not",
        ),
        (lambda: NoiseSchedule(np.array([0.1, math.inf])), r"betas must be finite, but betas\[1\]"),
        (lambda: NoiseSchedule.from_betas([0.1, -0.2, 0.3]), r"betas\[1\] = -0.2"),
        (lambda: NoiseSchedule.from_betas([0.1, 0.0]), r"betas\[1\] = 0"),
        (lambda: NoiseSchedule.from_betas([1.0, 0.5]), r"betas\[0\] = 1"),
        (lambda: NoiseSchedule.from_betas([0.1, 1.5]), r"betas\[1\] = 1.5"),
        (
            lambda: NoiseSchedule.from_betas([[0.1, 0.2]]),
            r"one row of at least 2 numbers, got shape \(1, 2\)",
        ),
        (lambda: NoiseSchedule.from_betas([0.1]), r"at least 2 numbers, got shape \(1,\)"),
        (
            lambda: NoiseSchedule.from_alphas_cumprod([0.5, 0.6]),
            r"alphas_cumprod must fall at every timestep, but alphas_cumprod\[0\] = 0.5",
        ),
        (lambda: NoiseSchedule.from_alphas_cumprod([0.5, 0.5]), "must fall at every timestep"),
        (lambda: NoiseSchedule.from_alphas_cumprod([1.0, 0.5]), r"must lie in \[0, 1\)"),
        (lambda: NoiseSchedule.from_alphas_cumprod([0.5, -0.5]), r"must lie in \[0, 1\)"),
        (
            lambda: NoiseSchedule.from_alphas_cumprod([0.5, math.nan]),
            r"alphas_cumprod must be finite, but alphas_cumprod\[1\]",
        ),
        (
            lambda: NoiseSchedule.from_sigmas([0.1, 3, 2]),
            r"sigmas must rise at every timestep, but sigmas\[1\] = 3 and sigmas\[2\] = 2",
        ),
        (lambda: NoiseSchedule.from_sigmas([0.0, 3]), r"sigmas must be positive, but sigmas\[0\] = 0"),
        (
            lambda: NoiseSchedule.from_sigmas([0.1, math.inf, math.inf]),
            r"sigmas must be finite, but sigmas\[1\]",
        ),
        (lambda: NoiseSchedule.from_sigmas([0.1, math.nan]), r"sigmas must be finite, but sigmas\[1\]"),
        (
            lambda: NoiseSchedule.scaled_linear(0.02, 0.01),
            "0 < beta_start <= beta_end < 1, got 0.02 and 0.01",
        ),
        (lambda: NoiseSchedule.linear(0, 0.01), "0 < beta_start"),
        (lambda: NoiseSchedule.linear(math.nan, 0.01), "0 < beta_start"),
        (lambda: NoiseSchedule.scaled_linear(0.1, 1.0), "beta_end < 1"),
        (lambda: NoiseSchedule.scaled_linear(num_timesteps=1), "num_timesteps must be at least 2, got 1"),
        (lambda: NoiseSchedule.cosine(max_beta=1), "max_beta"),
        (lambda: NoiseSchedule.cosine(s=-1), "s >= 0"),
        (lambda: NoiseSchedule.flow(0), "shift must be a positive number, got 0"),
        (lambda: NoiseSchedule.flow(math.inf), "shift must be a positive number"),
        (
            lambda: NoiseSchedule.sdxl().with_terminal_sigma(math.nan, "beta_end"),
            "must be above the schedule's first sigma, 0.02917, got nan",
        ),
        (
            lambda: NoiseSchedule.sdxl().with_terminal_sigma(0.029, "rescale"),
            "must be above the schedule's first sigma, 0.02917",
        ),
        (
            lambda: NoiseSchedule.sdxl().with_terminal_sigma(-300, "beta_end"),
            "above the schedule's first sigma",
        ),
        (
            lambda: NoiseSchedule.sdxl().with_terminal_sigma(300, "middle"),
            "unknown .*method 'middle': expected one of rescale, beta_end",
        ),
        (
            lambda: NoiseSchedule.sdxl().with_terminal_sigma(math.inf, "beta_end"),
            "no beta_end gives an infinite terminal sigma",
        ),
        (
            lambda: NoiseSchedule.sdxl().with_terminal_sigma(0.03, "beta_end"),
            "no beta_end from 0.00085 to 1 gives terminal sigma 0.03",
        ),
        (
            lambda: NoiseSchedule.cosine().with_terminal_sigma(300, "beta_end"),
            "needs an unchanged linear or scaled_linear schedule",
        ),
        (
            lambda: NoiseSchedule.sdxl().zero_terminal_snr().with_terminal_sigma(300, "beta_end"),
            "needs an unchanged linear or scaled_linear schedule",
        ),
        (
            lambda: NoiseSchedule.sdxl().with_terminal_sigma(5, "last"),
            "would make sigma fall again before the end",
        ),
        (
            lambda: NoiseSchedule.sdxl().with_terminal_sigma(2, "tail"),
            "would make sigma fall again before the end",
        ),
        (
            lambda: NoiseSchedule.sdxl().with_terminal_sigma(300, "rescale", start=3),
            "start belongs to method 'tail', not to 'rescale'",
        ),
        (
            lambda: NoiseSchedule.sdxl().with_terminal_sigma(300, "tail", start=999),
            r"start must be a timestep in 0..998, got 999",
        ),
        (
            lambda: NoiseSchedule.sdxl().with_terminal_sigma(300, "tail", start=-1),
            r"start must be a timestep in 0..998, got -1",
        ),
        (lambda: NoiseSchedule.sdxl().for_resolution(0, 1024), "must be positive pixel counts"),
        (lambda: NoiseSchedule.from_config({}), "neither trained_betas nor beta_schedule"),
        (lambda: NoiseSchedule.from_config({"beta_schedule": "sigmoid"}), "unknown beta_schedule 'sigmoid'"),
        (
            lambda: NoiseSchedule.from_config({"trained_betas": [0.1, 0.2]}),
            "2 trained_betas but num_train_timesteps is 1000",
        ),
        (lambda: NoiseSchedule.from_json("[]"), "not a schedule record"),
        (lambda: NoiseSchedule.from_json("{"), "Expecting"),
        (lambda: NoiseSchedule.from_record({"format": "other"}), "not a schedule record"),
        (
            lambda: NoiseSchedule.from_record(NoiseSchedule.sdxl().to_record() | {"version": 99}),
            "version 99 is not 1: update sdxl-fixes",
        ),
        (
            lambda: NoiseSchedule.from_record({"format": "sdxl_fixes.schedule", "version": 1}),
            "betas must be a list of numbers",
        ),
    ],
)
def test_nonsense_is_refused_in_a_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---------------------------------------------------------------- known defects of the subject, not of the
# test


@pytest.mark.parametrize(
    "clone", [lambda s: pickle.loads(pickle.dumps(s)), copy.deepcopy], ids=["pickle", "deepcopy"]
)
def test_clones_cannot_be_changed_either(clone):
    with pytest.raises(ValueError, match="read-only"):
        clone(NoiseSchedule.sdxl()).betas[0] = 0.5


def test_the_recipe_cannot_be_changed():
    schedule = NoiseSchedule.sdxl()
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.made.numbers = (0.1, 0.5)
    with pytest.raises(ValueError, match=r"the recipe says linear.*but the betas are others"):
        NoiseSchedule(schedule.betas, Made("linear", (0.1, 0.5)))
    assert NoiseSchedule.from_config(schedule.to_config()) == NoiseSchedule.sdxl()


def test_a_record_whose_recipe_contradicts_its_betas_does_not_lie_in_config():
    record = NoiseSchedule.linear().to_record() | {"recipe": NoiseSchedule.sdxl().to_record()["recipe"]}
    try:
        schedule = NoiseSchedule.from_record(record)
    except ValueError:
        return
    assert NoiseSchedule.from_config(schedule.to_config()) == schedule


@pytest.mark.parametrize(
    "betas", [[0.5, 1e-17], [1e-17, 0.5], [0.99] * 400], ids=["flat", "sigma-0", "underflow"]
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_betas_whose_sigmas_do_not_rise_are_refused(betas):
    with pytest.raises(ValueError, match="rise"):
        NoiseSchedule.from_betas(betas)


@pytest.mark.parametrize("sigma", [1e10, 1e12, 1e200])
@pytest.mark.parametrize("method", ["rescale", "tail", "last"])
def test_a_sigma_too_large_for_the_betas_is_refused_or_reached(sigma, method):
    try:
        changed = NoiseSchedule.sdxl().with_terminal_sigma(sigma, method)
    except ValueError:
        return
    assert changed.terminal_sigma == pytest.approx(sigma, rel=1e-6)


@pytest.mark.parametrize("steps", [2, 3, 4])
def test_tail_has_a_default_start_in_a_short_schedule(steps):
    assert NoiseSchedule.scaled_linear(num_timesteps=steps).with_terminal_sigma(
        5, "tail"
    ).terminal_sigma == pytest.approx(5)


def test_a_scheduler_with_a_shorter_table_is_refused_in_a_sentence():
    scheduler = diffusers.DDPMScheduler(**SDXL)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod[:500]
    with pytest.raises(ValueError, match="not what its config says"):
        NoiseSchedule.from_scheduler(scheduler)


def test_a_scheduler_with_overwritten_betas_is_refused():
    scheduler = diffusers.DDPMScheduler(**SDXL)
    scheduler.betas = scheduler.betas * 2
    with pytest.raises(ValueError, match="not what its config says"):
        NoiseSchedule.from_scheduler(scheduler)


def test_a_config_without_beta_ends_means_what_diffusers_makes_of_it():
    config = {"beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
    scheduler = diffusers.DDPMScheduler.from_config(config)
    np.testing.assert_allclose(NoiseSchedule.from_config(config).betas, scheduler.betas.double(), rtol=1e-5)


def test_the_recipe_in_the_docstring_of_to_config_works():
    schedule = NoiseSchedule.sdxl().with_terminal_sigma(300, "tail")
    scheduler = diffusers.DDPMScheduler(**SDXL)
    changed = diffusers.DDPMScheduler.from_config(scheduler.config, **schedule.to_config("v_prediction"))
    assert (
        NoiseSchedule.from_scheduler(changed) == schedule and changed.config.prediction_type == "v_prediction"
    )


@pytest.mark.parametrize("recipe", [[1], None, [{"x": 1}]], ids=repr)
def test_a_damaged_recipe_is_refused_in_a_sentence(recipe):
    with pytest.raises(ValueError, match="recipe"):
        NoiseSchedule.from_record(NoiseSchedule.sdxl().to_record() | {"recipe": recipe}).to_config()
