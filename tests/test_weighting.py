"""SNR weights against hand-written formulas, their limits, and one x0 weight seen through every
prediction."""

import math

import diffusers
import numpy as np
import pytest
import torch

from sdxl_fixes import Debiased, MinSNR, NoiseSchedule, Objective, SoftMinSNR
from sdxl_fixes import prediction as predictions
from sdxl_fixes.weighting import EpsilonLike, FlowMatching, PlusVLike, Product

TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")
SDXL, ZTSNR = NoiseSchedule.sdxl(), NoiseSchedule.sdxl().zero_terminal_snr()
SNRS = [1e-9, 1e-3, 0.3, 1.0, 4.99, 5.0, 7.0, 40.0, 999.0, 1177.0, 1e6]
WEIGHTINGS = [
    MinSNR(5),
    MinSNR(1),
    MinSNR(20, floor=True),
    MinSNR(0.5, floor=True),
    SoftMinSNR(5),
    Debiased(),
    Debiased(cap=3.0, snr_limit=100.0),
    EpsilonLike(),
    PlusVLike(0.5),
]

FORMULAS = [
    (MinSNR(5), "epsilon", lambda s: min(s, 5) / s),
    (MinSNR(5), "v_prediction", lambda s: min(s, 5) / (s + 1)),
    (MinSNR(5), "sample", lambda s: min(s, 5)),
    (MinSNR(5), "flow_prediction", lambda s: min(s, 5) / (1 + math.sqrt(s)) ** 2),
    (MinSNR(1), "v_prediction", lambda s: min(s, 1) / (s + 1)),
    (MinSNR(5, floor=True), "epsilon", lambda s: min(s, 5) / s),
    (MinSNR(5, floor=True), "v_prediction", lambda s: min(s + 1, 5) / (s + 1)),
    (MinSNR(5, floor=True), "sample", lambda s: min(s + 1, 5)),
    (SoftMinSNR(5), "epsilon", lambda s: 1 / (1 / s + 1 / 5) / s),
    (SoftMinSNR(5), "v_prediction", lambda s: 1 / (1 / s + 1 / 5) / (s + 1)),
    (
        SoftMinSNR(4),
        "sample",
        lambda s: 1 / (1 / s + 0.5**2),
    ),  # k-diffusion: 1/(sigma^2 + sigma_data^2), gamma = sigma_data^-2
    (Debiased(cap=1e9, snr_limit=1e9), "epsilon", lambda s: s**-0.5),
    (Debiased(cap=1e9, snr_limit=1e9), "sample", lambda s: s**0.5),
    (Debiased(cap=1e9, snr_limit=1e9), "flow_prediction", lambda s: s**0.5 / (1 + math.sqrt(s)) ** 2),
    (Debiased(), "epsilon", lambda s: min(min(s, 1000) ** -0.5, 14.6146)),
    (Debiased(), "v_prediction", lambda s: 1 / (min(s, 1000) + 1)),
    (EpsilonLike(), "v_prediction", lambda s: min(s, 1000) / (min(s, 1000) + 1)),
    (PlusVLike(0.5), "epsilon", lambda s: 1 + 0.5 * min((min(s, 1000) + 1) / min(s, 1000), 214.5877)),
]


@pytest.mark.parametrize(
    ("weighting", "kind", "formula"), FORMULAS, ids=lambda x: x if isinstance(x, str) else None
)
def test_weights_are_their_formulas(weighting, kind, formula):
    np.testing.assert_allclose(weighting(np.array(SNRS), kind), [formula(s) for s in SNRS], rtol=3e-6)


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [
        (MinSNR(5), [1, 0, 0, 0]),
        (MinSNR(5, floor=True), [1, 1, 1, 1]),
        (MinSNR(0.5, floor=True), [1, 0.5, 0.5, 0.5]),
        (SoftMinSNR(5), [1, 0, 0, 0]),
        (Debiased(), [14.6146, 1, 0, 0]),
        (EpsilonLike(), [1, 0, 0, 0]),
        (PlusVLike(0.5, cap=10), [6, 6, 6, 6]),
    ],
    ids=str,
)
def test_limits_at_snr_0(weighting, expected):
    with np.errstate(all="raise"):
        limits = [float(weighting(np.array([0.0]), kind)[0]) for kind in TYPES]
    np.testing.assert_allclose(limits, expected, rtol=1e-5)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=str)
@pytest.mark.parametrize(
    "schedule",
    [SDXL, ZTSNR, NoiseSchedule.cosine(), NoiseSchedule.flow(6)],
    ids=["sdxl", "ztsnr", "cosine", "flow"],
)
def test_every_weight_is_finite_everywhere(schedule, weighting, kind):
    with np.errstate(all="raise"):
        table = weighting.table(schedule, kind)
    assert table.shape == (len(schedule),) and table.dtype == np.float64
    assert np.isfinite(table).all() and (table >= 0).all() and (table[:-1] > 0).all()


def test_min_snr_gives_nothing_to_the_steps_that_zero_terminal_snr_adds():
    table = MinSNR(5).table(ZTSNR, "v_prediction")
    assert table[950] == pytest.approx(0.0006, abs=5e-5) and table[-1] == 0
    floored = MinSNR(5, floor=True).table(ZTSNR, "v_prediction")
    assert floored[950] == 1 and floored[-1] == 1


def test_snr_is_what_diffusers_scripts_compute():
    try:
        from diffusers.training_utils import compute_snr
    except (
        RuntimeError
    ) as error:  # it imports all of diffusers' models, and so transformers, peft and torchvision
        pytest.skip(f"diffusers.training_utils does not import here: {error}")
    scheduler = diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    np.testing.assert_allclose(SDXL.snr, compute_snr(scheduler, torch.arange(1000)).double(), rtol=3e-4)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_min_snr_is_the_diffusers_scripts_weight(kind):
    scheduler = diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    theirs = torch.stack([snr, 5.0 * torch.ones_like(snr)], dim=1).min(dim=1)[0] / (
        snr + (kind == "v_prediction")
    )
    np.testing.assert_allclose(MinSNR(5).table(SDXL, kind), theirs.double(), rtol=3e-4)


@pytest.mark.parametrize(
    ("weighting", "kinds"),
    [
        (MinSNR(5), TYPES),
        (MinSNR(0.7), TYPES),
        (MinSNR(5, floor=True), TYPES[1:]),  # epsilon is the documented exception
        (SoftMinSNR(5), TYPES),
        (Debiased(cap=1e9), ("epsilon", "sample", "flow_prediction")),
        (EpsilonLike(snr_limit=1e9), TYPES),
    ],
    ids=str,
)
@pytest.mark.parametrize("t", [1, 300, 700, 990])
@pytest.mark.parametrize("rectified", [False, True])
def test_one_x0_error_weighs_the_same_through_every_prediction(weighting, kinds, t, rectified):
    """A network that is wrong about x0 by d, seen at one fixed noisy sample, whatever it calls its output."""
    generator = torch.Generator().manual_seed(t)
    x0, noise, error = (torch.randn(1, 4, 8, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    alpha, sigma = float(ZTSNR.sqrt_alphas_cumprod[t]), float(ZTSNR.sqrt_one_minus_alphas_cumprod[t])
    if rectified:
        alpha, sigma = alpha / (alpha + sigma), sigma / (alpha + sigma)
        kinds = [
            kind for kind in kinds if kind != "v_prediction"
        ]  # v is defined by a variance-preserving pair
    sample = alpha * x0 + sigma * noise
    weighted = []
    for kind in kinds:
        right, wrong = (
            predictions.convert(x, "sample", kind, sample, alpha, sigma) for x in (x0, x0 + error)
        )
        weighted.append(weighting.table(ZTSNR, kind)[t] * float((wrong - right).square().sum()))
    np.testing.assert_allclose(weighted, weighted[-1], rtol=1e-7)


def test_default_debiased_cap_is_the_largest_weight_that_stock_training_gives():
    table = Debiased().table(SDXL, "epsilon")
    np.testing.assert_allclose(table[1:], SDXL.snr[1:] ** -0.5, rtol=1e-12)  # nothing is cut from above
    assert table[-1] == pytest.approx(14.6146, rel=1e-5) and table[0] == pytest.approx(1000**-0.5)


def test_weights_do_not_change_the_schedule_or_their_input():
    snr = np.array([0.0, 5.0, 2000.0])
    for weighting in WEIGHTINGS:
        for kind in TYPES:
            weighting(snr, kind)
    assert snr.tolist() == [0.0, 5.0, 2000.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MinSNR(0), "min_snr_gamma must be a positive number, got 0"),
        (lambda: MinSNR(math.nan), "min_snr_gamma must be a positive number, got nan"),
        (lambda: SoftMinSNR(-1), "soft_min_snr_gamma must be a positive number, got -1"),
        (lambda: Debiased(cap=math.inf), "cap must be a positive number, got inf"),
        (lambda: Debiased(snr_limit=0), "snr_limit must be a positive number, got 0"),
        (lambda: MinSNR().table(SDXL, "velocity"), "unknown prediction_type 'velocity'"),
    ],
)
def test_nonsense_is_refused_in_a_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_product_is_the_product():
    schedule, parts = NoiseSchedule.sdxl(), (MinSNR(5), Debiased())
    product = Product(parts).table(schedule, "v_prediction")
    assert product.tolist() == [
        a * b for a, b in zip(*(part.table(schedule, "v_prediction") for part in parts), strict=True)
    ]


# ---------------------------------------------------------------- flow's loss of other predictions

LEVELS = [0, 40, 300, 500, 700, 900, 990, 998]


def gradients(schedule, kind, dtype):
    """For each of LEVELS: the gradient of the loss of a network of ``kind`` that sees our noisy latents, as
    Objective has it under the weighting, and that of (u' - u)^2, flow's, of the flow prediction that its
    output says, by hand; with respect to the network's weights."""
    torch.manual_seed(1)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(4, 6, 3, padding=1), torch.nn.Tanh(), torch.nn.Conv2d(6, 4, 3, padding=1)
    ).to(dtype)
    objective = Objective(schedule, kind, weighting=FlowMatching())
    index = torch.tensor(LEVELS)
    latents, noise = torch.randn(2, len(LEVELS), 4, 8, 8, dtype=dtype)
    step = objective.draw(latents, index=index, noise=noise)
    losses = objective.loss(network(step.noisy), step, reduction="none")
    abar = torch.from_numpy(schedule.alphas_cumprod.copy())[index].reshape(-1, 1, 1, 1)
    alpha, sigma = abar.sqrt().to(dtype), (1 - abar).sqrt().to(dtype)
    s = sigma / (alpha + sigma)
    flowing = (1 - s) * latents + s * noise  # flow's noisy latents; the network's are larger
    y = network(flowing / torch.hypot(1 - s, s))
    if kind == "v_prediction":
        x0, eps = alpha * step.noisy - sigma * y, sigma * step.noisy + alpha * y
    elif kind == "epsilon":
        x0, eps = (step.noisy - sigma * y) / alpha, y
    else:
        x0, eps = y, (step.noisy - alpha * y) / sigma
    flow = ((eps - x0) - (noise - latents)).square().mean([1, 2, 3])
    for ours, theirs in zip(losses, flow, strict=True):
        yield [
            torch.cat(
                [g.flatten() for g in torch.autograd.grad(loss, network.parameters(), retain_graph=True)]
            )
            for loss in (ours, theirs)
        ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["v_prediction", "epsilon", "sample"])
@pytest.mark.parametrize("schedule", [SDXL, ZTSNR], ids=["sdxl", "ztsnr"])
def test_under_flow_weighting_every_samples_gradient_is_flows(schedule, kind, dtype):
    if kind == "epsilon" and schedule.zero_terminal:
        pytest.skip("refused")
    for ours, theirs in gradients(schedule, kind, dtype):
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-6


def test_flow_weighting_of_v_is_its_formula():
    sigmas = np.array([0.05, 1.0, 14.6146])
    expected = [1.0998, 2.0, 1.1362]
    np.testing.assert_allclose(FlowMatching()(sigmas**-2.0, "v_prediction"), expected, rtol=1e-4)
    assert FlowMatching().table(ZTSNR, "v_prediction")[-1] == 1
    assert FlowMatching().table(ZTSNR, "sample")[-1] == 1  # an error of u is one of x0 there


def test_flow_weighting_is_refused_where_it_means_nothing():
    with pytest.raises(ValueError, match="flow_prediction's loss is flow's already"):
        FlowMatching().table(ZTSNR, "flow_prediction")
    with pytest.raises(ValueError, match="epsilon has no flow loss at zero terminal SNR: train v_prediction"):
        FlowMatching().table(ZTSNR, "epsilon")
