"""The one writer of scheduler configs: what it writes, held against diffusers' own classes."""

import json

import diffusers
import numpy as np
import pytest
import torch

from sdxl_fixes import NoiseSchedule
from sdxl_fixes.checkpoint import Sampling, scheduler_config
from sdxl_fixes.model_files.stamp import write_scheduler_config
from sdxl_fixes.schedulers import config_for, fix_scheduler

SDXL = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
}
STOCK = NoiseSchedule.sdxl()
ZERO = STOCK.zero_terminal_snr()
SCHEDULES = [
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
# class -> settings of it that sample something else than its betas say, or change the predicted image
OVERRULING = [
    ("EulerDiscreteScheduler", {"sigma_max": 5.0, "use_karras_sigmas": True}),
    ("EulerDiscreteScheduler", {"sigma_min": 0.5, "use_karras_sigmas": True}),
    ("EulerDiscreteScheduler", {"timestep_type": "continuous", "use_karras_sigmas": True}),
    ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    ("EulerDiscreteScheduler", {"use_exponential_sigmas": True}),
    ("DDIMScheduler", {"clip_sample": True}),
    ("DDIMScheduler", {}),  # clips if nothing is said
    ("DDPMScheduler", {"clip_sample": True}),
    ("DDIMScheduler", {"clip_sample": False, "thresholding": True}),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}),
    ("DPMSolverMultistepScheduler", {"lambda_min_clipped": -1.0}),
    ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "flow_shift": 3.0}),
    ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "flow_shift": 3.0, "shift_terminal": 0.1}),
]


def sampled(scheduler):
    """Timesteps, sigmas, and the sample of a network that always says the image is 2 everywhere."""
    scheduler.set_timesteps(10)
    x = torch.ones(1, 1, 2, 2) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        scheduler.scale_model_input(x, t)
        x = scheduler.step(
            torch.full_like(x, 2.0), t, x, **({"eta": 0.0} if "DDIM" in type(scheduler).__name__ else {})
        ).prev_sample
        torch.manual_seed(0)
    return scheduler.timesteps.tolist(), getattr(scheduler, "sigmas", torch.zeros(1)).tolist(), x


def known(cls, settings):
    """Skip what this release of diffusers does not have."""
    if missing := set(settings) - set(cls().config):
        pytest.skip(f"this diffusers' {cls.__name__} has no {missing}")


@pytest.mark.parametrize(("name", "settings"), OVERRULING, ids=str)
def test_settings_that_overrule_the_schedule_are_not_carried_along(name, settings):
    cls, schedule = getattr(diffusers, name), STOCK.with_terminal_sigma(300, "beta_end")
    known(cls, settings)
    told = schedule.to_config("sample")
    plain = cls(**SDXL | {key: value for key, value in told.items() if key in cls().config})
    if "clip_sample" in plain.config:
        plain.register_to_config(clip_sample=False)
    base = cls(**SDXL, prediction_type="sample", **settings).config
    made = cls.from_config(config_for(cls, schedule, "sample", base))
    torch.manual_seed(0)
    told, sigmas, x = sampled(made)
    torch.manual_seed(0)
    expected_told, expected_sigmas, expected = sampled(plain)
    assert told == expected_told and sigmas == expected_sigmas and torch.equal(x, expected)
    # without the writer they do overrule it, else this shows nothing
    torch.manual_seed(0)
    theirs, their_sigmas, carried = sampled(cls.from_config(base, **schedule.to_config("sample")))
    assert (theirs, their_sigmas) != (told, sigmas) or not torch.equal(carried, expected)


@pytest.mark.parametrize(
    ("name", "settings"), [row for row in OVERRULING if "Euler" in row[0] or "DDIM" in row[0]]
)
def test_a_stamped_file_does_not_carry_them_along(name, settings, tmp_path):
    cls, file = getattr(diffusers, name), tmp_path / "scheduler_config.json"
    known(cls, settings)
    cls(**SDXL, steps_offset=1, **settings).save_pretrained(tmp_path)
    assert write_scheduler_config(file, Sampling(ZERO, "v_prediction")) == "written"
    assert write_scheduler_config(file, Sampling(ZERO, "v_prediction")) == "unchanged"
    stamped = cls.from_pretrained(tmp_path)
    plain = cls(
        **SDXL | STOCK.to_config("v_prediction") | {"rescale_betas_zero_snr": True},
        **({"clip_sample": False} if "clip_sample" in cls().config else {}),
    )
    assert type(stamped) is cls and stamped.config.steps_offset == 1  # of other things it says the same
    (told, sigmas, x), (expected_told, expected_sigmas, expected) = sampled(stamped), sampled(plain)
    assert told == expected_told and told[0] == 999 and sigmas == expected_sigmas
    assert torch.equal(x, expected)


def test_a_saved_dpm_solver_whose_json_is_not_strict_is_stamped_as_euler(tmp_path):
    diffusers.DPMSolverMultistepScheduler(**SDXL).save_pretrained(tmp_path)
    file = tmp_path / "scheduler_config.json"
    assert "Infinity" in file.read_text()
    assert write_scheduler_config(file, Sampling(ZERO, "v_prediction")) == "written"
    config = json.loads(file.read_text(), parse_constant=pytest.fail)
    assert config["_class_name"] == "EulerDiscreteScheduler" and config["rescale_betas_zero_snr"]


def test_fix_scheduler_does_not_clip_and_can_be_told_to():
    """Latents do not end at 1: a DDIM whose config says nothing of it clips, and 2 comes back as 1."""
    theirs = diffusers.DDIMScheduler(**SDXL, prediction_type="sample")
    assert theirs.config.clip_sample
    assert sampled(fix_scheduler(theirs))[2] == pytest.approx(torch.full((1, 1, 2, 2), 2.0))
    assert sampled(fix_scheduler(theirs, clip_sample=True))[2] == pytest.approx(torch.ones(1, 1, 2, 2))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("name", NAMES)
def test_diffusers_classes_follow_the_config_also_after_saving(name, schedule, tmp_path):
    cls = getattr(diffusers, name)
    base = cls.from_config(SDXL | {"rescale_betas_zero_snr": True, "steps_offset": 1}).config
    scheduler = cls.from_config(config_for(cls, schedule, "v_prediction", base))
    scheduler.save_pretrained(tmp_path)
    for one in (scheduler, cls.from_pretrained(tmp_path)):
        table = one.alphas_cumprod.double().numpy()
        np.testing.assert_allclose(table, schedule.alphas_cumprod, rtol=1e-3, atol=1e-9)
        assert one.config.prediction_type == "v_prediction" and one.config.steps_offset == 1
        assert one.config.timestep_spacing == "trailing" and not one.config.get("rescale_betas_zero_snr")
        assert NoiseSchedule.from_scheduler(one) == schedule


@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "DPMSolverMultistepScheduler"])
def test_rectified_flow_is_named_to_classes_that_know_it(name):
    """Loaded without us, they start at pure noise and end at the clean image."""
    cls = getattr(diffusers, name)
    known(cls, {"use_flow_sigmas": True})
    scheduler = NoiseSchedule.flow(3.0).scheduler({"U": "unipc", "D": "dpmpp_2m"}[name[0]], "flow_prediction")
    theirs = cls.from_config(json.loads(scheduler.to_json_string()))
    theirs.set_timesteps(8)
    assert theirs.config.use_flow_sigmas and float(theirs.sigmas[0]) == pytest.approx(1, abs=1e-3)
    assert NoiseSchedule.from_scheduler(theirs) == NoiseSchedule.flow(3.0)
    assert type(scheduler).from_config(theirs.config).noise_schedule == NoiseSchedule.flow(3.0)


def test_the_terminal_sigma_is_infinite_only_for_classes_that_can_start_there():
    schedule = STOCK.with_terminal_sigma(float("inf"), "tail")
    for name, last in (("DDIMScheduler", 0.0), ("EulerDiscreteScheduler", 1 / (1 + 4096**2))):
        made = getattr(diffusers, name).from_config(scheduler_config(name, schedule, "v_prediction"))
        assert float(made.alphas_cumprod[-1]) == pytest.approx(last, rel=0.02)
