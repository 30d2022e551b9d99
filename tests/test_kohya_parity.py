"""The core and the kohya adapter against recorded outputs of sd-scripts' own functions (tests/kohya/record.py), where kohya is right."""

import argparse
import json
from contextlib import nullcontext
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DDPMScheduler
from torch._subclasses.fake_tensor import FakeTensorMode

from sdxl_fixes import Debiased, InputPerturbation, MinSNR, NoiseSchedule, Objective, ScheduledHuber
from sdxl_fixes.flags import FlagError, Settings
from sdxl_fixes.kohya import loss as kohya_loss
from sdxl_fixes.kohya import noise as kohya_noise
from sdxl_fixes.kohya import previews as kohya_previews
from sdxl_fixes.kohya import schedule as kohya_schedule
from sdxl_fixes.kohya import weighting as kohya_weighting
from sdxl_fixes.kohya.run import FIXES, SESSION, start
from sdxl_fixes.schedulers import CLASSES
from sdxl_fixes.trainers.patching import PatchSet
from sdxl_fixes.trainers.run import parse_fixes
from sdxl_fixes.weighting import EpsilonLike, PlusVLike

RECORD = json.loads((Path(__file__).parent / "data" / "kohya_v0.10.1.json").read_text())
T = torch.tensor(RECORD["timesteps"])
SDXL = NoiseSchedule.sdxl()


@pytest.fixture
def run():
    """run(**flags) starts a patched run without a trainer, every fix allowed."""

    def begin(fixes="all", **flags):
        SESSION.run = start(argparse.Namespace(fixes=fixes, **flags), PatchSet(()))
        return SESSION.run

    yield begin
    SESSION.run = None
    SESSION.patches = PatchSet(())


def never(*args, **kwargs):
    raise AssertionError("upstream's function was called")


def scheduler():
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000, clip_sample=False)


@pytest.mark.parametrize("case", RECORD["thresholds"])
def test_huber_threshold_is_kohyas(case, run):
    schedule, c, scale = case.split()[0], *map(float, case.split()[1:])
    run(loss_type="huber", huber_schedule=schedule, huber_c=c, huber_scale=scale)
    ours = kohya_loss.threshold(never, argparse.Namespace(), T, None)
    theirs = torch.tensor(RECORD["thresholds"][case]) * (scale if schedule == "snr" else 1)  # kohya forgets the scale there
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=0)


@pytest.mark.parametrize("case", RECORD["losses"])
def test_huber_values_are_kohyas(case, run):
    kind, delta = case.split()
    run(loss_type=kind)
    residual = torch.tensor(RECORD["residuals"]).reshape(1, -1, 1, 1)
    arguments = (never, residual, torch.zeros_like(residual), kind)
    ours = kohya_loss.conditional_loss(*arguments, "none", torch.tensor([float(delta)]))
    theirs = torch.tensor(RECORD["losses"][case])
    torch.testing.assert_close(ours.flatten(), theirs, rtol=1e-5, atol=2e-7)  # atol: theirs cancels near 0
    for reduction, reduced in (("mean", theirs.mean()), ("sum", theirs.sum())):
        torch.testing.assert_close(kohya_loss.conditional_loss(*arguments, reduction, torch.tensor([float(delta)])), reduced)


WEIGHTS = {
    "min_snr 5 epsilon": (MinSNR(5), kohya_weighting.min_snr, (5.0, False)),
    "min_snr 5 v_prediction": (MinSNR(5), kohya_weighting.min_snr, (5.0, True)),
    "debiased epsilon": (Debiased(), kohya_weighting.debiased, (False,)),
    "debiased v_prediction": (Debiased(), kohya_weighting.debiased, (True,)),
    "epsilon_like v_prediction": (EpsilonLike(), kohya_weighting.epsilon_like, ()),
    "plus_v_like 0.1 epsilon": (PlusVLike(0.1), kohya_weighting.plus_v_like, (0.1,)),
}


@pytest.mark.parametrize("case", RECORD["weights"])
def test_weights_of_the_stock_schedule_are_kohyas(case, run):
    weighting, adapter, arguments = WEIGHTS[case]
    theirs = torch.tensor(RECORD["weights"][case])
    prediction_type = case.split()[-1]
    table = torch.tensor(weighting.table(SDXL, prediction_type))[T].float()
    torch.testing.assert_close(table, theirs, rtol=1e-4, atol=0)
    run(v_parameterization=prediction_type == "v_prediction", min_snr_gamma=5.0)
    torch.testing.assert_close(adapter(never, torch.ones(len(T)), T, None, *arguments), theirs, rtol=1e-4, atol=0)


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_are_finite_at_snr_0_where_upstreams_are_not(case, run):
    _, adapter, arguments = WEIGHTS[case]
    prediction_type = case.split()[-1]
    with pytest.warns(UserWarning) if prediction_type == "epsilon" else nullcontext():
        run(v_parameterization=prediction_type == "v_prediction", min_snr_gamma=5.0, zero_terminal_snr=True)
    assert torch.isfinite(adapter(never, torch.ones(1), torch.tensor([999]), None, *arguments)).all()


def test_zero_terminal_snr_is_kohyas_rescale():
    ours = torch.tensor(SDXL.zero_terminal_snr().alphas_cumprod)[T].float()
    torch.testing.assert_close(ours, torch.tensor(RECORD["ztsnr_alphas_cumprod"]), rtol=1e-4, atol=1e-9)


def test_noise_timesteps_and_perturbation_are_kohyas_for_the_same_seed():
    recorded = {name: torch.tensor(value) for name, value in RECORD["noising, seed 3, ip_noise_gamma 0.1"].items()}
    torch.manual_seed(3)
    latents = torch.randn(3, 4, 2, 2)
    step = Objective(SDXL, "v_prediction", perturbation=InputPerturbation(0.1)).draw(latents)
    assert torch.equal(step.noise, recorded["noise"]) and torch.equal(step.index, recorded["timesteps"])
    torch.testing.assert_close(step.noisy, recorded["noisy"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(step.target, recorded["velocity"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("last", ["prepare", "rescale"])
def test_schedule_and_snr_table_agree_whichever_of_kohyas_two_calls_comes_last(last, run):
    run(terminal_sigma=300.0, v_parameterization=True)
    made = scheduler()
    calls = [lambda: kohya_schedule.prepare(lambda *a: None, made, "cpu"), lambda: kohya_schedule.rescale(never, made)]
    for call in calls if last == "rescale" else reversed(calls):
        call()
    expected = SDXL.with_terminal_sigma(300)
    torch.testing.assert_close(made.alphas_cumprod.double(), torch.tensor(expected.alphas_cumprod), rtol=1e-6, atol=0)
    torch.testing.assert_close(made.all_snr, made.alphas_cumprod / (1 - made.alphas_cumprod), rtol=1e-4, atol=0)
    torch.testing.assert_close(torch.cumprod(1 - made.betas.double(), 0), made.alphas_cumprod.double(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_noising_is_float32_arithmetic_in_half_precision(dtype, run):
    run(terminal_sigma=20000.0, terminal_sigma_method="rescale", v_parameterization=True)
    made = scheduler()
    kohya_schedule.prepare(lambda *a: None, made, "cpu")
    zeros, ones = torch.zeros(2, 4, 2, 2, dtype=dtype), torch.ones(2, 4, 2, 2, dtype=dtype)
    t = torch.tensor([0, 999])
    noise_level = made.add_noise(zeros, ones, t)[:, 0, 0, 0]
    assert noise_level.dtype == dtype and noise_level[0].item() == pytest.approx(0.02915, rel=5e-3)  # bf16 upstream: 0
    velocity = made.get_velocity(zeros, ones, t)[:, 0, 0, 0]
    assert velocity[1].item() == pytest.approx(1 / 20000, rel=1e-4)  # alpha: fp16 upstream: 0


def test_random_perturbation_strength_is_drawn_per_sample_in_kohyas_order(run):
    run(ip_noise_gamma=0.5, ip_noise_gamma_random_strength=True)
    seen = {}

    def upstream(args, noise_scheduler, latents):  # stands where upstream's does: it perturbs only if args still ask for it
        assert args.ip_noise_gamma is None
        noise = torch.zeros_like(latents)
        seen["noisy"] = noise_scheduler.add_noise(latents, noise, torch.full((len(latents),), 999))
        noise_scheduler.alphas_cumprod = noise_scheduler.alphas_cumprod.cpu()
        return noise, seen["noisy"], None

    made = scheduler()
    kohya_noise.noise_and_timesteps(upstream, argparse.Namespace(ip_noise_gamma=0.5), made, torch.zeros(4, 4, 64, 64))
    strengths = seen["noisy"].flatten(1).std(1) / float(torch.sqrt(1 - made.alphas_cumprod[999]))
    assert strengths.max() - strengths.min() > 0.05 and strengths.max() < 0.52 and len(set(strengths.tolist())) == 4


def test_off_fixes_call_upstream(run):
    run(fixes="none", zero_terminal_snr=True, v_parameterization=True, loss_type="huber", min_snr_gamma=5.0)
    upstream = lambda *args, **kwargs: "upstream"  # noqa: E731
    assert kohya_loss.threshold(upstream, None, T, None) == "upstream"
    assert kohya_loss.conditional_loss(upstream, T, T, "huber", "mean", T) == "upstream"
    assert kohya_weighting.min_snr(upstream, T, T, None, 5) == "upstream"
    assert kohya_noise.noise_and_timesteps(upstream, None, None, T) == "upstream"
    made = scheduler()
    kohya_schedule.prepare(upstream, made, "cpu")
    assert not hasattr(made, "all_snr")


def test_a_fix_that_is_on_and_never_reached_stops_after_the_first_step(run):
    run(loss_type="huber", min_snr_gamma=5.0)
    kohya_loss.threshold(never, None, T, None)
    with pytest.raises(RuntimeError, match="weighting asked for but never reached"):
        SESSION.check_reached()


def test_a_refused_fix_that_a_flag_asks_for_is_an_error():
    with pytest.raises(FlagError, match=r"'loss'.*does not fit.*--fixes all,-loss"):
        start(argparse.Namespace(loss_type="huber"), PatchSet((), refused={"loss": "expected (a), found (b)"}))
    assert start(argparse.Namespace(), PatchSet((), refused={"loss": "expected (a), found (b)"})).on == frozenset()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("all", set(FIXES)),
        ("none", set()),
        ("all,-loss,-noise", set(FIXES) - {"loss", "noise"}),
        ("loss", {"loss"}),
    ],
)
def test_fixes_are_chosen_by_name(text, expected):
    assert parse_fixes(text, FIXES) == expected


def test_min_snr_floor_reaches_the_weight(run):
    run(zero_terminal_snr=True, v_parameterization=True, min_snr_gamma=5.0, min_snr_floor=True)
    terminal = torch.tensor([999])
    assert kohya_weighting.min_snr(never, torch.ones(1), terminal, None, 5.0, True).item() == 1
    assert ScheduledHuber().delta(Settings(zero_terminal_snr=True).schedule())[999] == pytest.approx(0.1)


def test_l2_gradient_of_a_batch_is_that_of_the_weighted_loss(run):
    """As both trainers do it: threshold, elementwise loss, mean per sample, weight, mean."""
    t, r = torch.tensor([10, 300, 600, 900]), torch.randn(4, 4, 8, 8) * torch.tensor([0.1, 1.0, 3.0, 10.0]).reshape(-1, 1, 1, 1)
    norms = []
    for kind in ("l2", "huber"):
        flags = {"huber_l2_gradient": "batch"} if kind == "huber" else {}
        run(loss_type=kind, min_snr_gamma=5.0, v_parameterization=True, **flags)
        prediction = r.clone().requires_grad_()
        delta = kohya_loss.threshold(lambda *a: None, None, t, None)
        upstream = lambda p, q, kind, reduction, c: (p - q) ** 2  # noqa: E731
        loss = kohya_loss.conditional_loss(upstream, prediction, torch.zeros_like(r), kind, "none", delta).mean([1, 2, 3])
        kohya_weighting.min_snr(never, loss, t, None, 5.0, True).mean().backward()
        norms.append(prediction.grad.norm().item())
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


def test_v_prediction_huber_snr_stays_on_the_accelerator(run):
    """The step of both trainers under fake tensors, "lazy" standing for a GPU: upstream mixes devices here (sd-scripts issue 2102)."""
    run(zero_terminal_snr=True, v_parameterization=True, loss_type="huber", min_snr_gamma=5.0)
    made = scheduler()
    kohya_schedule.prepare(lambda *a: None, made, "cpu")
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, t = torch.empty(2, 4, 8, 8, device="lazy"), torch.zeros(2, dtype=torch.long, device="lazy")
        noisy, target = made.add_noise(x, x, t), made.get_velocity(x, x, t)
        delta = kohya_loss.threshold(never, None, t, made)
        loss = kohya_loss.conditional_loss(never, noisy, target, "huber", "none", delta).mean([1, 2, 3])
        loss = kohya_weighting.min_snr(never, loss, t, made, 5.0, True)
    assert loss.device.type == delta.device.type == "lazy" and made.alphas_cumprod.device.type == "cpu"


PREVIEWS = {
    **{name: {} for name in ("DDIM", "DDPM", "PNDM", "LMSDiscrete", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete")},
    **{name: {} for name in ("KDPM2Discrete", "KDPM2AncestralDiscrete", "DPMSolverSinglestep", "DPMSolverMultistep")},
}


@pytest.mark.parametrize("name", PREVIEWS)
@pytest.mark.parametrize("flags", [{"zero_terminal_snr": True}, {"terminal_sigma": 300.0}], ids=["ztsnr", "300"])
def test_every_preview_sampler_follows_the_trained_schedule_and_stays_finite(name, flags, run):
    run(v_parameterization=True, **flags)
    kwargs = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

    def upstream(**_):
        made = getattr(diffusers, name + "Scheduler")(**kwargs, prediction_type="v_prediction")
        if hasattr(made.config, "clip_sample"):
            made.config.clip_sample = True
        return made

    made = kohya_previews.scheduler(upstream, sample_sampler="x", v_parameterization=True)
    assert made.config.prediction_type == "v_prediction" and not made.config.get("clip_sample", False)
    made.set_timesteps(8)
    assert type(made).__name__ == name + "Scheduler"
    if name + "Scheduler" in CLASSES:
        assert made.exact and made.noise_schedule == SESSION.run.schedule and int(made.timesteps[0]) == 999
    else:
        last = float(made.alphas_cumprod[-1])
        assert (1 / last - 1) ** 0.5 == pytest.approx(flags.get("terminal_sigma", 4096), rel=2e-3)
    x = torch.randn(1, 4, 8, 8) * made.init_noise_sigma
    for t in made.timesteps:
        x = made.step(torch.zeros_like(x), t, x).prev_sample  # any finite prediction must give a finite sample
    assert torch.isfinite(x).all()
