"""Targets and conversions against hand-written closed forms in float64, and against diffusers."""

import itertools
import math

import diffusers
import numpy as np
import pytest
import torch

from sdxl_fixes import NoiseSchedule
from sdxl_fixes import prediction as predictions

TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")
SDXL = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
}


def closed_form(kind, x0, noise, alpha, sigma):
    """The definitions: noise; x0; alpha noise - sigma x0; noise - x0."""
    if kind == "epsilon":
        return noise
    if kind == "sample":
        return x0
    if kind == "v_prediction":
        return alpha * noise - sigma * x0
    return noise - x0


def pair(shape=(6, 4, 8, 8), dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype), torch.randn(
        shape, generator=generator, dtype=dtype
    )


def column(values):
    return torch.tensor(values, dtype=torch.float64).reshape(-1, 1, 1, 1)


ANGLES = column([0.01, 0.3, 0.8, 1.1, 1.5, 1.5707])
SHARES = column([0.001, 0.1, 0.5, 0.9, 0.99, 0.999])
LEVELS = {"variance-preserving": (ANGLES.cos(), ANGLES.sin()), "rectified": (1 - SHARES, SHARES)}


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize(("source", "to"), list(itertools.product(TYPES, TYPES)))
def test_conversion_is_the_closed_form(source, to, levels):
    (x0, noise), (alpha, sigma) = pair(), LEVELS[levels]
    sample = alpha * x0 + sigma * noise
    converted = predictions.convert(
        closed_form(source, x0, noise, alpha, sigma), source, to, sample, alpha, sigma
    )
    torch.testing.assert_close(converted, closed_form(to, x0, noise, alpha, sigma), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("kind", TYPES)
def test_a_wrong_prediction_converts_as_the_two_equations_say(kind, levels):
    """Not only the perfect prediction: any y with alpha x0 + sigma noise = x and the definition of y."""
    (y, sample), (alpha, sigma) = pair(seed=1), LEVELS[levels]
    x0, noise = predictions.x0_and_noise(y, kind, sample, alpha, sigma)
    torch.testing.assert_close(alpha * x0 + sigma * noise, sample, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(closed_form(kind, x0, noise, alpha, sigma), y, rtol=1e-8, atol=1e-8)


def test_v_of_a_variance_preserving_sample_recovers_both_parts_by_rotation():
    (x0, noise), (alpha, sigma) = pair(), LEVELS["variance-preserving"]
    x, v = alpha * x0 + sigma * noise, alpha * noise - sigma * x0
    torch.testing.assert_close(
        predictions.convert(v, "v_prediction", "sample", x, alpha, sigma), alpha * x - sigma * v
    )
    torch.testing.assert_close(
        predictions.convert(v, "v_prediction", "epsilon", x, alpha, sigma), sigma * x + alpha * v
    )


@pytest.mark.parametrize("to", TYPES)
@pytest.mark.parametrize("source", ["v_prediction", "sample", "flow_prediction"])
def test_conversion_at_snr_0_is_exact(source, to):
    x0, noise = pair(dtype=torch.float32)
    given = closed_form(source, x0, noise, 0.0, 1.0)
    torch.testing.assert_close(
        predictions.convert(given, source, to, noise, 0.0, 1.0), closed_form(to, x0, noise, 0.0, 1.0)
    )


@pytest.mark.parametrize("to", ["v_prediction", "sample", "flow_prediction"])
def test_epsilon_at_snr_0_is_refused(to):
    x0, noise = pair((2, 4, 8, 8))
    with pytest.raises(ValueError, match="x0 cannot be recovered from an epsilon prediction at SNR 0"):
        predictions.convert(noise, "epsilon", to, noise, 0.0, 1.0)
    with pytest.raises(ValueError, match="SNR 0"):  # one such sample in the batch is enough
        predictions.convert(
            noise, "epsilon", to, x0, torch.tensor([0.5, 0.0]), torch.tensor([0.75**0.5, 1.0])
        )


@pytest.mark.parametrize("kind", TYPES)
def test_target_is_the_closed_form_at_every_level(kind):
    x0, noise = pair()
    for alpha, sigma in [*LEVELS.values(), (column([0.0] * 6), column([1.0] * 6))]:
        torch.testing.assert_close(
            predictions.target(kind, x0, noise, alpha, sigma),
            closed_form(kind, x0, noise, alpha, sigma).expand_as(x0),
            rtol=1e-14,
            atol=0,
        )


def test_noise_and_velocity_are_diffusers_own():
    scheduler, schedule = diffusers.DDPMScheduler(**SDXL), NoiseSchedule.sdxl()
    x0, noise = pair(dtype=torch.float32)
    t = torch.tensor([0, 1, 250, 500, 750, 999])
    alpha = torch.from_numpy(schedule.sqrt_alphas_cumprod[t.numpy()]).float()
    sigma = torch.from_numpy(schedule.sqrt_one_minus_alphas_cumprod[t.numpy()]).float()
    noisy = predictions.add_noise(x0, noise, alpha, sigma)
    torch.testing.assert_close(noisy, scheduler.add_noise(x0, noise, t), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        predictions.target("v_prediction", x0, noise, alpha, sigma),
        scheduler.get_velocity(x0, noise, t),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize(
    "shape", [(3, 4), (3, 4, 8), (3, 4, 8, 8), (3, 4, 2, 8, 8), (1, 4, 8, 8), (8, 8, 8, 8)]
)
def test_one_level_per_sample_goes_to_its_sample_whatever_the_shape(shape):
    x0, noise = pair(shape)
    alpha, sigma = (
        torch.linspace(0.1, 0.9, shape[0], dtype=torch.float64),
        torch.linspace(1.0, 0.2, shape[0], dtype=torch.float64),
    )
    noisy = predictions.add_noise(x0, noise, alpha, sigma)
    v = predictions.target("v_prediction", x0, noise, alpha, sigma)
    back = predictions.convert(v, "v_prediction", "sample", noisy, alpha, sigma)
    for i in range(shape[0]):
        torch.testing.assert_close(noisy[i], alpha[i] * x0[i] + sigma[i] * noise[i])
        torch.testing.assert_close(v[i], alpha[i] * noise[i] - sigma[i] * x0[i])
        torch.testing.assert_close(back[i], x0[i])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", TYPES)
def test_half_precision_input_is_computed_in_float32(kind, dtype):
    x0, noise = (x.to(dtype) for x in pair())
    alpha, sigma = math.cos(1.5), math.sin(1.5)
    noisy, y = (
        predictions.add_noise(x0, noise, alpha, sigma),
        predictions.target(kind, x0, noise, alpha, sigma),
    )
    assert noisy.dtype == y.dtype == torch.float32
    torch.testing.assert_close(
        noisy.double(), alpha * x0.double() + sigma * noise.double(), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(
        y.double(), closed_form(kind, x0.double(), noise.double(), alpha, sigma), rtol=1e-5, atol=1e-6
    )
    got = predictions.x0_and_noise(y.to(dtype), kind, noisy.to(dtype), alpha, sigma)
    expected = predictions.x0_and_noise(y.to(dtype).double(), kind, noisy.to(dtype).double(), alpha, sigma)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_float64_is_kept():
    x0, noise = pair()
    assert predictions.add_noise(x0, noise, 0.6, 0.8).dtype == torch.float64
    assert predictions.target("v_prediction", x0, noise, 0.6, 0.8).dtype == torch.float64


def test_a_number_from_a_schedules_table_is_a_level():
    x0, noise = pair()
    schedule = NoiseSchedule.sdxl()
    alpha, sigma = (
        schedule.sqrt_alphas_cumprod[500],
        schedule.sqrt_one_minus_alphas_cumprod[500],
    )  # numpy scalars
    expected = float(alpha) * x0 + float(sigma) * noise
    assert isinstance(alpha, np.float64)
    torch.testing.assert_close(predictions.add_noise(x0, noise, alpha, sigma), expected)
    torch.testing.assert_close(predictions.convert(noise, "epsilon", "sample", expected, alpha, sigma), x0)


def test_gradients_flow_through_a_conversion():
    y, sample = pair((2, 4))
    y.requires_grad_()
    predictions.convert(y, "v_prediction", "sample", sample, 0.6, 0.8).sum().backward()
    torch.testing.assert_close(y.grad, torch.full_like(y, -0.8))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: predictions.target("velocity", x, x, 1, 0),
        lambda x: predictions.convert(x, "x0", "sample", x, 1, 0),
    ],
)
def test_an_unknown_type_is_refused_with_the_four_that_exist(call):
    with pytest.raises(
        ValueError,
        match=r"unknown prediction_type .*: expected one of epsilon, v_prediction, sample, flow_prediction",
    ):
        call(torch.ones(1, 2))
    with pytest.raises(ValueError, match="unknown prediction_type 'x0'"):
        predictions.convert(torch.ones(1, 2), "epsilon", "x0", torch.ones(1, 2), 0.6, 0.8)


def test_conversion_to_the_same_type_is_float32_too():
    x = torch.ones(1, 2, dtype=torch.bfloat16)
    assert predictions.convert(x, "epsilon", "epsilon", x, 0.6, 0.8).dtype == torch.float32


@pytest.mark.parametrize("to", ["epsilon", "v_prediction", "flow_prediction"])
def test_sample_prediction_of_a_clean_sample_is_refused_or_finite(to):
    try:
        converted = predictions.convert(torch.ones(1, 2), "sample", to, torch.ones(1, 2), 1.0, 0.0)
    except ValueError:
        return
    assert torch.isfinite(converted).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_levels_in_half_precision_that_broadcast_by_themselves_are_raised_to_float32(dtype):
    """[B, 1, 1, 1] as [B]: the round trip x0 -> v -> x0 is as exact as float32 is with these levels."""
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(3, 4, 8, 8, generator=generator) for _ in range(2))
    level, other = torch.tensor([0.3, 0.7, 0.9], dtype=dtype), torch.tensor([0.9, 0.7, 0.3], dtype=dtype)
    for shape in ((3,), (3, 1, 1, 1)):
        levels = (level.reshape(shape), other.reshape(shape))
        noisy = predictions.add_noise(x0, noise, *levels)
        v = predictions.target("v_prediction", x0, noise, *levels)
        assert noisy.dtype == v.dtype == torch.float32
        back, _ = predictions.x0_and_noise(v, "v_prediction", noisy, *levels)
        torch.testing.assert_close(back, x0, rtol=1e-5, atol=1e-5)


def test_one_sample_of_a_batch_at_a_level_that_hides_what_is_asked_is_refused():
    """A division by 0 for one sample is inf or NaN for the batch: the check is of any level, not of all."""
    x, levels = torch.ones(2, 4, 2, 2), torch.tensor([0.0, 0.6])
    others = (1 - levels**2).sqrt()
    with pytest.raises(ValueError, match="noise cannot be recovered"):
        predictions.x0_and_noise(x, "sample", x, others, levels)
    with pytest.raises(ValueError, match="x0 cannot be recovered"):
        predictions.x0_and_noise(x, "epsilon", x, levels, others)
