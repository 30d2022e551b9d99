"""The base as teacher, against networks in closed form: the best guess of an image that is one of six."""

import itertools
import math

import numpy as np
import pytest
import torch

from sdxl_fixes import NoiseSchedule
from sdxl_fixes.teacher import Teacher

SDXL, FLOW = NoiseSchedule.sdxl(), NoiseSchedule.flow(3.0)
ZTSNR = SDXL.zero_terminal_snr()
IMAGES = torch.randn(6, 4, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
BASES = {
    "epsilon": (SDXL, "epsilon"),
    "v": (ZTSNR, "v_prediction"),
    "flow": (FLOW, "flow_prediction"),
    "sample": (SDXL, "sample"),
}
NEW = {
    "v": (ZTSNR, "v_prediction"),
    "v, stock": (SDXL, "v_prediction"),
    "flow": (NoiseSchedule.flow(1.0), "flow_prediction"),
    "epsilon 100": (SDXL.with_terminal_sigma(100.0), "epsilon"),
}


def guess(y, sigma):
    """E[x0 | x0 + sigma noise = y] for x0 one of IMAGES, each as likely; float64, [B, ...]."""
    far = (y[:, None] - IMAGES).flatten(2).square().sum(2) / (2 * sigma.reshape(-1, 1) ** 2)
    return torch.einsum("bk,kchw->bchw", torch.softmax(-far, 1), IMAGES)


def sigmas_at(schedule, kind, told):
    """sigma/alpha at the timesteps that a network is told: between rows linear in log sigma."""
    if kind == "flow_prediction":
        s = told.double() / len(schedule)
        return s / (1 - s)
    rows, t = torch.from_numpy(schedule.sigmas.copy()), told.double()
    low = t.floor().long().clamp(max=len(rows) - 2)
    share = t - low
    finite = rows[low] ** (1 - share) * rows[low + 1] ** share
    return torch.where(rows[low + 1].isinf() & (share < 1), rows[low] / (1 - share), finite)


def form(kind, sigma):
    """alpha, sigma, and the prediction in terms of image and noise, by the papers."""
    if kind == "flow_prediction":
        alpha, s = 1 / (1 + sigma), 1 / (1 + 1 / sigma)
    else:
        alpha, s = (1 + sigma**2) ** -0.5, (1 + sigma**-2.0) ** -0.5
    alpha, s = alpha.reshape(-1, 1, 1, 1), s.reshape(-1, 1, 1, 1)
    predict = {
        "epsilon": lambda x0, n: n,
        "sample": lambda x0, n: x0,
        "v_prediction": lambda x0, n: alpha * n - s * x0,
        "flow_prediction": lambda x0, n: n - x0,
    }[kind]
    return alpha, s, predict


def network(schedule, kind, x, told):
    """A perfect one, in float64."""
    sigma = sigmas_at(schedule, kind, told)
    alpha, s, predict = form(kind, sigma)
    at_zero = IMAGES.mean(0).expand(len(x), -1, -1, -1)
    x0 = torch.where(alpha == 0, at_zero, guess(x.double() / alpha, sigma.clamp(max=1e6)))
    return predict(x0, (x.double() - alpha * x0) / s)


def drawn(teacher, schedule, seed=0):
    """Latents, noise and the rows that are known."""
    index = torch.from_numpy(np.flatnonzero(teacher.known))
    generator = torch.Generator().manual_seed(seed)
    x0 = IMAGES[torch.randint(6, (len(index),), generator=generator)].float()
    return x0, torch.randn(x0.shape, generator=generator), index


@pytest.mark.parametrize("base, new", list(itertools.product(BASES, NEW)))
def test_what_the_base_teaches_is_the_same_function(base, new):
    """At every sigma that the base knows: the image that the new target means is the base's own within 1e-5,
    in float32."""
    if BASES[base] == NEW[new]:
        return
    teacher = Teacher(*BASES[base], *NEW[new])
    x0, noise, index = drawn(teacher, NEW[new][0])
    sample, told = teacher.sample(x0, noise, index)
    output = network(*BASES[base], sample, told).float()
    answer = teacher.answer(sample, output, index)
    assert answer.dtype == torch.float32
    ratio = torch.from_numpy(NEW[new][0].sigmas[index.numpy()])
    # the base's image, from its output by the papers, in float64
    alpha, s, _ = form(BASES[base][1], ratio)
    x, y = sample.double(), output.double()
    own = {
        "epsilon": lambda: (x - s * y) / alpha,
        "sample": lambda: y,
        "v_prediction": lambda: alpha * x - s * y,
        "flow_prediction": lambda: (x - s * y) / (alpha + s),
    }[BASES[base][1]]()
    # the student's, of its own sample at the same noise
    alpha, s, _ = form(NEW[new][1], ratio)
    x, y = alpha * x0.double() + s * noise.double(), answer.double()
    learnt = {
        "epsilon": lambda: (x - s * y) / alpha,
        "v_prediction": lambda: (alpha * x - s * y) / (alpha**2 + s**2),
        "flow_prediction": lambda: (x - s * y) / (alpha + s),
    }[NEW[new][1]]()
    close = ratio <= 14.62
    assert float((learnt - own)[close].abs().max()) <= 1e-5
    # and it is the best guess: the base was asked at the right level with the right scale
    assert float((own - guess(x / alpha, ratio.clamp(max=1e6)))[close].abs().max()) < 2e-4


@pytest.mark.parametrize("new", NEW)
def test_the_base_is_asked_only_where_it_was_trained(new):
    schedule = NEW[new][0]
    teacher = Teacher(SDXL, "epsilon", *NEW[new], share=0.25)
    inside = (schedule.sigmas >= SDXL.sigmas[0] * (1 - 1e-6)) & (schedule.sigmas <= 14.6147)
    assert (teacher.known == inside).all() and (new == "v, stock" or not inside.all())
    index, data = torch.arange(1000), torch.randn(1000, 4, 2, 2)
    answer = torch.randn_like(data)
    mixed = teacher.mix(answer, data, index)
    rows = torch.from_numpy(inside)
    assert torch.equal(mixed[~rows], data[~rows])
    torch.testing.assert_close(mixed[rows], (0.75 * data + 0.25 * answer)[rows])
    sample, told = teacher.sample(data, answer, index)
    assert torch.isfinite(teacher.answer(sample, answer, index)).all()
    assert 0 <= float(told.min()) and float(told.max()) <= 999


def test_on_its_own_rows_the_base_is_told_its_own_timesteps():
    """SDXL's schedule for v: the very samples and whole timesteps, bit for bit."""
    teacher = Teacher(SDXL, "epsilon", SDXL, "v_prediction")
    _, told = teacher.sample(torch.zeros(1000, 1), torch.zeros(1000, 1), torch.arange(1000))
    assert torch.equal(told, torch.arange(1000).float())


def test_mixing_targets_is_mixing_losses_of_l2():
    teacher = Teacher(SDXL, "epsilon", SDXL, "v_prediction", share=0.3)
    prediction, answer, data = torch.randn(3, 5, 4, 2, 2, dtype=torch.float64)
    index = torch.tensor([0, 10, 500, 900, 999])
    prediction.requires_grad_()

    def gradient(loss):
        return torch.autograd.grad(loss, prediction)[0]

    mixed = gradient((prediction - teacher.mix(answer, data, index)).square().sum())
    both = 0.3 * (prediction - answer).square().sum() + 0.7 * (prediction - data).square().sum()
    torch.testing.assert_close(mixed, gradient(both), rtol=1e-6, atol=1e-6)


def test_perturbed_samples_are_taught_the_mean_of_the_data_s_target():
    """E[answer | perturbed sample] = E[data's target | perturbed sample], for a perfect base: by regression
    of both on functions of the perturbed sample."""
    teacher = Teacher(SDXL, "epsilon", SDXL, "v_prediction")
    generator = torch.Generator().manual_seed(0)
    count, row = 40000, 500
    index = torch.full((count,), row)
    x0 = IMAGES[torch.randint(6, (count,), generator=generator)]
    noise, xi = torch.randn(2, *x0.shape, generator=generator, dtype=torch.float64)
    alpha, s = float(SDXL.sqrt_alphas_cumprod[row]), float(SDXL.sqrt_one_minus_alphas_cumprod[row])
    sample, told = teacher.sample(x0, noise, index)
    output = network(SDXL, "epsilon", sample, told)
    answer = teacher.answer(sample, output, index)
    perturbed = alpha * x0 + s * (noise + 0.5 * xi)
    features = torch.cat((torch.ones(count, 1), perturbed.flatten(1), perturbed.flatten(1) ** 2), 1).double()
    data = (alpha * noise - s * x0).flatten(1)
    by_answer, by_data = (
        torch.linalg.lstsq(features, y.double()).solution for y in (answer.flatten(1), data)
    )
    assert float((features @ (by_answer - by_data)).square().mean()) < 1e-3
    # asked at the perturbed sample the base would teach another mean
    wrong = teacher.answer(perturbed, network(SDXL, "epsilon", perturbed, told), index).flatten(1)
    other = torch.linalg.lstsq(features, wrong).solution
    assert float((features @ (other - by_data)).square().mean()) > 1e-2
    assert float((answer.flatten(1) - data).square().mean()) < float(data.square().mean())  # less variance


def test_what_cannot_be_converted_is_refused():
    with pytest.raises(ValueError, match=r"share must lie in \(0, 1\], got 2"):
        Teacher(SDXL, "epsilon", ZTSNR, "v_prediction", share=2)
    tiny = NoiseSchedule.from_sigmas([1e-4, 1e-3])
    with pytest.raises(ValueError, match=r"the base knows sigma 0\.02917 to 14\.61, the schedule has none"):
        Teacher(SDXL, "epsilon", tiny, "v_prediction")
    assert not Teacher(ZTSNR, "epsilon", ZTSNR, "v_prediction").known[-1]  # which epsilon says nothing of


@pytest.mark.parametrize("schedule", [SDXL, ZTSNR, FLOW], ids=["stock", "ztsnr", "flow"])
@pytest.mark.parametrize("flow", [False, True])
def test_levels_at_any_sigma(schedule, flow):
    """At the rows those of the table, between them as far as log sigma says, outside none."""
    rows = schedule.levels_at(schedule.sigmas, flow)
    for found, table in zip(rows, schedule.levels(flow), strict=True):
        np.testing.assert_allclose(found, table, rtol=1e-9, atol=1e-12)
    middle = np.sqrt(schedule.sigmas[100] * schedule.sigmas[101])
    alpha, sigma, told = (float(x) for x in schedule.levels_at(middle, flow))
    assert sigma / alpha == pytest.approx(middle, rel=1e-12)
    assert told == pytest.approx(1000 * middle / (1 + middle) if flow else 100.5, rel=1e-9)
    assert alpha + sigma == pytest.approx(1) if flow else alpha**2 + sigma**2 == pytest.approx(1)
    outside = schedule.levels_at([schedule.sigmas[0] / 2, 0.0], flow)[2]
    assert np.isnan(outside).all()
    above = float(schedule.levels_at(math.inf, flow)[2])
    if schedule.zero_terminal:
        assert above == (1000 if flow else 999)
        half = float(schedule.levels_at(2 * schedule.sigmas[-2])[2])
        assert half == pytest.approx(998.5)
    else:
        assert math.isnan(above)
