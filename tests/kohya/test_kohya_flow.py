"""Rectified flow in the kohya adapter: what is told, what is refused, previews, and that no combination of
what makes a step is ever not finite."""

import argparse
import functools
import inspect
import itertools
import json

import diffusers
import pytest
import torch
from closed_form import LOSSES, covering, flow_levels
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, PNDMScheduler

from sdxl_fixes import NoiseSchedule
from sdxl_fixes.checkpoint import Sampling, read_record
from sdxl_fixes.errors import FixError, FlagError
from sdxl_fixes.kohya import checkpoint, loss, noise, previews, schedule, timesteps, validation
from sdxl_fixes.kohya import run as kohya_run
from sdxl_fixes.kohya.flags import OURS
from sdxl_fixes.kohya.run import SESSION

FLOW = dict(prediction_type="flow_prediction")
SDXL = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


@pytest.fixture
def start():
    """start(**flags): a run of kohya's arguments, begun."""

    def begin(**flags):
        SESSION.begin(kohya_run.start(argparse.Namespace(**flags), OURS))
        return SESSION.run

    yield begin
    SESSION.reset()


def upstream(args, noise_scheduler, latents, rows):
    """What sd-scripts' get_noise_noisy_latents_and_timesteps does, at ``rows`` unless they are drawn."""
    made = torch.randn_like(latents)
    if rows is None:
        rows = timesteps.draw(lambda low, high, size, _: torch.arange(size), 0, 1000, len(latents), "cpu")
    seen = made
    if gamma := getattr(args, "ip_noise_gamma", None):
        seen = made + gamma * torch.randn_like(latents)
    return made, noise_scheduler.add_noise(latents, seen, rows), rows


def step(args, latents, rows=None):
    """(noisy, told, target, loss's gradient, loss) of a step of the run that was begun: the trainer's calls,
    in its order, with a prediction that is wrong everywhere."""
    run = SESSION.run
    scheduler = DDPMScheduler(**SDXL)
    schedule.prepare(lambda *_: None, scheduler, "cpu")
    named = functools.wraps(noise.noised)(functools.partial(upstream, rows=rows))
    made, noisy, told = noise.noised(named, args, scheduler, latents)
    v = run.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, made, told) if v else made
    prediction = (target.float() * 0.5 + 0.1).requires_grad_()
    delta = loss.threshold(lambda *_: None, args, told, scheduler)
    kind = run.flags.loss_type
    elements = loss.conditional_loss(_plain, prediction, target.float(), kind, "none", delta)
    total = elements.mean([1, 2, 3]).mean()
    return noisy, told, target, torch.autograd.grad(total, prediction)[0], total.detach()


def _plain(prediction, target, loss_type, reduction, delta):
    return (prediction - target).square()


@pytest.mark.parametrize("shift", [1.0, 2.5, 6.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_network_is_told_1000_s_as_float32_and_aims_at_noise_minus_image(start, shift, dtype):
    run = start(**FLOW, flow_shift=shift)
    latents, rows = torch.randn(5, 4, 2, 2).to(dtype), torch.tensor([0, 1, 499, 998, 999])
    torch.manual_seed(3)
    noisy, told, target, _, _ = step(run.args, latents, rows)
    torch.manual_seed(3)
    made = torch.randn_like(latents).double()
    s = flow_levels(shift)[rows]
    assert told.dtype == torch.float32 and told[-1] == 1000
    assert torch.allclose(told.double(), 1000 * s, rtol=1e-7, atol=0)
    assert target.dtype == torch.float32  # also of half-precision latents
    assert torch.allclose(target.double(), made - latents.double(), rtol=1e-6, atol=1e-6)
    s = s.reshape(-1, 1, 1, 1)
    right = (1 - s) * latents.double() + s * made
    assert torch.allclose(noisy.double(), right.to(dtype).double(), rtol=2e-6, atol=1e-6)


PREDICTIONS = {
    "epsilon": dict(terminal_sigma=300.0),
    "v, zero SNR": dict(v_parameterization=True, zero_terminal_snr=True),
    "flow 1": FLOW,
    "flow 6": dict(**FLOW, flow_shift=6.0),
}
WEIGHTS = {
    "none": {},
    "min-SNR": dict(min_snr_gamma=5.0),
    "floor": dict(min_snr_gamma=5.0, min_snr_floor=True),
    "debiased": dict(debiased_estimation_loss=True),
    "two": dict(min_snr_gamma=5.0, debiased_estimation_loss=True),
}
HUBERS = ("exponential", "constant")  # beside snr, the default
KINDS = {
    **{name: form for name, (_, form) in LOSSES.items()},
    **{f"huber {name}": dict(loss="huber", huber_schedule=name) for name in HUBERS},
}
PERTURBED = {
    "none": {},
    "fixed": dict(ip_noise_gamma=0.1),
    "random": dict(ip_noise_gamma=0.1, ip_noise_gamma_random_strength=True),
}
DRAWN = {
    "the ends": {},
    "stratified": dict(stratified_timesteps=True),
    "terminal": dict(stratified_timesteps=True, terminal_timestep_share=0.3),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GRID = list(itertools.product(PREDICTIONS, KINDS, WEIGHTS, PERTURBED, DRAWN, DTYPES))


def finite(start, row):
    prediction, kind, weight, perturbed, drawn, dtype = row
    form = KINDS[kind]
    flags = dict(loss_type=form["loss"], huber_schedule=form.get("huber_schedule", "snr"))
    flags |= PREDICTIONS[prediction] | WEIGHTS[weight] | PERTURBED[perturbed] | DRAWN[drawn]
    run = start(**flags, huber_l2_gradient=form.get("gradient"))
    rows = torch.tensor([0, 1, 250, 500, 998, 999]) if drawn == "the ends" else None
    noisy, told, target, gradient, total = step(run.args, torch.randn(6, 4, 2, 2).to(DTYPES[dtype]), rows)
    assert all(bool(x.isfinite().all()) for x in (noisy, told, target, gradient, total)), row
    assert float(total) > 0, row


def test_every_pair_of_what_makes_a_step_is_finite(start):
    assert len(GRID) == 4 * 10 * 5 * 3 * 3 * 3
    for row in covering(GRID, strength=2):
        finite(start, row)


@pytest.mark.slow
def test_every_combination_is_finite(start):
    for row in GRID:
        finite(start, row)


REFUSED = [
    (dict(zero_terminal_snr=True), "--zero_terminal_snr does not go with flow_prediction"),
    (dict(terminal_sigma=300.0), "--terminal_sigma does not go with flow_prediction"),
    (dict(v_parameterization=True), "--v_parameterization is --prediction_type v_prediction"),
    (dict(v_pred_like_loss=0.1), "--v_pred_like_loss makes a loss of epsilon or v-prediction look"),
    (dict(scale_v_pred_loss_like_noise_pred=True), "--scale_v_pred_loss_like_noise_pred makes"),
    (dict(flow_shift=0.0), "--flow_shift: shift must be a positive number, got 0.0"),
    (dict(min_snr_gamma=5.0, fixes="all,-weighting"), "flow_prediction needs the fix 'weighting'"),
    (dict(loss_type="huber", fixes="all,-loss"), "flow_prediction needs the fix 'loss'"),
]


@pytest.mark.parametrize(("flags", "sentence"), REFUSED)
def test_what_makes_no_sense_with_flow_is_one_sentence(start, flags, sentence):
    with pytest.raises(FlagError, match=sentence) as error:
        start(**FLOW, **flags)
    assert "\n" not in str(error.value)


def test_a_shift_belongs_to_flow(start):
    with pytest.raises(FlagError, match=r"^--flow_shift 3 belongs to --prediction_type flow_prediction"):
        start(flow_shift=3.0, v_parameterization=True)


def test_v_prediction_by_its_diffusers_name_is_kohyas_flag(start):
    run = start(prediction_type="v_prediction", zero_terminal_snr=True)
    assert run.args.v_parameterization is True and run.prediction_type == "v_prediction"
    assert start(prediction_type="epsilon", terminal_sigma=300.0).prediction_type == "epsilon"


def test_timesteps_that_were_rounded_on_the_way_stop_the_training(start):
    start(**FLOW)
    with pytest.raises(FixError, match=r"came to it as torch\.float16, which rounds them"):
        validation.called(lambda *_: None, torch.nn.Identity(), torch.zeros(1), torch.zeros(1).half())


def test_the_saved_metadata_says_flow(start):
    start(**FLOW, flow_shift=3.0)
    spec = checkpoint.model_spec(lambda: {"modelspec.prediction_type": "epsilon"})
    assert read_record(spec) == Sampling(NoiseSchedule.flow(3), "flow_prediction")
    assert spec["modelspec.prediction_type"] == "sd3"


@pytest.mark.parametrize("cls", [DDIMScheduler, PNDMScheduler])
def test_previews_sample_flow_whatever_sampler_was_asked_for(start, cls):
    """Of Gaussian images N(2, 0.5^2) with a network that knows them: Euler's and DDIM's steps arrive."""
    start(**FLOW, flow_shift=3.0)
    sampler = previews.scheduler(lambda **_: cls(**SDXL), sample_sampler="x", v_parameterization=False)
    sampler.set_timesteps(100)
    torch.manual_seed(0)
    x = torch.randn(1, 4, 32, 32, dtype=torch.float64) * float(sampler.init_noise_sigma)
    for t in sampler.timesteps:
        s = float(t) / 1000
        gain = ((1 - s) * 0.25) / ((1 - s) ** 2 * 0.25 + s**2)  # of the best guess of x0
        x0 = 2 + gain * (x - (1 - s) * 2)
        velocity = (x - x0) / s  # noise - x0 of x = (1 - s) x0 + s noise
        x = sampler.step(velocity, t, x).prev_sample.double()
    assert float(x.mean()) == pytest.approx(2, abs=0.03) and float(x.std()) == pytest.approx(0.5, rel=0.1)


def test_a_saved_folder_names_a_class_that_samples_flow_in_both_of_its_files(start, tmp_path):
    """diffusers makes a pipeline's scheduler of the class in model_index.json, whatever the config says."""

    def upstream_saves(folder):
        EulerDiscreteScheduler(**SDXL).save_pretrained(tmp_path / "scheduler")
        index = {"_class_name": "StableDiffusionXLPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
        index["scheduler"] = ["diffusers", "EulerDiscreteScheduler"]
        (tmp_path / "model_index.json").write_text(json.dumps(index))

    start(**FLOW, flow_shift=3.0)
    checkpoint.save_folder(upstream_saves, str(tmp_path))
    index = json.loads((tmp_path / "model_index.json").read_text())
    cls = getattr(diffusers, index["scheduler"][1])
    loaded = cls.from_pretrained(tmp_path, subfolder="scheduler")
    loaded.set_timesteps(4)
    assert "use_flow_sigmas" in inspect.signature(cls.__init__).parameters  # else it is carried along unread
    assert loaded.config.prediction_type == "flow_prediction" and loaded.config.flow_shift == 3
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert loaded.config.use_flow_sigmas and float(loaded.timesteps[0]) > 990


def test_the_stable_loss_is_of_flow(start):
    """The squared error of a network that says 0, by the noise that Validation draws; told T s."""
    validation = start(**FLOW, flow_shift=3.0, stable_loss_steps=1).stable_loss.validation
    images, seen = torch.randn(2, 4, 8, 8), []

    def predict(noisy, timesteps, image):
        seen.append(timesteps)
        return torch.zeros_like(noisy)

    loss_unweighted = validation(predict, images)["loss_unweighted"]
    errors = [
        (validation.noise(number, t, images[0].shape).double() - images[number].double()).square().mean()
        for number in range(2)
        for t in validation.timesteps
    ]
    assert loss_unweighted == pytest.approx(float(torch.stack(errors).mean()), rel=1e-5)
    told = torch.cat(seen).unique().double()
    assert torch.allclose(told, 1000 * flow_levels(3.0)[validation.timesteps], rtol=1e-7, atol=0)


def test_the_range_of_timesteps_is_of_rows(start):
    run = start(**FLOW, stratified_timesteps=True, min_timestep=100, max_timestep=200)
    told = torch.cat([step(run.args, torch.randn(6, 4, 2, 2))[1] for _ in range(20)])
    assert 101 <= float(told.min()) < 105 and 195 < float(told.max()) <= 200
