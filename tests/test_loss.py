"""Losses against their textbook forms in float64, exact decimals, and autograd."""

from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch

from sdxl_fixes import Loss, NoiseSchedule, ScheduledHuber
from sdxl_fixes.loss import HUBER_KINDS, huber, l1, l2, smooth_l1

SDXL, ZTSNR = NoiseSchedule.sdxl(), NoiseSchedule.sdxl().zero_terminal_snr()


def naive(kind, r, c):
    """The textbook form, in float64."""
    root = (r.double() ** 2 + torch.as_tensor(c, dtype=torch.float64) ** 2).sqrt() - c
    return {"l2": r.double() ** 2, "l1": r.double().abs(), "huber": 2 * c * root, "smooth_l1": 2 * root}[kind]


def exact(kind, r, c):
    """The textbook form in 60 digits."""
    with localcontext() as context:
        context.prec = 60
        r, c = Decimal(r), Decimal(c)
        root = 2 * ((r * r + c * c).sqrt() - c)
        return float(c * root if kind == "huber" else root)


def call(kind, residual, delta=None, mask=None, **options):
    target = torch.randn(residual.shape, generator=torch.Generator().manual_seed(3)).to(residual.dtype)
    loss = Loss(kind) if kind in ("l2", "l1") else ScheduledHuber(kind, **options)
    return loss(target + residual, target, delta, mask), (target + residual).double() - target.double()


def residuals(shape=(4, 3, 5, 5), seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * torch.tensor(
        [0.01, 0.1, 1.0, 10.0]
    ).reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("kind", ["l2", "l1", "huber", "smooth_l1"])
def test_values_are_the_textbook_forms(kind):
    delta = torch.tensor([0.1, 1.0, 0.3, 0.05])
    got, r = call(kind, residuals(), delta)
    torch.testing.assert_close(
        got.double(), naive(kind, r, delta.double().reshape(-1, 1, 1, 1)), rtol=2e-6, atol=2e-8
    )
    assert got.dtype == torch.float32 and got.shape == (4, 3, 5, 5)


@pytest.mark.parametrize("kind", ["huber", "smooth_l1"])
@pytest.mark.parametrize("r", [1e17, 2.0**60, 1.5e19, -2e19, 1e30, -1e37])
def test_residuals_whose_square_is_infinite_have_their_value_and_slope(kind, r):
    residual = torch.tensor([r], requires_grad=True)
    value = (huber if kind == "huber" else smooth_l1)(residual, 0.5)
    (slope,) = torch.autograd.grad(value.sum(), residual)
    assert value.item() == pytest.approx(exact(kind, r, 0.5), rel=1e-6)
    assert slope.item() == pytest.approx(np.sign(r) * (1.0 if kind == "huber" else 2.0), rel=1e-6)


@pytest.mark.parametrize("kind", ["huber", "smooth_l1"])
def test_ordinary_residuals_keep_every_bit_of_the_plain_formula(kind):
    residual = (residuals((4, 4, 16, 16)) * 1e3).requires_grad_()
    delta = torch.tensor([0.1, 1.0, 0.3, 0.05]).reshape(-1, 1, 1, 1)
    square = residual**2
    plain = 2 * square / (torch.sqrt(square + delta**2) + delta)
    plain = delta * plain if kind == "huber" else plain
    got = (huber if kind == "huber" else smooth_l1)(residual, delta)
    assert torch.equal(got, plain)
    slopes = [torch.autograd.grad(value.sum(), residual)[0] for value in (got, plain)]
    assert torch.equal(*slopes)


@pytest.mark.parametrize(
    ("kind", "slopes"),
    [
        ("l2", [0.02, 0.2, 2, 20]),
        ("l1", [1, 1, 1, 1]),
        ("huber", [0.0199, 0.141, 0.199, 0.2]),
        ("smooth_l1", [0.199, 1.41, 1.99, 2.0]),
    ],
)
def test_gradients_are_the_published_table(kind, slopes):
    prediction = torch.tensor([[0.01, 0.1, 1.0, 10.0]], requires_grad=True)
    loss = Loss(kind) if kind in ("l2", "l1") else ScheduledHuber(kind)
    loss(prediction, torch.zeros(1, 4), torch.tensor([0.1])).sum().backward()
    np.testing.assert_allclose(prediction.grad[0], slopes, rtol=3e-3)


@pytest.mark.parametrize("kind", HUBER_KINDS)
@pytest.mark.parametrize(
    ("r", "c"), [(1e-5, 1.0), (1e-4, 1.0), (3e-6, 0.1), (1e-7, 0.013), (0.5, 0.1), (300.0, 0.1)]
)
def test_float32_keeps_the_digits_that_the_textbook_form_cancels(kind, r, c):
    prediction = torch.tensor([[r]], dtype=torch.float32, requires_grad=True)
    delta = torch.tensor([c], dtype=torch.float32)
    got = ScheduledHuber(kind)(prediction, torch.zeros(1, 1), delta)
    assert got.item() == pytest.approx(exact(kind, prediction.item(), delta.item()), rel=1e-6)
    got.sum().backward()
    r64, c64 = prediction.item(), delta.item()
    slope = 2 * r64 / (r64**2 + c64**2) ** 0.5 * (c64 if kind == "huber" else 1)
    assert prediction.grad.item() == pytest.approx(slope, rel=1e-6)


def test_the_textbook_form_would_have_failed_that():
    r, c = torch.tensor(1e-5), torch.tensor(1.0)
    assert 2 * c * (torch.sqrt(r**2 + c**2) - c) == 0


@pytest.mark.parametrize("kind", HUBER_KINDS)
def test_a_perfect_prediction_has_loss_and_gradient_zero(kind):
    prediction = torch.ones(2, 3, requires_grad=True)
    for gradient in (None, "sample", "batch"):
        loss = ScheduledHuber(kind, l2_gradient=gradient)(
            prediction, torch.ones(2, 3), torch.tensor([0.1, 1.0])
        ).sum()
        loss.backward()
        assert loss.item() == 0 and (prediction.grad == 0).all()


@pytest.mark.parametrize("function", [huber, smooth_l1])
def test_gradcheck_in_float64(function):
    r = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    delta = torch.tensor([[0.1], [1.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (r, delta)) and torch.autograd.gradgradcheck(
        function, (r, delta)
    )


def test_elementwise_functions_keep_float64():
    r = torch.tensor([-2.0, 0.5], dtype=torch.float64)
    assert l2(r).tolist() == [4.0, 0.25] and l1(r).tolist() == [2.0, 0.5]
    assert huber(r, 0.5).dtype == torch.float64


# ---------------------------------------------------------------- delta


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        ("constant", [0.1, 0.1, 0.1, 0.1, 0.1]),
        ("exponential", [1, 0.562, 0.316, 0.178, 0.100]),
        ("snr", [0.950, 0.413, 0.231, 0.135, 0.104]),
    ],
)
def test_delta_has_the_published_values(schedule, values):
    delta = ScheduledHuber(schedule=schedule).delta(SDXL)
    np.testing.assert_allclose(delta[[0, 250, 500, 750, 999]], values, atol=5.1e-4)
    assert delta.shape == (1000,) and delta.dtype == np.float64


def test_exponential_delta_is_a_straight_line_in_its_logarithm():
    delta = ScheduledHuber(schedule="exponential", c=0.02).delta(NoiseSchedule.linear(num_timesteps=50))
    np.testing.assert_allclose(np.log(delta), np.log(0.02) * np.arange(50) / 50, atol=1e-13)


def test_snr_delta_is_the_closed_form_and_exactly_c_at_snr_0():
    delta = ScheduledHuber(c=0.3).delta(ZTSNR)
    betas = np.log1p(-ZTSNR.betas[:-1]).cumsum()
    sigma = np.sqrt(np.expm1(-betas))
    np.testing.assert_allclose(delta[:-1], 0.7 / (1 + sigma) ** 2 + 0.3, rtol=1e-9)
    assert delta[-1] == 0.3


@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr"])
def test_huber_scale_is_honoured_by_every_schedule(schedule):
    plain, scaled = (ScheduledHuber(schedule=schedule, scale=scale).delta(SDXL) for scale in (1.0, 1.75))
    np.testing.assert_allclose(scaled, 1.75 * plain, rtol=1e-14)


def test_plain_losses_have_no_delta():
    assert Loss("l2").delta(SDXL) is None and Loss("l1").delta(SDXL) is None


@pytest.mark.parametrize("kind", HUBER_KINDS)
def test_each_sample_has_its_own_delta(kind):
    r, delta = residuals((4, 4, 4, 4)), torch.tensor([0.1, 1.0, 0.3, 0.05])
    got, exact_r = call(kind, r, delta)
    wide, _ = call(kind, r, delta.reshape(4, 1, 1, 1))
    assert torch.equal(got, wide)
    for i, c in enumerate(delta.double().tolist()):
        torch.testing.assert_close(got[i].double(), naive(kind, exact_r[i], c), rtol=1e-5, atol=1e-7)


# ---------------------------------------------------------------- mask, dtype, shape


@pytest.mark.parametrize("kind", ["l2", "l1", "huber", "smooth_l1"])
def test_a_mask_multiplies_the_loss(kind):
    mask = torch.rand(4, 1, 5, 5, generator=torch.Generator().manual_seed(5))
    delta = torch.full((4,), 0.1)
    (masked, r), (plain, _) = call(kind, residuals(), delta, mask), call(kind, residuals(), delta)
    torch.testing.assert_close(masked.double(), naive(kind, r, 0.1) * mask.double(), rtol=1e-4, atol=1e-7)
    assert torch.equal(call(kind, residuals(), delta, torch.ones(4, 1, 5, 5))[0], plain)
    assert (call(kind, residuals(), delta, torch.zeros(4, 1, 5, 5, dtype=torch.bool))[0] == 0).all()


@pytest.mark.parametrize("kind", ["l2", "l1", "huber", "smooth_l1"])
def test_a_bfloat16_prediction_is_computed_in_float32(kind):
    r = residuals().bfloat16()
    got, exact_r = call(kind, r, torch.full((4,), 0.1, dtype=torch.float64))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), naive(kind, exact_r, 0.1), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4), (2, 3, 2, 4, 4), (1, 3, 4, 4)])
def test_any_number_of_dimensions_will_do(shape):
    r = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for gradient in (None, "sample", "batch"):
        assert call("huber", r, torch.full((shape[0],), 0.1), l2_gradient=gradient)[0].shape == shape


# ---------------------------------------------------------------- l2_gradient


def gradient(loss, prediction, target, *arguments):
    prediction = prediction.clone().requires_grad_()
    loss(prediction, target, *arguments).sum().backward()
    return prediction.grad.double()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", HUBER_KINDS)
def test_l2_gradient_gives_the_gradient_norm_of_l2(kind, masked):
    prediction, target = residuals(), residuals(seed=1)
    delta = torch.tensor([0.1, 1.0, 0.3, 0.05])
    mask = torch.rand(4, 1, 5, 5, generator=torch.Generator().manual_seed(5)) if masked else None
    wanted = gradient(Loss("l2"), prediction, target, None, mask)
    shape = gradient(ScheduledHuber(kind), prediction, target, delta, mask)
    per_sample = gradient(ScheduledHuber(kind, l2_gradient="sample"), prediction, target, delta, mask)
    whole = gradient(ScheduledHuber(kind, l2_gradient="batch"), prediction, target, delta, mask)
    torch.testing.assert_close(
        per_sample.flatten(1).norm(dim=1), wanted.flatten(1).norm(dim=1), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(whole.norm(), wanted.norm(), rtol=1e-5, atol=0)
    assert not torch.allclose(whole.flatten(1).norm(dim=1), wanted.flatten(1).norm(dim=1), rtol=0.05)
    # the direction stays Huber's: of each sample, and of the batch
    cosine = torch.nn.functional.cosine_similarity
    torch.testing.assert_close(
        cosine(per_sample.flatten(1), shape.flatten(1)), torch.ones(4, dtype=torch.float64), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(
        cosine(whole.flatten(), shape.flatten(), dim=0),
        torch.tensor(1.0, dtype=torch.float64),
        rtol=1e-6,
        atol=0,
    )


def test_l2_gradient_with_one_perfect_sample_is_finite():
    prediction, target = residuals(), residuals()
    target[1:] += 1
    for kind in ("sample", "batch"):
        got = gradient(ScheduledHuber(l2_gradient=kind), prediction, target, torch.full((4,), 0.1))
        assert torch.isfinite(got).all() and (got[0] == 0).all()


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Loss("huber"), "unknown loss 'huber': expected l2 or l1, or ScheduledHuber"),
        (lambda: ScheduledHuber("l2"), "unknown Huber loss 'l2': expected one of"),
        (lambda: ScheduledHuber(schedule="cosine"), "unknown huber_schedule 'cosine': expected one of"),
        (lambda: ScheduledHuber(c=0), "huber_c must be a positive number, got 0"),
        (lambda: ScheduledHuber(c=float("nan")), "huber_c must be a positive number, got nan"),
        (lambda: ScheduledHuber(scale=-1), "huber_scale must be a positive number, got -1"),
        (lambda: ScheduledHuber(scale=float("inf")), "huber_scale must be a positive number"),
        (
            lambda: ScheduledHuber(l2_gradient="pixel"),
            "unknown l2_gradient 'pixel': expected sample, batch or None",
        ),
    ],
)
def test_nonsense_is_refused_in_a_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()
