"""Input perturbation and offset noise: what is added, how much of it, and that nothing else moves."""

import math

import pytest
import torch

from sdxl_fixes import InputPerturbation, OffsetNoise


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(shape=(64, 4, 32, 32), dtype=torch.float32):
    return torch.randn(shape, generator=seeded(99)).to(dtype)


def test_perturbation_adds_white_noise_of_strength_gamma():
    clean = noise()
    added = InputPerturbation(0.3)(clean, seeded()) - clean
    assert added.std().item() == pytest.approx(0.3, rel=0.01) and added.mean().item() == pytest.approx(
        0, abs=0.003
    )
    per_sample = added.flatten(1).std(1)
    assert per_sample.min() > 0.28 and per_sample.max() < 0.32
    assert abs((added * clean).mean().item()) < 0.003  # independent of what it is added to
    neighbours = (added[..., 1:] * added[..., :-1]).mean().item()
    assert abs(neighbours) < 0.001
    assert (clean + added).var().item() == pytest.approx(1 + 0.09, rel=0.01)


def test_perturbation_is_the_seeded_normal_times_gamma():
    clean = noise((3, 4, 8, 8))
    expected = clean + 0.1 * torch.randn(clean.shape, generator=seeded(7))
    torch.testing.assert_close(InputPerturbation()(clean, seeded(7)), expected)


def test_random_perturbation_draws_a_uniform_strength_for_every_sample():
    clean = noise((2000, 4, 16, 16))
    strengths = (InputPerturbation(0.5, random=True)(clean, seeded()) - clean).flatten(1).std(1) / 0.5
    ordered = strengths.sort().values.clamp(max=1)
    distance = (ordered - torch.linspace(0, 1, 2000)).abs().max().item()
    assert distance < 0.044  # Kolmogorov's 0.1 % limit, 1.95/sqrt(2000)
    assert len(strengths.unique()) > 1900


def test_random_strengths_do_not_depend_on_place_in_the_batch():
    clean = noise((2000, 1, 16, 16))
    strengths = (InputPerturbation(1.0, random=True)(clean, seeded()) - clean).flatten(1).std(1)
    assert strengths[::2].mean().item() == pytest.approx(0.5, abs=0.03) and strengths[
        1::2
    ].mean().item() == pytest.approx(0.5, abs=0.03)
    assert abs(torch.corrcoef(torch.stack([strengths[1:], strengths[:-1]]))[0, 1].item()) < 0.08


def test_offset_is_one_number_per_sample_and_channel():
    clean = noise((500, 4, 8, 8))
    added = OffsetNoise(0.2)(clean, seeded()) - clean
    assert added.flatten(2).std(2).max() < 1e-6  # constant over the canvas
    offsets = added[:, :, 0, 0]
    assert offsets.std().item() == pytest.approx(0.2, rel=0.05) and abs(offsets.mean().item()) < 0.02
    assert torch.corrcoef(offsets.T).triu(1).abs().max() < 0.15  # channels are independent


def test_random_offset_draws_a_uniform_strength_for_every_sample():
    clean = torch.zeros(4000, 64, 1, 1)
    strengths = OffsetNoise(0.4, random=True)(clean, seeded()).flatten(1).std(1) / 0.4
    assert strengths.mean().item() == pytest.approx(0.5, abs=0.02)
    assert strengths.std().item() == pytest.approx(12**-0.5, rel=0.05)
    assert strengths.max() < 1.35 and strengths.min() < 0.01


@pytest.mark.parametrize("make", [InputPerturbation, OffsetNoise])
@pytest.mark.parametrize("random", [False, True])
def test_input_is_left_alone_and_the_generator_decides(make, random):
    clean = noise((3, 4, 8, 8))
    before, change = clean.clone(), make(0.1, random)
    a, b, c = change(clean, seeded(1)), change(clean, seeded(1)), change(clean, seeded(2))
    assert (
        torch.equal(clean, before)
        and torch.equal(a, b)
        and not torch.equal(a, c)
        and not torch.equal(a, clean)
    )
    torch.manual_seed(5)
    d = change(clean)
    torch.manual_seed(5)
    assert torch.equal(d, change(clean)) and not torch.equal(d, change(clean))


@pytest.mark.parametrize("make", [InputPerturbation, OffsetNoise])
@pytest.mark.parametrize("random", [False, True])
def test_strength_0_changes_nothing(make, random):
    clean = noise((3, 4, 8, 8))
    assert torch.equal(make(0.0, random)(clean, seeded()), clean)


@pytest.mark.parametrize("make", [InputPerturbation, OffsetNoise])
@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (3, 4, 8), (3, 4, 2, 8, 8), (3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shape_and_dtype_are_kept(make, random, shape, dtype):
    changed = make(0.1, random)(noise(shape, dtype), seeded())
    assert changed.shape == shape and changed.dtype == dtype


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_nonsense_is_refused_in_a_sentence(value):
    with pytest.raises(ValueError, match="ip_noise_gamma must be a number of at least 0, got"):
        InputPerturbation(value)
    with pytest.raises(ValueError, match="noise_offset must be a number of at least 0, got"):
        OffsetNoise(value)
