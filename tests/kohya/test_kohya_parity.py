"""The core and the kohya adapter against recorded outputs of sd-scripts' own functions (real/record.py),
where kohya is right."""

import argparse
import json
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DDPMScheduler
from torch._subclasses.fake_tensor import FakeTensorMode

from sdxl_fixes import Debiased, InputPerturbation, MinSNR, NoiseSchedule, Objective, ScheduledHuber
from sdxl_fixes.errors import FixError, FlagError
from sdxl_fixes.flags import TrainingFlags
from sdxl_fixes.kohya import loss as kohya_loss
from sdxl_fixes.kohya import noise as kohya_noise
from sdxl_fixes.kohya import previews as kohya_previews
from sdxl_fixes.kohya import schedule as kohya_schedule
from sdxl_fixes.kohya import timesteps as kohya_timesteps
from sdxl_fixes.kohya.run import FIXES, SESSION, start
from sdxl_fixes.schedulers import CLASSES
from sdxl_fixes.trainers.fixes import allowed
from sdxl_fixes.trainers.patching import PatchSet
from sdxl_fixes.weighting import EpsilonLike, PlusVLike

RECORD = json.loads((Path(__file__).parents[1] / "data" / "kohya_v0.10.1.json").read_text())
T = torch.tensor(RECORD["timesteps"])
SDXL = NoiseSchedule.sdxl()


@pytest.fixture
def run():
    """run(**flags) starts a patched run without a trainer, every fix allowed; a step of ``timesteps``."""

    def begin(fixes="all", timesteps=T, **flags):
        SESSION.begin(start(argparse.Namespace(fixes=fixes, **flags)))
        SESSION.step.timesteps = timesteps
        return SESSION.run

    yield begin
    SESSION.reset()


def never(*args, **kwargs):
    raise AssertionError("upstream's function was called")


def scheduler():
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        clip_sample=False,
    )


def squared(prediction, target, loss_type, reduction, huber_c=None):
    """Upstream's l2."""
    assert (loss_type, reduction) == ("l2", "none")
    return (prediction - target) ** 2


def samples(values):
    """One element a sample: shape [B, 1, 1, 1]."""
    return values.reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("case", RECORD["thresholds"])
@pytest.mark.parametrize("kind", ["huber", "smooth_l1"])
def test_huber_threshold_is_kohyas_and_the_loss_has_it(kind, case, run):
    schedule, c, scale = case.split()[0], *map(float, case.split()[1:])
    run(loss_type=kind, huber_schedule=schedule, huber_c=c, huber_scale=scale)
    theirs = torch.tensor(RECORD["thresholds"][case]) * (
        scale if schedule == "snr" else 1
    )  # kohya forgets the scale there
    handed_on = kohya_loss.threshold(never, argparse.Namespace(), T, None)
    torch.testing.assert_close(handed_on, theirs, rtol=2e-5, atol=0)
    r = theirs.double()  # of a residual as large as kohya's delta the loss tells ours
    loss = kohya_loss.conditional_loss(never, samples(theirs), torch.zeros(len(T), 1, 1, 1), kind, "none")
    loss = loss.flatten().double()
    ours = (loss / (2 * torch.sqrt(r**2 - loss)) if kind == "huber" else (r**2 - loss**2 / 4) / loss).float()
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=0)


@pytest.mark.parametrize("case", RECORD["losses"])
def test_huber_values_are_kohyas(case, run):
    kind, delta = case.split()
    run(loss_type=kind, huber_schedule="constant", huber_c=float(delta), timesteps=torch.tensor([500]))
    residual = torch.tensor(RECORD["residuals"]).reshape(1, -1, 1, 1)
    arguments = (never, residual, torch.zeros_like(residual), kind)
    ours = kohya_loss.conditional_loss(*arguments, "none", None)
    theirs = torch.tensor(RECORD["losses"][case])
    torch.testing.assert_close(ours.flatten(), theirs, rtol=1e-5, atol=2e-7)  # atol: theirs cancels near 0
    for reduction, reduced in (("mean", theirs.mean()), ("sum", theirs.sum())):
        torch.testing.assert_close(kohya_loss.conditional_loss(*arguments, reduction, None), reduced)


WEIGHTS = {  # the weighting, kohya's flag for it, kohya's function
    "min_snr 5 epsilon": (MinSNR(5), {"min_snr_gamma": 5.0}, "apply_snr_weight"),
    "min_snr 5 v_prediction": (MinSNR(5), {"min_snr_gamma": 5.0}, "apply_snr_weight"),
    "debiased epsilon": (Debiased(), {"debiased_estimation_loss": True}, "apply_debiased_estimation"),
    "debiased v_prediction": (Debiased(), {"debiased_estimation_loss": True}, "apply_debiased_estimation"),
    "epsilon_like v_prediction": (
        EpsilonLike(),
        {"scale_v_pred_loss_like_noise_pred": True},
        "scale_v_prediction_loss_like_noise_prediction",
    ),
    "plus_v_like 0.1 epsilon": (PlusVLike(0.1), {"v_pred_like_loss": 0.1}, "add_v_prediction_like_loss"),
}


def weights_of(upstream, count, *arguments):
    """What multiplies each sample's loss, in kohya's order: loss of a residual of 1, mean, weight."""

    def function(*args, **kwargs):
        never()

    function.__name__ = upstream
    ones = torch.ones(count, 4, 2, 2)
    loss = kohya_loss.conditional_loss(squared, ones, torch.zeros_like(ones), "l2", "none")
    return kohya_loss.weighted(function, loss.mean([1, 2, 3]), SESSION.step.timesteps, None, *arguments)


@pytest.mark.parametrize("case", RECORD["weights"])
def test_weights_of_the_stock_schedule_are_kohyas(case, run):
    weighting, flags, upstream = WEIGHTS[case]
    theirs = torch.tensor(RECORD["weights"][case])
    prediction_type = case.split()[-1]
    table = torch.tensor(weighting.table(SDXL, prediction_type))[T].float()
    torch.testing.assert_close(table, theirs, rtol=1e-4, atol=0)
    run(v_parameterization=prediction_type == "v_prediction", **flags)
    torch.testing.assert_close(weights_of(upstream, len(T)), theirs, rtol=1e-4, atol=0)
    SESSION.check()  # upstream's function was reached, and nothing else is due


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_are_finite_at_snr_0_where_upstreams_are_not(case, run, capsys):
    _, flags, upstream = WEIGHTS[case]
    v = case.endswith("v_prediction")
    run(v_parameterization=v, zero_terminal_snr=True, timesteps=torch.tensor([999]), **flags)
    assert ("WARNING: epsilon prediction with zero terminal SNR" in capsys.readouterr().err) == (not v)
    assert torch.isfinite(weights_of(upstream, 1)).all()


def test_kohya_multiplies_its_weightings_and_so_do_we_once_each(run):
    run(v_parameterization=True, min_snr_gamma=5.0, scale_v_pred_loss_like_noise_pred=True)
    cases = ("min_snr 5 v_prediction", "epsilon_like v_prediction")
    theirs = [torch.tensor(RECORD["weights"][case]) for case in cases]
    loss = weights_of("apply_snr_weight", len(T))
    with pytest.raises(FixError, match=r"not reached .*\(scale_v_prediction_loss_like_noise_prediction"):
        SESSION.check()

    def scale_v_prediction_loss_like_noise_prediction(*args):
        never()

    loss = kohya_loss.weighted(scale_v_prediction_loss_like_noise_prediction, loss, T, None)
    torch.testing.assert_close(loss, theirs[0] * theirs[1], rtol=1e-4, atol=0)
    SESSION.check()


def test_zero_terminal_snr_is_kohyas_rescale():
    ours = torch.tensor(SDXL.zero_terminal_snr().alphas_cumprod)[T].float()
    torch.testing.assert_close(ours, torch.tensor(RECORD["ztsnr_alphas_cumprod"]), rtol=1e-4, atol=1e-9)


def test_noise_timesteps_and_perturbation_are_kohyas_for_the_same_seed():
    recorded = {
        name: torch.tensor(value) for name, value in RECORD["noising, seed 3, ip_noise_gamma 0.1"].items()
    }
    torch.manual_seed(3)
    latents = torch.randn(3, 4, 2, 2)
    step = Objective(SDXL, "v_prediction", perturbation=InputPerturbation(0.1)).draw(latents)
    assert torch.equal(step.index, recorded["timesteps"])
    # a processor without AVX2 draws normal numbers that differ in the last bits
    torch.testing.assert_close(step.noise, recorded["noise"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(step.noisy, recorded["noisy"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(step.target, recorded["velocity"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("last", ["prepare", "rescale"])
def test_schedule_and_snr_table_agree_whichever_of_kohyas_two_calls_comes_last(last, run):
    run(terminal_sigma=300.0, v_parameterization=True)
    made = scheduler()
    calls = [
        lambda: kohya_schedule.prepare(lambda *a: None, made, "cpu"),
        lambda: kohya_schedule.rescale(never, made),
    ]
    for call in calls if last == "rescale" else reversed(calls):
        call()
    expected = SDXL.with_terminal_sigma(300)
    torch.testing.assert_close(
        made.alphas_cumprod.double(), torch.tensor(expected.alphas_cumprod), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(
        made.all_snr, made.alphas_cumprod / (1 - made.alphas_cumprod), rtol=1e-4, atol=0
    )
    torch.testing.assert_close(
        torch.cumprod(1 - made.betas.double(), 0), made.alphas_cumprod.double(), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_noising_is_float32_arithmetic_in_half_precision(dtype, run):
    run(terminal_sigma=20000.0, terminal_sigma_method="rescale", v_parameterization=True)
    made = scheduler()
    kohya_schedule.prepare(lambda *a: None, made, "cpu")
    zeros, ones = torch.zeros(2, 4, 2, 2, dtype=dtype), torch.ones(2, 4, 2, 2, dtype=dtype)
    t = torch.tensor([0, 999])
    noise_level = made.add_noise(zeros, ones, t)[:, 0, 0, 0]
    assert noise_level.dtype == dtype and noise_level[0].item() == pytest.approx(
        0.02915, rel=5e-3
    )  # bf16 upstream: 0
    velocity = made.get_velocity(zeros, ones, t)[:, 0, 0, 0]
    assert velocity[1].item() == pytest.approx(1 / 20000, rel=1e-4)  # alpha: fp16 upstream: 0


def test_random_perturbation_strength_is_drawn_per_sample_in_kohyas_order(run):
    run(ip_noise_gamma=0.5, ip_noise_gamma_random_strength=True)
    seen = {}

    def upstream(
        args, noise_scheduler, latents
    ):  # stands where upstream's does: it perturbs only if args still ask for it
        assert args.ip_noise_gamma is None
        noise = torch.zeros_like(latents)
        seen["noisy"] = noise_scheduler.add_noise(latents, noise, torch.full((len(latents),), 999))
        noise_scheduler.alphas_cumprod = noise_scheduler.alphas_cumprod.cpu()
        return noise, seen["noisy"], None

    made = scheduler()
    kohya_noise.noised(upstream, argparse.Namespace(ip_noise_gamma=0.5), made, torch.zeros(4, 4, 64, 64))
    strengths = seen["noisy"].flatten(1).std(1) / float(torch.sqrt(1 - made.alphas_cumprod[999]))
    assert (
        strengths.max() - strengths.min() > 0.05
        and strengths.max() < 0.52
        and len(set(strengths.tolist())) == 4
    )


def test_off_fixes_call_upstream(run):
    run(fixes="none", zero_terminal_snr=True, v_parameterization=True, loss_type="huber", min_snr_gamma=5.0)
    upstream = lambda *args, **kwargs: "upstream"  # noqa: E731
    assert kohya_loss.threshold(upstream, None, T, None) == "upstream"
    assert kohya_loss.conditional_loss(upstream, T, T, "huber", "mean", T) == "upstream"
    assert kohya_loss.masked(upstream, T, None) == "upstream"
    assert kohya_loss.weighted(upstream, T, T, None, 5) == "upstream"
    assert kohya_noise.noised(upstream, None, None, T) == "upstream"
    assert kohya_timesteps.draw(upstream, 0, 1000, 4, "cpu") == "upstream"
    made = scheduler()
    kohya_schedule.prepare(upstream, made, "cpu")
    assert not hasattr(made, "all_snr")


def test_a_fix_that_is_on_and_not_reached_stops_in_the_step(run):
    run(loss_type="huber", min_snr_gamma=5.0, timesteps=torch.tensor([3]))
    with pytest.raises(FixError, match=r"^loss, weighting asked for but not reached in this training step"):
        SESSION.check()
    x = torch.zeros(1, 4, 2, 2)
    loss = kohya_loss.conditional_loss(never, x, x, "huber", "none")
    said = r"^weighting asked for but not reached in this .*\(apply_snr_weight\).*--fixes all,-weighting "
    with pytest.raises(FixError, match=said):
        SESSION.check()

    def apply_snr_weight():
        never()

    kohya_loss.weighted(apply_snr_weight, loss, SESSION.step.timesteps, None)
    SESSION.check()


def test_a_fix_that_was_reached_in_one_step_must_be_in_the_next(run):
    run(loss_type="huber", timesteps=torch.tensor([3]))
    x = torch.zeros(1, 4, 2, 2)
    kohya_loss.conditional_loss(never, x, x, "huber", "mean")
    assert SESSION.backward(lambda accelerator, loss: "upstream", None, x) == "upstream"
    with pytest.raises(FixError, match=r"^loss asked for but not reached in this training step"):
        SESSION.backward(never, None, x)


def test_a_refused_fix_that_a_flag_asks_for_is_an_error(run):
    SESSION.patches = PatchSet((), refused={"loss": "expected (a), found (b)"})
    with pytest.raises(FlagError, match=r"'loss'.*does not fit.*--fixes all,-loss"):
        start(argparse.Namespace(loss_type="huber"))
    assert start(argparse.Namespace()).on == frozenset()


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
    assert allowed(text, FIXES) == expected


def test_min_snr_floor_reaches_the_weight(run):
    terminal = torch.tensor([999])
    flags = dict(zero_terminal_snr=True, v_parameterization=True, min_snr_gamma=5.0, min_snr_floor=True)
    run(timesteps=terminal, **flags)
    assert weights_of("apply_snr_weight", 1, 5.0, True).item() == 1
    assert ScheduledHuber().delta(TrainingFlags(zero_terminal_snr=True).schedule())[999] == pytest.approx(0.1)


@pytest.mark.parametrize("later", [None, [1.0, 0.25, 1.0, 0.25]], ids=["", "regularisation"])
def test_l2_gradient_of_a_batch_is_that_of_the_weighted_loss(run, later):
    """As both trainers do it: threshold, elementwise loss, mean per sample, weight, mean; the network
    trainer's loss weights before the weight."""
    t = torch.tensor([10, 300, 600, 900])
    r = torch.randn(4, 4, 8, 8) * samples(torch.tensor([0.1, 1.0, 3.0, 10.0]))
    norms = []

    def process_batch(trainer, batch, kind, prediction):
        delta = kohya_loss.threshold(lambda *a: None, None, t, None)
        loss = kohya_loss.conditional_loss(squared, prediction, torch.zeros_like(r), kind, "none", delta)
        loss = loss.mean([1, 2, 3]) * (1.0 if later is None else batch["loss_weights"])
        return kohya_loss.weighted(squared, loss, t, None, 5.0, True).mean()

    for kind in ("l2", "huber"):
        flags = {"huber_l2_gradient": "batch"} if kind == "huber" else {}
        run(loss_type=kind, min_snr_gamma=5.0, v_parameterization=True, timesteps=t, **flags)
        prediction = r.clone().requires_grad_()
        batch = {} if later is None else {"loss_weights": torch.tensor(later)}
        kohya_loss.batch(process_batch, None, batch, kind, prediction).backward()
        norms.append(prediction.grad.norm().item())
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


def test_v_prediction_huber_snr_stays_on_the_accelerator(run):
    """The step of both trainers under fake tensors, "lazy" standing for a GPU: upstream mixes devices here
    (sd-scripts issue 2102)."""
    flags = dict(zero_terminal_snr=True, v_parameterization=True, stratified_timesteps=True)
    run(loss_type="huber", min_snr_gamma=5.0, **flags)
    made = scheduler()
    kohya_schedule.prepare(lambda *a: None, made, "cpu")
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, t = torch.empty(2, 4, 8, 8, device="lazy"), torch.zeros(2, dtype=torch.long, device="lazy")
        noisy = made.add_noise(x, x, t)
        kohya_noise.noised(lambda *a: (x, noisy, t), None, made, x)
        target = made.get_velocity(x, x, t)
        delta = kohya_loss.threshold(never, None, t, made)
        loss = kohya_loss.conditional_loss(never, noisy, target, "huber", "none", delta).mean([1, 2, 3])
        loss = kohya_loss.weighted(never, loss, t, made, 5.0, True)
    assert (
        loss.device.type == delta.device.type == "lazy"
        and loss.shape == (2,)
        and made.alphas_cumprod.device.type == "cpu"
    )


PREVIEWS = {
    **{
        name: {}
        for name in (
            "DDIM",
            "DDPM",
            "PNDM",
            "LMSDiscrete",
            "EulerDiscrete",
            "EulerAncestralDiscrete",
            "HeunDiscrete",
        )
    },
    **{
        name: {}
        for name in ("KDPM2Discrete", "KDPM2AncestralDiscrete", "DPMSolverSinglestep", "DPMSolverMultistep")
    },
}


@pytest.mark.parametrize("name", PREVIEWS)
@pytest.mark.parametrize(
    "flags", [{"zero_terminal_snr": True}, {"terminal_sigma": 300.0}], ids=["ztsnr", "300"]
)
def test_every_preview_sampler_follows_the_trained_schedule_and_stays_finite(name, flags, run):
    run(v_parameterization=True, **flags)
    kwargs = {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
    }

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
        assert made.noise_schedule == SESSION.run.schedule and int(made.timesteps[0]) == 999
    else:
        last = float(made.alphas_cumprod[-1])
        assert (1 / last - 1) ** 0.5 == pytest.approx(flags.get("terminal_sigma", 4096), rel=2e-3)
    x = torch.randn(1, 4, 8, 8) * made.init_noise_sigma
    for t in made.timesteps:
        x = made.step(
            torch.zeros_like(x), t, x
        ).prev_sample  # any finite prediction must give a finite sample
    assert torch.isfinite(x).all()


def test_timesteps_that_our_sampler_did_not_draw_have_no_importance_weight(run):
    """The network trainer's validation fixes the timestep (min = max), which upstream draws."""
    from sdxl_fixes.kohya import timesteps as kohya_timesteps

    made = run(zero_terminal_snr=True, v_parameterization=True, terminal_timestep_share=0.3)
    prediction, target = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8)

    def loss(low, high):
        def upstream(args, noise_scheduler, latents):
            return (
                None,
                None,
                kohya_timesteps.draw(
                    lambda low, high, count, device: torch.full((count,), high), low, high, 4, "cpu"
                ),
            )

        kohya_noise.noised(upstream, argparse.Namespace(), None, target)
        l2 = lambda p, q, kind, reduction, c: (p - q) ** 2  # noqa: E731
        return kohya_loss.conditional_loss(l2, prediction, target, "l2", "mean")

    plain = torch.nn.functional.mse_loss(prediction, target)
    torch.testing.assert_close(loss(999, 999), plain)
    weights = made.timesteps.weights(SESSION.step.timesteps)
    assert not torch.allclose(weights, torch.ones(4)) and not torch.allclose(loss(0, 1000), plain)


@pytest.mark.parametrize("other", [dict(scale_v_pred_loss_like_noise_pred=True), dict(v_pred_like_loss=0.5)])
def test_flows_weight_is_not_multiplied_by_kohyas(run, other):
    with pytest.raises(FlagError, match="--flow_weighting makes the loss rectified flow's, which no other"):
        run(v_parameterization=True, zero_terminal_snr=True, flow_weighting=True, **other)
    run(v_parameterization=True, zero_terminal_snr=True, **other)


def test_a_shift_by_resolution_follows_the_bucket_of_each_batch(run):
    """Stratified draws of the same numbers for batches of several sizes: each sees its own noise."""
    flags = dict(v_parameterization=True, zero_terminal_snr=True, stratified_timesteps=True, seed=3)
    sizes = [(128, 128), (64, 64), (152, 104), (192, 192)]
    drawn = []
    for shift in ({}, dict(resolution_shift=1024)):
        made = run(**flags, **shift)
        for size in sizes:
            latents = torch.empty(6, 4, *size, device="meta")

            def upstream(args, noise_scheduler, latents):
                return None, None, kohya_timesteps.draw(never, 0, 1000, len(latents), "cpu")

            drawn.append(kohya_noise.noised(upstream, argparse.Namespace(), None, latents)[2])
    sigmas = torch.from_numpy(made.schedule.sigmas.copy())
    s = sigmas / (1 + sigmas)
    s[-1] = 1
    for (height, width), plain, seen in zip(sizes, drawn[:4], drawn[4:], strict=True):
        ratio = (height * width) ** 0.5 / 128
        wanted = ratio * s[plain] / (1 + (ratio - 1) * s[plain])
        assert torch.equal(seen, (s - wanted[:, None]).abs().argmin(1))
    assert torch.equal(drawn[0], drawn[4]) and not torch.equal(drawn[1], drawn[5])
