"""The drop-in schedulers: against the exact Gaussian model, against diffusers' own classes bit for bit,
saved, loaded, in any dtype."""

import copy
import inspect
import itertools
import json
import math
import pickle
import sys

import diffusers
import gaussian
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from sdxl_fixes import NoiseSchedule, schedulers
from sdxl_fixes.schedulers import SAMPLERS, fix_scheduler

STOCK = NoiseSchedule.sdxl()
ZERO = STOCK.zero_terminal_snr()
SCHEDULES = {
    "14.6": STOCK,
    "100": STOCK.with_terminal_sigma(100, "beta_end"),
    "300": STOCK.with_terminal_sigma(300, "beta_end"),
    "300 rescale": STOCK.with_terminal_sigma(300, "rescale"),
    "4096 tail": STOCK.with_terminal_sigma(4096, "tail"),
    "20000": STOCK.with_terminal_sigma(20000, "beta_end"),
    "20000 rescale": STOCK.with_terminal_sigma(20000, "rescale"),
    "inf": ZERO,
    "inf tail": STOCK.with_terminal_sigma(math.inf, "tail"),
    "flow": NoiseSchedule.flow(3.0),
}
SDXL = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
FIRST_ORDER, SECOND_ORDER, NOISY = (
    ("ddim", "euler"),
    ("dpmpp_2m", "unipc", "heun"),
    ("ddpm", "euler_a", "dpmpp_2m_sde"),
)


def stock(cls):
    """diffusers' class of the same name."""
    return getattr(diffusers, cls.__name__)


def exact(scheduler):
    """Whether it is an instance of ours, not of diffusers' own class."""
    return type(scheduler) is schedulers.CLASSES[type(scheduler).__name__]


def network(x, t):
    """Some smooth function of the input and the timestep, in float32 whatever the dtype."""
    return (torch.sin(x.float() * 1.7 + float(t) / 300) * 0.8).to(x.dtype)


def loop(scheduler, steps, prediction=network, dtype=torch.float32, begin=True):
    scheduler.set_timesteps(steps)
    if begin and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 8, 8, generator=generator).to(dtype) * scheduler.init_noise_sigma
    x = x.to(dtype)
    options = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for t in scheduler.timesteps:
        x = scheduler.step(prediction(scheduler.scale_model_input(x, t), t), t, x, **options).prev_sample
    return x


# ---------------------------------------------------------------- right numbers


@pytest.mark.parametrize("steps", [25, 30])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "flow_prediction"])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "unipc", "heun"])
def test_samples_have_the_ideal_spread_and_mean(sampler, name, prediction_type, steps):
    schedule = SCHEDULES[name]
    if prediction_type == "epsilon" and schedule.residual_signal == 0:
        with pytest.raises(
            ValueError,
            match="use a model trained with v_prediction, or a schedule with a finite terminal sigma",
        ):
            schedule.scheduler(sampler, prediction_type)
        return
    mean, spread = gaussian.sampled(
        schedule.scheduler(sampler, prediction_type), schedule, prediction_type, steps
    )
    ideal_mean, ideal_spread = gaussian.ideal(schedule, prediction_type == "flow_prediction")
    leak = 100 * (mean - ideal_mean).abs().max() / gaussian.MEAN_OVER_SCALE
    if sampler in SECOND_ORDER:
        assert (spread / ideal_spread - 1).abs().max() < 0.03
        assert leak < 0.51
    else:
        assert (spread / ideal_spread).min() >= 0.86
        assert leak < (
            0.51 if schedule.terminal_sigma >= 4096 else 3.2
        )  # a first-order step hides part of a finite sigma's leak


@pytest.mark.parametrize("name", ["300", "inf"])
@pytest.mark.parametrize("sampler", NOISY)
def test_samplers_that_draw_noise_have_the_ideal_mean_and_spread(sampler, name):
    schedule = SCHEDULES[name]
    scheduler = schedule.scheduler(sampler, "v_prediction")
    mean, spread = gaussian.sampled(scheduler, schedule, "v_prediction", 30, samples=20000)
    ideal_mean, _ = gaussian.ideal(schedule)
    assert (mean[:2] > ideal_mean[:2] - 0.03).all() and (
        mean[:2] < 2.03
    ).all()  # fresh noise forgets some of what the start lacks
    assert (
        ((spread - 1).abs().max() < 0.05)
        if sampler == "dpmpp_2m_sde"
        else ((0.8 < spread) & (spread < 1.05)).all()
    )


@pytest.mark.parametrize("name", ["300 rescale", "inf"])
@pytest.mark.parametrize("sampler", ["ddpm", "euler_a", "ddim"])
def test_fresh_noise_has_ddpm_s_posterior_variance(sampler, name):
    """One step from each of three timesteps, against q(x_t' | x_t, x_0) as DDPM writes it (arXiv:2006.11239
    eq. 7)."""
    schedule = SCHEDULES[name]
    scheduler = schedule.scheduler(sampler, "sample")
    scheduler.set_timesteps(6)
    x0, x = torch.full((1, 4, 256, 256), 0.3), torch.full((1, 4, 256, 256), 1.2)
    for at in (0, 2, 4):
        t, after = (int(scheduler.timesteps[i]) for i in (at, at + 1))
        left, left_after = schedule.alphas_cumprod[t], schedule.alphas_cumprod[after]
        beta = 1 - left / left_after
        mean = (left_after**0.5 * beta * 0.3 + (1 - beta) ** 0.5 * (1 - left_after) * 1.2) / (1 - left)
        variance = (1 - left_after) / (1 - left) * beta
        if hasattr(scheduler, "_step_index"):
            scheduler._step_index = at
        options = {"eta": 1.0} if sampler == "ddim" else {}
        got = scheduler.step(
            x0, scheduler.timesteps[at], x, generator=torch.Generator().manual_seed(at), **options
        ).prev_sample.double()
        assert float(got.mean()) == pytest.approx(mean, abs=0.01)
        assert float(got.std()) == pytest.approx(variance**0.5, rel=0.01)


def test_ddim_and_euler_are_the_same_method():
    for name in ("14.6", "20000 rescale", "inf"):
        for prediction_type in ("v_prediction", "sample"):
            schedule = SCHEDULES[name]
            ddim, euler = (
                loop(schedule.scheduler(sampler, prediction_type), 11) for sampler in ("ddim", "euler")
            )
            assert torch.equal(ddim, euler)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_step_from_snr_0_is_what_the_network_says(sampler, prediction_type):
    scheduler = ZERO.scheduler(sampler, prediction_type)
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [999]
    x = torch.randn(3, 4, 2, 2)
    output = network(x, 999)
    expected = -output if prediction_type == "v_prediction" else output
    got = scheduler.step(
        output, scheduler.timesteps[0], scheduler.scale_model_input(x, scheduler.timesteps[0])
    ).prev_sample
    assert torch.allclose(got, expected, atol=1e-6)


@settings(max_examples=25)
@given(
    sampler=st.sampled_from(sorted(SAMPLERS)),
    name=st.sampled_from(sorted(SCHEDULES)),
    spacing=st.sampled_from(["log_sigma", "trailing", "linspace"]),
    steps=st.one_of(st.integers(1, 60), st.sampled_from([333, 999, 1000])),
)
def test_any_number_of_steps_is_taken_on_trained_timesteps(sampler, name, spacing, steps):
    """The exact model refuses any other timestep; a thousand steps of a first-order method leave almost no
    error."""
    schedule = SCHEDULES[name]
    scheduler = schedule.scheduler(sampler, "v_prediction", spacing)
    if not exact(scheduler) and spacing == "linspace":
        return  # diffusers' own code, which asks between trained timesteps
    mean, spread = gaussian.sampled(scheduler, schedule, "v_prediction", steps, samples=64)
    assert torch.isfinite(mean).all() and torch.isfinite(spread).all()
    if spacing == "log_sigma" and steps > 900 and sampler not in NOISY:
        assert (spread / gaussian.ideal(schedule)[1]).min() > 0.95


@pytest.mark.parametrize("spacing", ["trailing", "linspace", "log_sigma"])
def test_heun_does_not_explode_where_diffusers_does(spacing):
    schedule = SCHEDULES["20000 rescale"]
    _, spread = gaussian.sampled(
        schedule.scheduler("heun", "v_prediction", spacing), schedule, "v_prediction", 25
    )
    theirs = diffusers.HeunDiscreteScheduler(
        trained_betas=schedule.betas.tolist(), prediction_type="v_prediction", timestep_spacing="trailing"
    )
    _, exploded = gaussian.sampled(theirs, schedule, "v_prediction", 25)
    assert spread.max() < 1.1 and exploded.max() > 50


def test_heun_s_step_from_snr_0_is_of_second_order():
    """One step to sigma 300 at scale 64 (pixel sums), against the exact solution: data N(0, a^2) keeps
    x / sqrt(alpha^2 a^2 + sigma^2). First order -2.2e-2, a weight of 1 +2.1e-2, of 1/2 -7e-4."""
    scheduler = ZERO.scheduler("heun", "v_prediction")
    row = int(np.abs(np.log(ZERO.sigmas / 300)).argmin())
    scheduler.set_timesteps(timesteps=[999, row, 0])
    x = torch.tensor([[[[-1.0]]], [[[1.0]]]])
    for t in scheduler.timesteps[:2]:
        alpha, sigma = ZERO.sqrt_alphas_cumprod[int(t)], ZERO.sqrt_one_minus_alphas_cumprod[int(t)]
        x0 = alpha * 64**2 / (alpha**2 * 64**2 + sigma**2) * x
        x = scheduler.step((alpha * (x - alpha * x0) / sigma - sigma * x0).float(), t, x).prev_sample
    exact = math.sqrt(ZERO.alphas_cumprod[row] * (64**2 - 1) + 1)
    assert abs(float(x[1, 0, 0, 0]) / exact - 1) < 1.5e-3


@pytest.mark.parametrize("name", ["14.6", "inf", "flow"])
@pytest.mark.parametrize("spacing", [None, "trailing"])
def test_options_of_unipc_give_numbers_or_are_refused_at_once(name, spacing):
    schedule, refused = SCHEDULES[name], 0
    for order, solver, x0, lower, final in itertools.product(
        (1, 2, 3), ("bh1", "bh2"), (True, False), (True, False), ("zero", "sigma_min")
    ):
        options = dict(solver_order=order, solver_type=solver, predict_x0=x0, lower_order_final=lower)
        try:
            scheduler = schedule.scheduler(
                "unipc", "v_prediction", spacing, **options, final_sigmas_type=final
            )
        except ValueError as error:
            assert "divides by 0 at" in str(error)
            refused += 1
            continue
        assert torch.isfinite(loop(scheduler, 6)).all(), options
    assert refused == {"14.6": 20, "inf": 38, "flow": 38}[name]


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing", None])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_takes_a_model_that_predicts_the_image(sampler, spacing):
    """diffusers' Euler ancestral and Heun raise NotImplementedError at the first step."""
    x = STOCK.scheduler(sampler, "sample", spacing)
    x.set_timesteps(4)
    sample = torch.randn(1, 4, 8, 8) * x.init_noise_sigma
    for t in x.timesteps:
        x.scale_model_input(sample, t)
        sample = x.step(torch.full_like(sample, 0.5), t, sample).prev_sample
    assert torch.allclose(sample, torch.full_like(sample, 0.5), atol=0.5 if spacing == "leading" else 0.06)


def test_karras_steps_from_snr_0():
    scheduler = ZERO.scheduler("dpmpp_2m", "v_prediction", use_karras_sigmas=True)
    mean, spread = gaussian.sampled(scheduler, ZERO, "v_prediction", 25)
    assert scheduler.timesteps[0] == 999 and len(set(scheduler.timesteps.tolist())) == 25
    assert (spread - 1).abs().max() < 0.07
    assert (mean - 2).abs().max() < 0.02


# ---------------------------------------------------------------- diffusers' own, bit for bit


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [4, 25, 30])
@pytest.mark.parametrize("cls", schedulers.CLASSES.values(), ids=lambda cls: cls.__name__)
def test_the_stock_schedule_is_sampled_as_diffusers_does(cls, steps, spacing, prediction_type):
    config = {**SDXL, "timestep_spacing": spacing, "prediction_type": prediction_type}
    ours, theirs = cls(**config), stock(cls)(**config)
    if cls is schedulers.DDIMScheduler and spacing != "leading":
        assert exact(ours)
    else:
        assert type(ours) is stock(cls) and ours.config == theirs.config
        assert torch.equal(loop(ours, steps), loop(theirs, steps))


@pytest.mark.parametrize(
    "extra",
    [
        {"use_karras_sigmas": True},
        {"algorithm_type": "sde-dpmsolver++"},
        {"solver_order": 3},
        {"final_sigmas_type": "sigma_min"},
    ],
)
def test_settings_of_dpm_solver_are_diffusers(extra):
    ours, theirs = (
        cls(**SDXL, **extra)
        for cls in (schedulers.DPMSolverMultistepScheduler, diffusers.DPMSolverMultistepScheduler)
    )
    assert torch.equal(loop(ours, 12), loop(theirs, 12))


@pytest.mark.parametrize("name", ["euler", "euler_a", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "ddpm"])
@pytest.mark.parametrize("sigma", [100, 300])
def test_a_named_schedule_in_trailing_steps_is_diffusers(name, sigma):
    schedule = STOCK.with_terminal_sigma(sigma, "beta_end")
    ours = schedule.scheduler(name, "v_prediction", "trailing")
    cls, extra = SAMPLERS[name]
    extra = extra | ({"clip_sample": False} if name == "ddpm" else {})
    theirs = stock(cls)(**{**extra, **schedule.to_config("v_prediction")})
    assert type(ours) is type(theirs)
    assert torch.equal(loop(ours, 10), loop(theirs, 10))


def test_ddim_steps_to_the_next_timestep_of_the_list():
    """diffusers goes to t - 1000 // 30 = t - 33, from which 11 of its 30 trailing steps deviate."""
    ours, theirs = (
        cls(**SDXL, timestep_spacing="trailing", prediction_type="v_prediction")
        for cls in (schedulers.DDIMScheduler, diffusers.DDIMScheduler)
    )
    for scheduler in (ours, theirs):
        scheduler.register_to_config(clip_sample=False)
    (mean, spread), (their_mean, _their_spread) = (
        gaussian.sampled(s, STOCK, "v_prediction", 30) for s in (ours, theirs)
    )
    euler_mean, euler_spread = gaussian.sampled(
        STOCK.scheduler("euler", "v_prediction", "trailing"), STOCK, "v_prediction", 30
    )
    assert (mean - euler_mean).abs().max() < 0.01 < 0.02 < (their_mean - euler_mean).abs().max()
    assert (spread - euler_spread).abs().max() < 0.01


# ---------------------------------------------------------------- use


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["20000", "20000 rescale", "inf"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_half_precision_latents(sampler, name, dtype):
    """The network sees and returns half precision; samples stay within its rounding of the float32 ones."""
    scheduler = SCHEDULES[name].scheduler(sampler, "v_prediction")
    got, expected = loop(scheduler, 10, dtype=dtype), loop(scheduler, 10)
    assert got.dtype == dtype
    if sampler not in NOISY:
        assert (got.float() - expected).abs().max() < (0.02 if dtype == torch.float16 else 0.15)
    assert torch.isfinite(got).all()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_starting_in_the_middle_with_and_without_a_begin_index(sampler):
    """img2img: noise the image to the first of the remaining timesteps and go on from there."""
    scheduler = ZERO.scheduler(sampler, "v_prediction")
    scheduler.set_timesteps(20)
    start = 12 * scheduler.order
    rest = scheduler.timesteps[start:]
    x0, noise = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    results = []
    for begin in (True, False):
        scheduler.set_timesteps(20)
        if begin and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(start)
        x = scheduler.add_noise(x0, noise, rest[:1].repeat(2))
        level = int(rest[0])
        alpha, sigma = ZERO.sqrt_alphas_cumprod[level], ZERO.sqrt_one_minus_alphas_cumprod[level]
        assert torch.allclose(x, (alpha * x0 + sigma * noise).float(), atol=1e-6)
        torch.manual_seed(3)
        for t in rest:  # a network that knows x0 exactly
            alpha, sigma = ZERO.sqrt_alphas_cumprod[int(t)], ZERO.sqrt_one_minus_alphas_cumprod[int(t)]
            v = (alpha * (x - alpha * x0) / sigma - sigma * x0).float()
            x = scheduler.step(v, t, x, return_dict=False)[0]
        results.append(x)
    assert torch.allclose(results[0], x0, atol=1e-4)
    assert torch.equal(*results)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "flow_prediction"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_add_noise_is_training_s(sampler, prediction_type):
    """Any timestep, a batch of them, before set_timesteps; the timesteps are what the network is told."""
    from sdxl_fixes import Objective

    step = Objective(ZERO, prediction_type).draw(
        torch.randn(16, 4, 2, 2), generator=torch.Generator().manual_seed(0)
    )
    torch.manual_seed(5)
    latents = torch.randn(16, 4, 2, 2)
    step = Objective(ZERO, prediction_type).draw(latents)
    scheduler = ZERO.scheduler(sampler, prediction_type)
    assert torch.allclose(scheduler.add_noise(latents, step.noise, step.timesteps), step.noisy, atol=1e-6)
    assert scheduler.add_noise(latents.half(), step.noise.half(), step.timesteps).dtype == torch.float16


def test_custom_timesteps_and_their_errors():
    scheduler = ZERO.scheduler("euler", "v_prediction")
    scheduler.set_timesteps(timesteps=[999, 700, 300, 20])
    assert scheduler.timesteps.tolist() == [999, 700, 300, 20]
    for wrong in ([300, 700], [1000, 3], [5, 5], [], [999.7, 500.2], [700, math.nan], 7):
        with pytest.raises(
            ValueError, match="timesteps must be whole numbers that fall from at most 999 to at least 0"
        ):
            scheduler.set_timesteps(timesteps=wrong)
    with pytest.raises(ValueError, match="set_timesteps needs num_inference_steps or timesteps"):
        scheduler.set_timesteps()
    with pytest.raises(ValueError, match=r"must lie in 1..1000, the trained timesteps, got 1001"):
        scheduler.set_timesteps(1001)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match=r"timestep 998\.5 is not one of the 4 of set_timesteps"):
        scheduler.step(torch.zeros(1), 998.5, torch.zeros(1))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_timesteps_have_diffusers_dtype(sampler):
    scheduler = ZERO.scheduler(sampler, "v_prediction")
    theirs = stock(type(scheduler))(**SDXL)
    for made in (scheduler, theirs):
        made.set_timesteps(10)
    assert (
        scheduler.timesteps.dtype == theirs.timesteps.dtype
        and scheduler.timesteps.shape == theirs.timesteps.shape
    )


def test_a_step_takes_what_diffusers_takes():
    """Pipelines ask it what may be passed."""
    for cls in schedulers.CLASSES.values():
        ours, theirs = (list(inspect.signature(of.step).parameters) for of in (cls, stock(cls)))
        # variance_noise is newer than the oldest diffusers
        assert [name for name in ours if name in theirs] == theirs
        assert set(ours) - set(theirs) <= {"variance_noise"}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_copies_go_on_where_the_original_stands(sampler):
    scheduler = ZERO.scheduler(sampler, "v_prediction")
    expected = loop(scheduler, 7)
    for other in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        assert type(other) is type(scheduler) and torch.equal(loop(other, 7), expected)


# ---------------------------------------------------------------- configs


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_saved_config_is_stock_s_and_loads_exactly(sampler, name, tmp_path):
    schedule = SCHEDULES[name]
    scheduler = schedule.scheduler(sampler, "v_prediction")
    scheduler.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert config["_class_name"] == type(scheduler).__name__ and config["timestep_spacing"] == "trailing"
    again = type(scheduler).from_pretrained(tmp_path)
    assert exact(again)
    assert (
        again.noise_schedule
        == schedule
        == NoiseSchedule.from_config(config)
        == NoiseSchedule.from_scheduler(again)
    )
    assert torch.equal(loop(again, 9), loop(scheduler, 9))
    theirs = stock(type(scheduler)).from_pretrained(tmp_path)
    assert type(theirs) is stock(type(scheduler))
    theirs.set_timesteps(25)
    assert int(theirs.timesteps[0]) == 999
    terminal = float(((1 - theirs.alphas_cumprod[-1]) / theirs.alphas_cumprod[-1]) ** 0.5)
    assert terminal == pytest.approx(schedule.terminal_sigma, rel=0.02) or (
        terminal >= 4000 and schedule.residual_signal == 0
    )
    assert torch.isfinite(loop(theirs, 25)).all()


def test_an_instance_names_stock_s_module_for_model_index():
    scheduler = ZERO.scheduler("euler", "v_prediction")
    assert exact(scheduler) and isinstance(scheduler, diffusers.EulerDiscreteScheduler)
    assert scheduler.__module__ == diffusers.EulerDiscreteScheduler.__module__


def test_spacing_given_to_the_class_or_to_from_config():
    scheduler = schedulers.EulerDiscreteScheduler(
        **SDXL, timestep_spacing="log_sigma", prediction_type="v_prediction"
    )
    assert exact(scheduler) and scheduler.config.timestep_spacing == "trailing"
    assert torch.equal(loop(scheduler, 6), loop(STOCK.scheduler("euler", "v_prediction", "log_sigma"), 6))
    plain = schedulers.EulerDiscreteScheduler.from_config(scheduler.config, timestep_spacing="leading")
    assert type(plain) is diffusers.EulerDiscreteScheduler and plain.config.timestep_spacing == "leading"
    back = schedulers.EulerDiscreteScheduler.from_config(plain.config, timestep_spacing="log_sigma")
    assert exact(back)
    assert exact(schedulers.HeunDiscreteScheduler.from_config(scheduler.config))


def test_betas_given_to_from_config_replace_an_exact_end():
    infinite = ZERO.scheduler("heun", "v_prediction")
    finite = type(infinite).from_config(
        infinite.config, trained_betas=SCHEDULES["300 rescale"].betas.tolist()
    )
    assert finite.noise_schedule == SCHEDULES["300 rescale"]


def test_epsilon_at_snr_0_warns_where_diffusers_puts_4096():
    with pytest.warns(
        UserWarning, match="EulerDiscreteScheduler: epsilon prediction cannot be sampled from SNR 0.*4096"
    ):
        scheduler = schedulers.EulerDiscreteScheduler(**SDXL, rescale_betas_zero_snr=True)
        scheduler.set_timesteps(5)
    ddim = schedulers.DDIMScheduler(**SDXL, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    ddim.set_timesteps(5)
    with pytest.raises(
        ValueError, match=r"epsilon prediction at SNR 0.*use v_prediction, or a finite terminal sigma"
    ):
        ddim.step(torch.zeros(1), ddim.timesteps[0], torch.zeros(1))


def test_wrong_arguments_are_one_sentence():
    with pytest.raises(ValueError, match="unknown sampler 'lms': expected one of ddpm, ddim, euler"):
        ZERO.scheduler("lms", "v_prediction")
    with pytest.raises(ValueError, match="EulerDiscreteScheduler has no setting 'solver_order'"):
        ZERO.scheduler("euler", "v_prediction", solver_order=3)
    with pytest.raises(ValueError, match="unknown prediction_type 'v'"):
        ZERO.scheduler("euler", "v")
    with pytest.raises(ValueError, match="unknown timestep_spacing 'even'"):
        ZERO.scheduler("euler", "v_prediction", "even")
    with pytest.raises(ValueError, match="use_beta_sigmas does not go with"):
        ZERO.scheduler("dpmpp_2m", "v_prediction", use_beta_sigmas=True)
    with pytest.raises(ValueError, match="use 'dpmsolver\\+\\+'"):
        loop(
            ZERO.scheduler(
                "dpmpp_2m", "v_prediction", algorithm_type="dpmsolver", final_sigmas_type="sigma_min"
            ),
            5,
        )
    with pytest.raises(ValueError, match="solver_type 'bh1' divides by 0 at the clean image: use 'bh2'"):
        ZERO.scheduler("unipc", "v_prediction", solver_type="bh1")
    with pytest.raises(ValueError, match=r"s_churn 0\.5 does not go with"):
        scheduler = ZERO.scheduler("euler", "v_prediction")
        scheduler.set_timesteps(3)
        scheduler.step(torch.zeros(1), scheduler.timesteps[0], torch.zeros(1), s_churn=0.5)


class Pipeline:
    def __init__(self, scheduler):
        self.scheduler = scheduler


def test_fix_scheduler_keeps_class_and_settings_and_takes_the_trained_schedule():
    theirs = diffusers.DPMSolverMultistepScheduler(
        **SDXL,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        algorithm_type="sde-dpmsolver++",
        solver_order=3,
    )
    ours = fix_scheduler(theirs)
    assert type(ours) is schedulers.DPMSolverMultistepScheduler and ours.noise_schedule == ZERO
    assert ours.config.algorithm_type == "sde-dpmsolver++" and ours.config.solver_order == 3
    assert (
        "sde-dpmsolver++" in theirs.config.algorithm_type
        and type(theirs) is diffusers.DPMSolverMultistepScheduler
    )


def test_fix_scheduler_of_a_pipeline_that_was_loaded_as_epsilon():
    pipe = Pipeline(diffusers.EulerDiscreteScheduler(**SDXL, timestep_spacing="leading", steps_offset=1))
    assert fix_scheduler(pipe, ZERO, "v_prediction") is pipe
    assert pipe.scheduler.noise_schedule == ZERO and pipe.scheduler.config.prediction_type == "v_prediction"
    pipe.scheduler.set_timesteps(25)
    assert pipe.scheduler.timesteps[0] == 999


def test_fix_scheduler_refuses_what_it_cannot_fix():
    with pytest.raises(ValueError, match="there is no drop-in for LMSDiscreteScheduler: take another"):
        fix_scheduler(Pipeline(diffusers.LMSDiscreteScheduler(**SDXL)))
    with pytest.raises(ValueError, match="epsilon prediction cannot be sampled from SNR 0"):
        fix_scheduler(diffusers.EulerDiscreteScheduler(**SDXL, rescale_betas_zero_snr=True))


def test_import_of_the_package_does_not_import_diffusers():
    import subprocess

    code = "import sys, sdxl_fixes; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_thresholding_and_clipping_act_on_the_image():
    scheduler = ZERO.scheduler("ddim", "v_prediction", clip_sample=True, clip_sample_range=0.5)
    scheduler.set_timesteps(1)
    got = scheduler.step(
        torch.tensor([[[[3.0]]]]), scheduler.timesteps[0], torch.ones(1, 1, 1, 1)
    ).prev_sample
    assert got.item() == -0.5


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "unipc"])
def test_final_sigmas_type_sigma_min_ends_at_the_first_trained_level(sampler):
    """A network that knows the image and the noise gets x = alpha_0 x0 + sigma_0 noise back."""
    stock = getattr(diffusers, SAMPLERS[sampler][0].__name__)
    if "final_sigmas_type" not in inspect.signature(stock.__init__).parameters:
        pytest.skip("this diffusers has no final_sigmas_type")
    scheduler = ZERO.scheduler(sampler, "v_prediction", final_sigmas_type="sigma_min")
    x0, noise = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    scheduler.set_timesteps(timesteps=[999, 700, 300, 20]) if sampler != "unipc" else scheduler.set_timesteps(
        6
    )
    x = noise
    for t in scheduler.timesteps:
        alpha, sigma = ZERO.sqrt_alphas_cumprod[int(t)], ZERO.sqrt_one_minus_alphas_cumprod[int(t)]
        x = scheduler.step((alpha * noise - sigma * x0).float(), t, x).prev_sample
    alpha, sigma = ZERO.sqrt_alphas_cumprod[0], ZERO.sqrt_one_minus_alphas_cumprod[0]
    assert torch.allclose(x, (alpha * x0 + sigma * noise).float(), atol=1e-4)
    assert float(scheduler.sigmas[-1]) == pytest.approx(ZERO.sigmas[0])


@pytest.mark.parametrize("clipped", [False, True])
def test_use_clipped_model_output_takes_the_noise_from_the_clipped_image(clipped):
    """Against DDIM's equation 12 (arXiv:2010.02502) in float64."""
    scheduler = ZERO.scheduler("ddim", "sample", clip_sample=True)
    scheduler.set_timesteps(6)
    t, after = (int(scheduler.timesteps[i]) for i in (2, 3))
    alpha, sigma = ZERO.sqrt_alphas_cumprod, ZERO.sqrt_one_minus_alphas_cumprod
    noise = (0.7 - alpha[t] * (1.0 if clipped else 3.0)) / sigma[t]
    x = torch.full((1, 1, 1, 1), 0.7)
    got = scheduler.step(torch.full_like(x, 3.0), t, x, use_clipped_model_output=clipped).prev_sample
    assert got.item() == pytest.approx(alpha[after] * 1.0 + sigma[after] * noise, rel=1e-5)


def test_config_changed_after_construction_is_read():
    """Pipelines change clip_sample and steps_offset, in the config or beneath it."""
    scheduler = ZERO.scheduler("ddim", "sample")
    scheduler.set_timesteps(1)
    far, x = torch.full((1, 1, 1, 1), 3.0), torch.zeros(1, 1, 1, 1)
    assert scheduler.step(far, 999, x).prev_sample.item() == 3
    changed = dict(scheduler.config) | {"clip_sample": True}
    scheduler._internal_dict = diffusers.configuration_utils.FrozenDict(changed)
    assert scheduler.step(far, 999, x).prev_sample.item() == 1
    scheduler.register_to_config(clip_sample=False)
    assert scheduler.step(far, 999, x).prev_sample.item() == 3 and scheduler.noise_schedule == ZERO


def test_drop_ins_that_replaced_diffusers_classes_find_them(monkeypatch):
    ours = schedulers.EulerDiscreteScheduler
    theirs = diffusers.EulerDiscreteScheduler
    monkeypatch.setattr(diffusers, "EulerDiscreteScheduler", ours)
    assert type(ours(**SDXL)) is theirs and type(ours(**SDXL, timestep_spacing="log_sigma")) is ours


def test_sigmas_are_the_schedule_s():
    scheduler = SCHEDULES["300 rescale"].scheduler("dpmpp_2m", "v_prediction")
    scheduler.set_timesteps(12)
    expected = np.append(SCHEDULES["300 rescale"].sigmas[scheduler.timesteps.tolist()], 0)
    assert scheduler.sigmas.numpy() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("sampler", ["dpmpp_2m", "unipc"])
def test_no_order_extrapolates_from_snr_0(sampler, order):
    scheduler = ZERO.scheduler(sampler, "v_prediction", solver_order=order)
    mean, spread = gaussian.sampled(scheduler, ZERO, "v_prediction", 25)
    ideal_mean, ideal_spread = gaussian.ideal(ZERO)
    assert (spread / ideal_spread - 1).abs().max() < 0.03
    assert (mean - ideal_mean).abs().max() < 0.0051 * gaussian.MEAN_OVER_SCALE


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "unipc", "euler", "ddim", "heun"])
def test_a_step_in_half_precision_is_the_float32_step_rounded(sampler):
    x, output = torch.randn(2, 1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).to(torch.float16)
    got, expected = [], []
    for results, dtype in ((got, torch.float16), (expected, torch.float32)):
        scheduler = SCHEDULES["20000"].scheduler(sampler, "v_prediction")
        scheduler.set_timesteps(10)
        results += [
            scheduler.step(output.to(dtype), t, x.to(dtype)).prev_sample.half()
            for t in scheduler.timesteps[:4]
        ]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("name", ["14.6", "20000 rescale", "inf"])
@pytest.mark.parametrize("sampler", ["dpmpp_2m", "dpmpp_2m_sde", "unipc"])
def test_levels_of_the_multistep_solvers_are_the_schedule_s(sampler, name):
    schedule = SCHEDULES[name]
    alpha, sigma, _ = schedule.levels()
    got = schedule.scheduler(sampler, "v_prediction")._sigma_to_alpha_sigma_t(
        torch.from_numpy(np.array(schedule.sigmas))
    )
    assert got[0].numpy() == pytest.approx(alpha, rel=1e-9, abs=1e-12)
    assert got[1].numpy() == pytest.approx(sigma, rel=1e-9)


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_a_class_that_knows_infinity_is_told_by_its_own_settings_alone(name):
    """Of a schedule that no flag names: betas that end at 1, and no key that stock classes do not know."""
    schedule = NoiseSchedule.sdxl().with_terminal_sigma(math.inf, "tail")
    made = schedule.scheduler(name, "v_prediction", "trailing")
    stock = getattr(diffusers, type(made).__name__)
    loaded = stock.from_config(dict(made.config))
    assert float(loaded.alphas_cumprod[-1]) == 0 and float(loaded.alphas_cumprod[-2]) > 0
    told = {"_class_name", "_use_default_values"}  # diffusers' own
    assert set(made.config) - told == set(stock().config) - told


class _Waits(TorchDispatchMode):
    """Counts what would wait for a GPU: numbers that are read out of tensors."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_no_sampling_step_waits_for_the_device(name):
    scheduler = ZERO.scheduler(name, prediction_type="v_prediction")
    scheduler.set_timesteps(5)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    copied, again = x.clone(), ZERO.scheduler(name, prediction_type="v_prediction")
    again.set_timesteps(5)
    torch.manual_seed(1)
    with _Waits() as waits:
        for t in scheduler.timesteps:
            x = scheduler.step(0.5 * x, t, x).prev_sample
    torch.manual_seed(1)
    for t in again.timesteps.clone():  # which has no place in the list
        copied = again.step(0.5 * copied, t, copied).prev_sample
    assert waits.count == 0 and torch.equal(x, copied)


def test_a_part_of_the_timesteps_is_known_by_its_place_as_well():
    """As pipelines that start from an image take it; and a copy is read."""
    scheduler = ZERO.scheduler("ddim", prediction_type="v_prediction")
    scheduler.set_timesteps(6)
    x = torch.ones(1, 4, 2, 2)
    for t in scheduler.timesteps[2:]:
        numbers = [scheduler.step(x, given, x).prev_sample for given in (t, t.clone(), int(t))]
        assert torch.equal(numbers[0], numbers[1]) and torch.equal(numbers[0], numbers[2])
