"""sdxl_fixes.diffusers.with_schedule against real diffusers schedulers, saved and loaded without this
package."""

import json

import diffusers
import numpy as np
import pytest
import torch

from sdxl_fixes import NoiseSchedule
from sdxl_fixes.diffusers import with_schedule

SDXL = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
}
STOCK = NoiseSchedule.sdxl()
FINITE = [
    STOCK,
    STOCK.with_terminal_sigma(300, "beta_end"),
    STOCK.with_terminal_sigma(300, "tail"),
    NoiseSchedule.cosine(num_timesteps=500),
]
NAMES = [
    "DDPMScheduler",
    "DDIMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "HeunDiscreteScheduler",
    "PNDMScheduler",
    "LCMScheduler",
]


def numpy_table(scheduler):
    return scheduler.alphas_cumprod.double().numpy()


@pytest.mark.parametrize("schedule", FINITE, ids=repr)
@pytest.mark.parametrize("name", NAMES)
def test_the_scheduler_follows_the_schedule_also_after_saving(name, schedule, tmp_path):
    cls = getattr(diffusers, name)
    scheduler = with_schedule(cls(**SDXL), schedule, "v_prediction")
    assert type(scheduler) is cls
    scheduler.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "scheduler_config.json").read_text())
    json.dumps(
        {key: config[key] for key in schedule.to_config() if key in config}, allow_nan=False
    )  # DPM++'s own keys hold -Infinity
    for one in (scheduler, cls.from_pretrained(tmp_path)):
        np.testing.assert_allclose(numpy_table(one), schedule.alphas_cumprod, rtol=1e-3, atol=1e-9)
        assert one.config.prediction_type == "v_prediction" and one.config.num_train_timesteps == len(
            schedule
        )
        assert one.config.timestep_spacing == "trailing"
        assert NoiseSchedule.from_scheduler(one) == schedule


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_zero_terminal_snr_samples_the_truth_of_a_known_x0(name, kind):
    """A network that knows x0 must get it back, from pure noise, through the infinite terminal sigma."""
    schedule = STOCK.zero_terminal_snr()
    scheduler = with_schedule(getattr(diffusers, name)(**SDXL, clip_sample=False), schedule, kind)
    assert numpy_table(scheduler)[-1] == 0
    scheduler.set_timesteps(10)
    assert scheduler.timesteps[0] == 999
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(1, 4, 8, 8, generator=generator)
    sample = torch.randn(1, 4, 8, 8, generator=generator)
    for t in scheduler.timesteps:
        alpha, sigma = schedule.sqrt_alphas_cumprod[t], schedule.sqrt_one_minus_alphas_cumprod[t]
        noise = (sample - alpha * x0) / sigma
        prediction = x0 if kind == "sample" else alpha * noise - sigma * x0
        sample = scheduler.step(prediction.float(), t, sample, generator=generator).prev_sample
    torch.testing.assert_close(sample, x0, rtol=0, atol=0.1)


def test_the_given_scheduler_stays_as_it_was():
    scheduler = diffusers.DDIMScheduler(**SDXL)
    before = dict(scheduler.config)
    with_schedule(scheduler, STOCK.zero_terminal_snr(), "v_prediction")
    assert dict(scheduler.config) == before and numpy_table(scheduler)[-1] == pytest.approx(0.00466, rel=1e-3)


def test_settings_that_are_none_of_the_schedules_business_are_kept():
    scheduler = diffusers.EulerDiscreteScheduler(
        **SDXL, prediction_type="v_prediction", use_karras_sigmas=True, steps_offset=1
    )
    changed = with_schedule(scheduler, STOCK.with_terminal_sigma(300, "beta_end"))
    assert changed.config.use_karras_sigmas and changed.config.steps_offset == 1
    assert changed.config.prediction_type == "v_prediction"  # None keeps it


def test_options_are_more_of_the_schedulers_config():
    changed = with_schedule(
        diffusers.EulerDiscreteScheduler(**SDXL), STOCK, timestep_spacing="leading", steps_offset=1
    )
    assert changed.config.timestep_spacing == "leading" and changed.config.steps_offset == 1
    assert NoiseSchedule.from_scheduler(changed) == STOCK


def test_a_rescale_flag_that_the_class_obeys_is_switched_off():
    scheduler = diffusers.EulerDiscreteScheduler(**SDXL, rescale_betas_zero_snr=True)
    changed = with_schedule(scheduler, STOCK.with_terminal_sigma(300, "tail"), "v_prediction")
    assert not changed.config.rescale_betas_zero_snr
    assert changed.sigmas.max().item() == pytest.approx(300, rel=1e-3)


def test_following_another_schedule_twice_keeps_the_last():
    scheduler = with_schedule(
        diffusers.DDIMScheduler(**SDXL), STOCK.with_terminal_sigma(300, "tail"), "v_prediction"
    )
    back = with_schedule(scheduler, STOCK, "epsilon")
    assert NoiseSchedule.from_scheduler(back) == STOCK and back.config.prediction_type == "epsilon"
    assert back.config.trained_betas is None


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("DDPMScheduler", "DDIMScheduler")])
def test_infinite_sigma_is_refused_where_it_would_give_nan(name):
    with pytest.raises(
        ValueError, match=f"{name} with v_prediction cannot sample an infinite terminal sigma"
    ):
        with_schedule(getattr(diffusers, name)(**SDXL), STOCK.zero_terminal_snr(), "v_prediction")


def test_infinite_sigma_with_epsilon_is_refused():
    for kind in (None, "epsilon"):
        with pytest.raises(
            ValueError, match="DDIMScheduler with epsilon cannot sample an infinite terminal sigma"
        ):
            with_schedule(diffusers.DDIMScheduler(**SDXL), STOCK.zero_terminal_snr(), kind)


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler"])
def test_a_scheduler_without_betas_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} takes no betas, so it cannot follow a noise schedule"):
        with_schedule(getattr(diffusers, name)(), STOCK)


def test_an_unknown_prediction_type_is_refused():
    with pytest.raises(ValueError, match="unknown prediction_type 'velocity'"):
        with_schedule(diffusers.DDIMScheduler(**SDXL), STOCK, "velocity")


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "PNDMScheduler"])
def test_a_rescale_flag_that_the_class_ignores_is_switched_off_too(name):
    scheduler = getattr(diffusers, name).from_config(SDXL | {"rescale_betas_zero_snr": True})
    changed = with_schedule(scheduler, STOCK.with_terminal_sigma(300, "tail"), "v_prediction")
    assert not changed.config.get(
        "rescale_betas_zero_snr"
    )  # Euler, made from this config, would rescale again
