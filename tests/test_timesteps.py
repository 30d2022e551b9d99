"""Timestep sampling: the distributions, the slices of an optimizer step over ranks, exact resumption, and the
edges."""

import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from sdxl_fixes import NoiseSchedule, TimestepSampler

SDXL, ZTSNR = NoiseSchedule.sdxl(), NoiseSchedule.sdxl().zero_terminal_snr()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def chi_square(draws, expected):
    counts = np.bincount(np.asarray(draws), minlength=len(expected))
    return float(((counts - expected) ** 2 / expected).sum())


# ---------------------------------------------------------------- uniform


def test_uniform_draws_are_torchs_own_randint():
    """Bit for bit what a trainer without this sampler draws."""
    assert torch.equal(
        TimestepSampler(SDXL).draw(50, generator=seeded(3)),
        torch.randint(0, 1000, (50,), generator=seeded(3)),
    )
    torch.manual_seed(4)
    drawn = TimestepSampler(SDXL).draw(50)
    torch.manual_seed(4)
    assert torch.equal(drawn, torch.randint(0, 1000, (50,))) and drawn.dtype == torch.int64


def test_uniform_marginal():
    drawn = TimestepSampler(SDXL).draw(200_000, generator=seeded())
    assert drawn.min() == 0 and drawn.max() == 999
    assert chi_square(drawn, np.full(1000, 200.0)) < 1144  # 0.1 % limit for 999 degrees of freedom
    assert TimestepSampler(SDXL).weights(drawn) is None


@pytest.mark.parametrize(
    "options", [{}, {"stratified": True}, {"terminal_share": 0.3, "terminal_start": 650}]
)
def test_range_is_half_open(options):
    drawn = TimestepSampler(SDXL, min_timestep=600, max_timestep=700, **options).draw(
        20_000, generator=seeded()
    )
    assert sorted(set(drawn.tolist())) == list(range(600, 700))


@pytest.mark.parametrize(
    "options", [{}, {"stratified": True}, {"terminal_share": 0.3, "terminal_start": 999}]
)
def test_a_range_of_one_timestep(options):
    assert TimestepSampler(SDXL, 999, 1000, **options).draw(5, generator=seeded()).tolist() == [999] * 5


@pytest.mark.parametrize("options", [{}, {"stratified": True}])
def test_a_schedule_of_two_timesteps_and_a_batch_of_one(options):
    sampler = TimestepSampler(NoiseSchedule.from_betas([0.1, 0.2]), **options)
    drawn = [sampler.draw(1, generator=seeded(i)).item() for i in range(50)]
    assert set(drawn) == {0, 1}


# ---------------------------------------------------------------- stratified


def ranks(world_size, **options):
    return [
        TimestepSampler(SDXL, stratified=True, rank=rank, world_size=world_size, **options)
        for rank in range(world_size)
    ]


@pytest.mark.parametrize(
    ("batch", "accumulation", "world_size"), [(5, 2, 4), (8, 1, 1), (1, 5, 5), (1, 1, 8), (4, 1, 250)]
)
def test_an_optimizer_step_has_one_draw_in_each_slice(batch, accumulation, world_size):
    count = batch * accumulation * world_size
    assert 1000 % count == 0
    samplers = ranks(world_size, accumulation=accumulation, seed=11)
    for _ in range(6):
        drawn = torch.cat([sampler.draw(batch) for _ in range(accumulation) for sampler in samplers])
        assert sorted((drawn // (1000 // count)).tolist()) == list(range(count))


def test_ranks_agree_in_any_order_without_talking():
    def step(order):
        samplers = ranks(4, accumulation=2)
        return {rank: [samplers[rank].draw(3).tolist() for _ in range(4)] for rank in order}

    assert step([0, 1, 2, 3]) == step([3, 1, 0, 2])


def test_slices_are_dealt_anew_every_step_and_by_every_seed():
    def owners(seed):
        sampler = ranks(4, seed=seed)[0]
        return [tuple((sampler.draw(2) // 125).tolist()) for _ in range(200)]

    first = owners(0)
    assert len(set(first)) > 45  # of the 56 ordered pairs of 8 slices
    assert all(a != b for a, b in first)  # never one slice twice in one step
    counts = np.bincount(np.array(first).ravel(), minlength=8)
    assert counts.min() > 25 and counts.max() < 80
    assert first != owners(1)


def test_every_seed_of_64_bits_is_another_and_others_are_refused():
    seeds = [0, 1, 2**53 + 1, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 1]
    drawn = {tuple(TimestepSampler(SDXL, stratified=True, seed=seed).draw(64).tolist()) for seed in seeds}
    assert len(drawn) == len(seeds)
    state = TimestepSampler(SDXL, stratified=True, seed=2**63 + 1).state_dict()
    resumed = TimestepSampler(SDXL, stratified=True)
    resumed.load_state_dict(state)
    assert tuple(resumed.draw(64).tolist()) in drawn
    for wrong in (-1, 2**64, 7.5, float("nan"), "7"):
        with pytest.raises(ValueError, match=rf"seed must be a whole number in 0\.\.{2**64 - 1}, got "):
            TimestepSampler(SDXL, seed=wrong)


def test_a_single_stratified_draw_is_uniform():
    samplers = [
        TimestepSampler(SDXL, stratified=True, seed=seed, world_size=4, rank=1, accumulation=2)
        for seed in range(4000)
    ]
    drawn = [sampler.draw(2)[1].item() // 50 for sampler in samplers]
    assert chi_square(drawn, np.full(20, 200.0)) < 43.8  # 0.1 % limit for 19 degrees of freedom


def test_draws_are_uniform_within_their_slice():
    sampler = TimestepSampler(SDXL, stratified=True)
    drawn = torch.cat([sampler.draw(4) for _ in range(1500)]) % 250 // 25
    assert chi_square(drawn, np.full(10, 600.0)) < 27.9


def test_stratified_draws_ignore_torchs_generator():
    torch.manual_seed(0)
    a = TimestepSampler(SDXL, stratified=True).draw(8, generator=seeded(1))
    torch.manual_seed(1)
    assert torch.equal(a, TimestepSampler(SDXL, stratified=True).draw(8, generator=seeded(2)))
    assert torch.equal(
        torch.rand(1), torch.rand(1, generator=seeded(1))
    )  # and leave the global one where it was


def test_stratified_draws_are_these_by_raw_bits_alone(monkeypatch):
    """Recorded: another numpy must draw the same, or no state that users have saved resumes exactly."""
    monkeypatch.setattr(np.random, "Generator", None)  # its methods change between versions
    bits = np.random.Philox(key=[7, 2]).random_raw(16).tolist()
    ranks = sorted(range(8), key=bits.__getitem__)
    exact = [int(1000 * (Fraction(ranks[k]) + Fraction(bits[8 + k] >> 11, 2**53)) / 8) for k in range(8)]
    samplers = [
        TimestepSampler(SDXL, stratified=True, seed=7, rank=rank, world_size=2, accumulation=2)
        for rank in (0, 1)
    ]
    drawn = [[sampler.draw(2).tolist() for _ in range(6)] for sampler in samplers]
    assert [t for draw in (4, 5) for rank in (0, 1) for t in drawn[rank][draw]] == exact
    assert exact == [774, 978, 576, 35, 156, 701, 407, 321]


@pytest.mark.parametrize("after", [1, 5, 6])
def test_state_dict_resumes_exactly(after):
    original = TimestepSampler(ZTSNR, stratified=True, seed=5, rank=1, world_size=2, accumulation=3)
    for _ in range(after):
        original.draw(4)
    state = json.loads(json.dumps(original.state_dict()))
    resumed = TimestepSampler(ZTSNR, stratified=True, rank=1, world_size=2, accumulation=3)
    resumed.load_state_dict(state)
    for _ in range(7):
        assert torch.equal(original.draw(4), resumed.draw(4))


# ---------------------------------------------------------------- terminal-weighted

WEIGHTED = {"min_timestep": 100, "max_timestep": 990, "terminal_share": 0.25, "terminal_start": 900}


@pytest.mark.parametrize("stratified", [False, True])
def test_terminal_share_goes_to_the_terminal_steps_and_the_rest_everywhere(stratified):
    sampler = TimestepSampler(SDXL, **WEIGHTED, stratified=stratified)
    drawn = sampler.draw(400_000, generator=seeded()).numpy()
    low, high = 0.75 / 890, 0.75 / 890 + 0.25 / 90
    expected = np.concatenate([np.full(800, low), np.full(90, high)])
    assert drawn.min() == 100 and drawn.max() == 989
    assert (drawn >= 900).mean() == pytest.approx(0.75 * 90 / 890 + 0.25, abs=0.003)
    assert chi_square(drawn - 100, 400_000 * expected) < 1027  # 0.1 % limit for 889 degrees of freedom
    np.testing.assert_allclose(sampler.probabilities, expected, rtol=1e-12)


def test_timesteps_outside_the_range_have_weight_1():
    """A trainer may ask for those of its own validation, or of a draw that is not the sampler's."""
    outside = torch.cat([torch.arange(100), torch.arange(990, 1000)])
    assert TimestepSampler(SDXL, **WEIGHTED).weights(outside).tolist() == [1] * 110


def test_importance_weights_keep_every_expected_loss():
    sampler = TimestepSampler(SDXL, **WEIGHTED)
    t = torch.arange(100, 990)
    weights = sampler.weights(t).double().numpy()
    low, high = 0.75 / 890, 0.75 / 890 + 0.25 / 90
    probability = np.where(t.numpy() < 900, low, high)
    assert (probability * weights).sum() == pytest.approx(1, rel=1e-6)
    for f in (np.sqrt, np.sin, lambda t: t.astype(float) ** 2, lambda t: (t == 950) * 1.0):
        assert (probability * weights * f(t.numpy())).sum() == pytest.approx(f(t.numpy()).mean(), rel=1e-5)
    drawn = sampler.draw(400_000, generator=seeded())
    sampled = sampler.weights(drawn)
    assert sampled.dtype == torch.float32 and sampled.mean().item() == pytest.approx(1, abs=0.004)
    assert (sampled * drawn).mean().item() == pytest.approx((100 + 989) / 2, rel=0.005)


def test_default_terminal_start_is_where_sigma_passes_stock_sdxls():
    for schedule in (ZTSNR, SDXL.with_terminal_sigma(300, "beta_end"), SDXL.with_terminal_sigma(300, "last")):
        sampler = TimestepSampler(schedule, terminal_share=0.5)
        favoured = sampler.weights(torch.arange(1000)) < 1
        assert favoured.tolist() == (schedule.sigmas > 14.61465).tolist() and favoured.any()


def test_weights_of_a_cosine_schedule_are_read_at_the_timestep_itself():
    sampler = TimestepSampler(SDXL, terminal_share=0.5, terminal_start=998)
    weights = sampler.weights(torch.tensor([0, 997, 998, 999]))
    np.testing.assert_allclose(weights, [2, 2, 1 / (0.5 + 250), 1 / (0.5 + 250)], rtol=1e-6)


# ---------------------------------------------------------------- edges


@pytest.mark.parametrize("options", [{}, {"terminal_share": 0.5}], ids=["uniform", "terminal"])
def test_the_extreme_uniform_numbers_stay_in_range(options, monkeypatch):
    sampler = TimestepSampler(ZTSNR, stratified=True, min_timestep=10, **options)
    points = np.array([0.0, 1e-12, 1 - 2.0**-24, 1 - 1e-12, 1 - 2.0**-53])
    monkeypatch.setattr(sampler, "_strata", lambda batch_size: points)
    assert sampler.draw(5).tolist() == [10, 10, 999, 999, 999]
    sampler = TimestepSampler(ZTSNR, terminal_share=0.5, min_timestep=10)
    monkeypatch.setattr(torch, "rand", lambda *size, **options: torch.tensor([0.0, 1 - 2.0**-24]))
    assert sampler.draw(2).tolist() == [10, 999]


def test_slices_are_cut_at_the_right_number():
    sampler = TimestepSampler(SDXL, terminal_share=0.5, terminal_start=500)  # 500 at 0.0005, 500 at 0.0015
    u = torch.tensor([0.2, 0.2499, 0.2501, 0.2509, 0.2519, 0.62575])
    torch_rand, torch.rand = torch.rand, lambda *size, **options: u
    try:
        drawn = sampler.draw(6).tolist()
    finally:
        torch.rand = torch_rand
    assert drawn == [400, 499, 500, 500, 501, 750]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"min_timestep": 5, "max_timestep": 5},
            "0 <= min < max <= 1000, got min_timestep=5, max_timestep=5",
        ),
        ({"min_timestep": -1}, "got min_timestep=-1"),
        ({"max_timestep": 1001}, "max_timestep=1001"),
        ({"terminal_share": 1.0}, r"terminal_share must lie in \[0, 1\), got 1.0"),
        ({"terminal_share": -0.1}, r"terminal_share must lie in \[0, 1\)"),
        ({"terminal_share": math.nan}, r"terminal_share must lie in \[0, 1\)"),
        (
            {"terminal_share": 0.5},
            "needs timesteps above sigma 14.6 .* has none there: use zero terminal SNR",
        ),
        ({"terminal_share": 0.5, "terminal_start": 1000}, "terminal_share needs timesteps"),
        (
            {"rank": 2, "world_size": 2},
            "0 <= rank < world_size and accumulation >= 1, got rank=2, world_size=2",
        ),
        ({"accumulation": 0}, "accumulation=0"),
    ],
)
def test_nonsense_is_refused_in_a_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        TimestepSampler(SDXL, **options)


def test_terminal_share_of_a_range_that_is_all_terminal_is_uniform():
    sampler = TimestepSampler(ZTSNR, min_timestep=998, terminal_share=0.5)
    np.testing.assert_allclose(sampler.weights(torch.tensor([998, 999])), [1, 1])


def test_an_optimizer_step_that_ends_early_leaves_no_draw_for_the_next():
    """Six micro-batches an epoch, four to a step: accelerate steps after the sixth, so steps have 4, 2, 4, 2
    draws."""
    sampler = TimestepSampler(SDXL, stratified=True, accumulation=4)
    for _ in range(3):
        whole = torch.cat([sampler.draw(1) for _ in range(4)])
        assert sorted((4 * whole // 1000).tolist()) == [0, 1, 2, 3]
        sampler.end_of_step()
        sampler.draw(1), sampler.draw(1)
        sampler.end_of_step()
    assert sampler.state_dict()["drawn"] == 24


@pytest.mark.parametrize("drawn", [0, 1, 3, 4])
def test_a_step_that_ends_early_leaves_the_rest_of_its_slices(drawn):
    """However many of a step's four draws were made, the next is the first of the next step."""
    options = dict(stratified=True, seed=5, accumulation=4)
    whole, early = TimestepSampler(SDXL, **options), TimestepSampler(SDXL, **options)
    expected = [whole.draw(3).tolist() for _ in range(8)]
    found = [early.draw(3).tolist() for _ in range(drawn)]
    early.end_of_step()
    assert found == expected[:drawn]
    assert [early.draw(3).tolist() for _ in range(4)] == expected[4 if drawn else 0 :][:4]
