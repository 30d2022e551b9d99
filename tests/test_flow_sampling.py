"""Rectified flow and other tables that end far out, sampled: against the exact Gaussian model, and against
diffusers' FlowMatchEulerDiscreteScheduler and its use_flow_sigmas."""

import inspect
import json
import math

import diffusers
import gaussian
import numpy as np
import pytest
import torch

from sdxl_fixes import NoiseSchedule, schedulers
from sdxl_fixes.schedulers import SAMPLERS, fix_scheduler

ZERO = NoiseSchedule.sdxl().zero_terminal_snr()
FAR = {
    "flow 0.3": NoiseSchedule.flow(0.3),
    "flow 6": NoiseSchedule.flow(6),
    "flow 20": NoiseSchedule.flow(20),
    "4000 steps": NoiseSchedule.scaled_linear(num_timesteps=4000).zero_terminal_snr(),
    "geometric": NoiseSchedule.from_sigmas(np.geomspace(0.002, 80, 1000)).zero_terminal_snr(),
}
FIRST_ORDER = ("ddim", "euler", "ddpm", "euler_a")
NOISY = ("ddpm", "euler_a", "dpmpp_2m_sde")


@pytest.mark.parametrize("prediction_type", ["v_prediction", "flow_prediction", "sample"])
@pytest.mark.parametrize("name", FAR)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_samples_every_table(sampler, name, prediction_type):
    """Those that draw noise to the accuracy of 1,000 samples."""
    schedule = FAR[name]
    scheduler = schedule.scheduler(sampler, prediction_type)
    samples, noise = (1000, 0.08) if sampler in NOISY else (2, 0.0)
    mean, spread = gaussian.sampled(scheduler, schedule, prediction_type, 25, samples=samples)
    assert (mean - gaussian.MEAN_OVER_SCALE).abs().max() < 0.02 + noise
    lowest = 0.84 if sampler in ("ddpm", "euler_a") else 0.89 if sampler in FIRST_ORDER else 0.95
    assert spread.min() > lowest - noise and spread.max() < 1.06 + noise


@pytest.mark.parametrize("name", ["flow 6", "flow 20", "4000 steps", "geometric"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_stock_classes_load_a_stand_in_noisier_than_the_timestep_before(sampler, name):
    schedule = FAR[name]
    saved = json.loads(schedule.scheduler(sampler, "v_prediction").to_json_string())
    assert NoiseSchedule.from_config(saved) == schedule
    theirs = getattr(diffusers, saved["_class_name"]).from_config(saved)
    sigmas = ((1 - theirs.alphas_cumprod) / theirs.alphas_cumprod) ** 0.5
    assert (sigmas.diff() > 0).all()
    if sampler not in ("ddpm", "ddim"):  # which start at infinity
        assert float(sigmas[-1]) == pytest.approx(1.1 * schedule.sigmas[-2], rel=0.01)
    _, spread = gaussian.sampled(theirs, schedule, "v_prediction", 40)
    assert torch.isfinite(spread).all()


# ---------------------------------------------------------------- timesteps that are given


@pytest.mark.parametrize("prediction_type", ["v_prediction", "flow_prediction"])
@pytest.mark.parametrize("name", ["flow 0.3", "flow 20", "4000 steps", "ends at 14.6"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_its_own_timesteps_are_accepted_and_mean_the_same(sampler, name, prediction_type):
    scheduler = FAR.get(name, NoiseSchedule.sdxl()).scheduler(sampler, prediction_type)
    scheduler.set_timesteps(9)
    shown, levels, sigmas = scheduler.timesteps, scheduler._levels, scheduler.sigmas
    for given in (shown, shown.tolist(), shown.numpy()):
        scheduler.set_timesteps(timesteps=given)
        assert torch.equal(scheduler.timesteps, shown) and scheduler.timesteps.dtype == shown.dtype
        assert scheduler._levels == levels and torch.equal(scheduler.sigmas, sigmas)
        assert scheduler.num_inference_steps == 9


def velocity(x, t):
    """Of a model that knows neither time nor scale; any smooth function would do."""
    return torch.sin(1.7 * x) - 0.3 * x


def integrated(scheduler, x, network=velocity):
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x).prev_sample
    return x


NOISE = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("sampler", ["euler", "ddim"])
def test_a_flow_timestep_between_trained_ones_is_that_time(sampler):
    """Flow's step is x + (s' - s) u, with s = t/1000 for any t (arXiv:2209.03003 eq. 2)."""
    scheduler = NoiseSchedule.flow(3).scheduler(sampler, "flow_prediction")
    scheduler.set_timesteps(timesteps=[800, 500.5, 200])
    assert scheduler.timesteps.tolist() == [800, 500.5, 200]
    x0 = torch.full_like(NOISE, 2.0)
    noised = scheduler.add_noise(x0, NOISE, scheduler.timesteps[1:2])
    assert torch.allclose(noised, 0.4995 * x0 + 0.5005 * NOISE, atol=1e-6)
    x = NOISE.double()
    for s, after in ((0.8, 0.5005), (0.5005, 0.2), (0.2, 0.0)):
        x = x + (after - s) * velocity(x, s)
    assert torch.allclose(integrated(scheduler, NOISE), x.float(), atol=1e-5)


@pytest.mark.parametrize("given", [[1001, 500], [500, 2.9], [500, 500], [math.nan], []])
def test_flow_timesteps_outside_the_trained_ones_are_refused(given):
    scheduler = NoiseSchedule.flow(3).scheduler("unipc", "flow_prediction")
    with pytest.raises(
        ValueError, match=r"timesteps must be numbers that fall from at most 1000 to at least 2\.99401, got"
    ):
        scheduler.set_timesteps(timesteps=given)


# ---------------------------------------------------------------- diffusers' own


flow_match = pytest.mark.skipif(
    not hasattr(getattr(diffusers, "FlowMatchEulerDiscreteScheduler", None), "set_shift"),
    reason="this diffusers is older than its flow matching",
)


@flow_match
@pytest.mark.parametrize("steps", [1, 7, 30])
@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
def test_euler_at_the_timesteps_of_flow_match_euler_is_flow_match_euler(shift, steps):
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(steps)
    schedule = NoiseSchedule.from_scheduler(theirs)
    assert schedule == NoiseSchedule.flow(shift)
    ours = schedule.scheduler("euler", "flow_prediction")
    ours.set_timesteps(timesteps=theirs.timesteps)
    assert torch.allclose(integrated(ours, NOISE), integrated(theirs, NOISE), atol=1e-4)


@pytest.mark.parametrize("sampler", ["unipc", "dpmpp_2m"])
@pytest.mark.parametrize("steps", [5, 20])
def test_solvers_at_the_sigmas_of_use_flow_sigmas_are_diffusers(sampler, steps):
    cls = getattr(diffusers, SAMPLERS[sampler][0].__name__)
    if "use_flow_sigmas" not in inspect.signature(cls.__init__).parameters:
        pytest.skip("this diffusers has no use_flow_sigmas")
    theirs = cls(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction")
    theirs.set_timesteps(steps)
    ours = NoiseSchedule.flow(3).scheduler(sampler, "flow_prediction")
    ours.set_timesteps(timesteps=1000 * theirs.sigmas[:-1].double())
    assert torch.allclose(integrated(ours, NOISE), integrated(theirs, NOISE), atol=1e-4)


def test_fix_scheduler_reads_flow_as_flow_from_any_class_that_says_so():
    cls = diffusers.UniPCMultistepScheduler
    if "use_flow_sigmas" not in inspect.signature(cls.__init__).parameters:
        pytest.skip("this diffusers has no use_flow_sigmas")
    theirs = cls(use_flow_sigmas=True, flow_shift=6.0, prediction_type="flow_prediction", solver_order=3)
    ours = fix_scheduler(theirs)
    assert type(ours) is schedulers.UniPCMultistepScheduler and ours.config.solver_order == 3
    assert ours.noise_schedule == NoiseSchedule.flow(6) == NoiseSchedule.from_scheduler(theirs)
    _, spread = gaussian.sampled(ours, NoiseSchedule.flow(6), "flow_prediction", 25)
    assert (spread - 1).abs().max() < 0.03
    wrong = cls(use_flow_sigmas=True, flow_shift=6.0)
    with pytest.raises(ValueError, match="use_flow_sigmas, so its prediction_type is wrong: expected flow"):
        fix_scheduler(wrong)
    assert fix_scheduler(wrong, prediction_type="flow_prediction").noise_schedule == NoiseSchedule.flow(6)


@flow_match
def test_a_shift_that_was_set_is_not_the_config_s():
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.set_shift(6.0)
    with pytest.raises(
        ValueError, match=r"has shift 6\.0, and its config says 3\.0: use NoiseSchedule\.flow"
    ):
        NoiseSchedule.from_scheduler(theirs)


@pytest.mark.parametrize("sigma", [50_000, 100_000])
def test_an_end_that_float32_betas_cannot_hold_is_refused(sigma):
    schedule = NoiseSchedule.sdxl().with_terminal_sigma(sigma, "last")
    ours = schedule.scheduler("euler", "v_prediction")
    theirs = diffusers.EulerDiscreteScheduler.from_config(ours.config)
    reached = float(((1 - theirs.alphas_cumprod[-1]) / theirs.alphas_cumprod[-1]) ** 0.5)
    assert not math.isclose(reached, sigma, rel_tol=0.1)
    with pytest.raises(
        ValueError, match=r"EulerDiscreteScheduler's alphas_cumprod .* is not what its config"
    ):
        NoiseSchedule.from_scheduler(theirs)
    assert NoiseSchedule.from_scheduler(ours) == schedule  # whose betas are float64
