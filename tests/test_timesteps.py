"""Timestep sampling: the distributions, the slices of an optimizer step over ranks, exact resumption, and the
edges."""

import json
import math
import random
from fractions import Fraction

import numpy as np
import pytest
import torch

from sdxl_fixes import NoiseSchedule, TimestepSampler
from sdxl_fixes.densities import Beta, Laplace, LogitNormal, Mode

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


def model(seed, accumulation, world_size, batch, position, rank):
    """Where in the unit interval the draws of a rank fall, by the recipe alone, exactly."""
    step, micro = divmod(position, accumulation)
    count = batch * world_size * accumulation
    bits = np.random.Philox(key=[seed, step]).random_raw(2 * count).tolist()
    places = sorted(range(count), key=bits.__getitem__)
    mine = range((micro * world_size + rank) * batch, (micro * world_size + rank + 1) * batch)
    return [(places[k] + Fraction(bits[count + k] >> 11, 2**53)) / count for k in mine]


@pytest.mark.parametrize("trial", range(40))
def test_resuming_at_any_draw_under_any_other_setting_is_the_models(trial):
    """Stopped after any draw, resumed on another accumulation, world size and batch: at the end of an
    optimizer step the next one follows; inside of one it goes on only as it was."""
    rng = random.Random(trial)

    def setting():
        return rng.randint(1, 4), rng.randint(1, 4), rng.randint(1, 5)

    seed, old, new = rng.randint(0, 10**6), setting(), setting() if trial % 4 else None
    new = old if new is None else new
    options = rng.choice([{}, {"density": LogitNormal(), "uniform_share": 0.3}, {"terminal_share": 0.3}])

    def samplers(made_for, seed):
        return [
            TimestepSampler(
                ZTSNR,
                stratified=True,
                seed=seed,
                rank=rank,
                world_size=made_for[1],
                accumulation=made_for[0],
                **options,
            )
            for rank in range(made_for[1])
        ]

    running, drawn = samplers(old, seed), 0
    above = np.cumsum(running[0].probabilities)
    for _ in range(rng.randint(0, 9)):
        for sampler in running:
            sampler.draw(old[2])
        drawn += 1
        if rng.random() < 0.2:  # the end of an epoch: the optimizer steps early
            [sampler.end_of_step() for sampler in running]
            drawn += -drawn % old[0]
    state = json.loads(json.dumps(rng.choice(running).state_dict()))
    step, inside = divmod(drawn, old[0])
    resumed = samplers(new, 0)
    if inside and new[:2] != old[:2]:
        with pytest.raises(ValueError, match="saved inside an optimizer step of"):
            resumed[0].load_state_dict(state)
        return
    for sampler in resumed:
        sampler.load_state_dict(state)
    for position in range(step * new[0] + inside, (step + 2) * new[0]):
        for rank, sampler in enumerate(resumed):
            points = model(seed, *new, position, rank)
            found = sampler.draw(new[2]).tolist()
            right = [int(np.searchsorted(above, float(u), side="right")) for u in points]
            near = [
                min(abs(float(u) - edge) for edge in above[max(0, t - 1) : t + 1])
                for u, t in zip(points, right, strict=True)
            ]
            for t, other, distance in zip(found, right, near, strict=True):
                assert t == other or (abs(t - other) == 1 and distance < 1e-7)  # float32 where uniform


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


# ---------------------------------------------------------------- densities

DENSITIES = [LogitNormal(), LogitNormal(-1, 0.5), Laplace(), Mode(), Beta(), Beta(2, 0.8)]
PLAIN = {"min_timestep": 50, "max_timestep": 950}


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("density", DENSITIES, ids=str)
def test_a_density_is_drawn_as_it_is(density, stratified):
    """Counted in bins of a hundredth of the mass each; without weights nothing is weighted."""
    sampler = TimestepSampler(ZTSNR, density=density, stratified=stratified, **PLAIN)
    masses = density.masses(ZTSNR)[50:950]
    right = masses / masses.sum()
    bins = np.minimum((np.cumsum(right) - right / 2) * 100, 99).astype(int)
    drawn = sampler.draw(50_000, generator=seeded()).numpy()
    assert drawn.min() >= 50 and drawn.max() <= 949
    counts, expected = np.bincount(bins[drawn - 50], minlength=100), np.bincount(bins, right, 100)
    seen = expected > 0
    statistic = ((counts - 50_000 * expected)[seen] ** 2 / (50_000 * expected[seen])).sum()
    assert statistic < (20 if stratified else 149)  # 0.1 % limit for 99 degrees of freedom
    assert sampler.weights(torch.tensor([50, 500])) is None and sampler.effective == 1
    np.testing.assert_allclose(sampler.probabilities, right, rtol=1e-9, atol=2.0**-52)


WEIGHED = [
    dict(density=LogitNormal(), uniform_share=0.1),
    dict(density=Laplace(), uniform_share=0.25, terminal_share=0.2, terminal_start=900),
    dict(density=Mode()),
    dict(density=Beta(2, 2), uniform_share=0.5, **PLAIN),
    dict(density=Beta(), terminal_share=0.3),
]


@pytest.mark.parametrize("options", WEIGHED, ids=str)
def test_a_weighted_density_keeps_every_expected_loss(options):
    """Exactly by its probabilities, and of stratified draws to 1e-3."""
    sampler = TimestepSampler(ZTSNR, weighted=True, stratified=True, **options)
    t = torch.arange(sampler.min_timestep, sampler.max_timestep)
    p, w = sampler.probabilities, sampler.weights(t).double().numpy()
    assert p.min() > 0 and p.sum() == pytest.approx(1, abs=1e-15)
    losses = [np.ones(len(t)), np.sin(t.numpy() / 50) + 2, (t.numpy() >= 900) * 1.0, ZTSNR.snr[t]]
    drawn = sampler.draw(1_000_000)
    for loss in losses:
        assert (p * w * loss).sum() == pytest.approx(loss.mean(), rel=1e-6)  # weights are float32
        weighted = sampler.weights(drawn).double().numpy() * loss[drawn.numpy() - sampler.min_timestep]
        assert weighted.mean() == pytest.approx(loss.mean(), rel=1e-3)
    assert sampler.effective == pytest.approx((p * w).sum() ** 2 / (p * w * w).sum(), rel=1e-5)
    if share := options.get("uniform_share"):
        assert w.max() < 1 / share / (1 - options.get("terminal_share", 0)) + 1e-3


def test_terminal_share_of_an_unweighted_density_keeps_the_densitys_own_expected_loss():
    sampler = TimestepSampler(ZTSNR, density=LogitNormal(), terminal_share=0.2, uniform_share=0.1)
    masses = LogitNormal().masses(ZTSNR)
    right = 0.9 * masses / masses.sum() + 0.1 / 1000
    weights = sampler.weights(torch.arange(1000)).double().numpy()
    np.testing.assert_allclose(sampler.probabilities * weights, right, rtol=1e-6)
    assert sampler.probabilities[880:].sum() == pytest.approx(0.2 + 0.8 * right[880:].sum())


def test_weights_that_no_draw_could_bear_are_refused():
    for density in (LogitNormal(), Laplace()):
        with pytest.raises(ValueError, match=r"importance weights would reach .*: give uniform_share 0.1"):
            TimestepSampler(ZTSNR, density=density, weighted=True)
    with pytest.raises(ValueError, match=r"logit-normal, mean 0, std 0.001 has no mass on timesteps 0 to 9 "):
        TimestepSampler(SDXL, max_timestep=10, density=LogitNormal(0, 0.001))


@pytest.mark.parametrize("density", [LogitNormal(-0.5, 0.7), Laplace(), Beta(0.5, 0.5)], ids=str)
@pytest.mark.parametrize(("batch", "accumulation", "world_size"), [(3, 2, 4), (8, 1, 1), (1, 1, 50)])
def test_an_optimizer_step_has_one_draw_of_a_density_in_each_slice_of_it(
    density, batch, accumulation, world_size
):
    """The k-th smallest of N draws has the k-th N-th of the mass."""
    count = batch * accumulation * world_size
    samplers = ranks(world_size, accumulation=accumulation, seed=3, density=density)
    above = np.concatenate([[0], np.cumsum(samplers[0].probabilities)])
    for _ in range(4):
        drawn = torch.cat([sampler.draw(batch) for _ in range(accumulation) for sampler in samplers])
        for k, t in enumerate(sorted(drawn.tolist())):
            assert above[t] < (k + 1) / count + 1e-12 and above[t + 1] > k / count - 1e-12


def test_rare_timesteps_are_drawn_as_rarely_as_their_mass(monkeypatch):
    """A mass of 2.7e-7, of which float32 would lose a tenth: by the numbers that stand for it."""
    sampler = TimestepSampler(SDXL, density=Laplace())
    counts = np.rint(np.cumsum(Laplace().masses(SDXL)) / Laplace().masses(SDXL).sum() * 2**53)
    for t in (0, 500, 998, 999):
        first = int(counts[t - 1]) if t else 0
        u = torch.tensor([first + 500, int(counts[t]) - 500])  # sums of a thousand round
        assert torch.searchsorted(sampler._cumulative.on(u.device), u, right=True).tolist() == [t, t]
    assert sampler.probabilities[999] == pytest.approx(2.6659e-7, rel=1e-4)
    stratified = TimestepSampler(SDXL, density=Laplace(), stratified=True)
    monkeypatch.setattr(stratified, "_strata", lambda count: np.array([1 - 2.67e-7, 1 - 2.66e-7]))
    assert stratified.draw(2).tolist() == [998, 999]


# ---------------------------------------------------------------- resolution


@pytest.mark.parametrize("options", [{}, {"density": Beta()}, {"terminal_share": 0.3}], ids=str)
@pytest.mark.parametrize("stratified", [False, True])
def test_a_canvas_of_four_times_the_area_sees_twice_the_sigma(options, stratified):
    """Shares below any sigma are those of half of it on the base canvas, to the width of a cell."""
    sampler = TimestepSampler(ZTSNR, base=1024, stratified=stratified, **options)
    drawn = {
        size: ZTSNR.sigmas[sampler.draw(100_000, generator=seeded(), size=size)]
        for size in ((128, 128), (256, 256), (192, 96), (64, 64))
    }
    for sigma in (0.2, 1.0, 3.0, 20.0):
        base = np.mean(drawn[128, 128] < sigma)
        for (height, width), seen in drawn.items():
            ratio = math.sqrt(height * width) / 128
            assert np.mean(seen < sigma * ratio) == pytest.approx(base, abs=0.006)
    plain = TimestepSampler(ZTSNR, stratified=stratified, **options)
    plain.draw(100_000, generator=seeded())  # the same numbers on the base canvas as without a shift
    again = TimestepSampler(ZTSNR, base=1024, stratified=stratified, **options)
    again.draw(100_000, generator=seeded(), size=(64, 64))
    assert torch.equal(
        plain.draw(50, generator=seeded(1)), again.draw(50, generator=seeded(1), size=(128, 128))
    )


def test_where_the_table_or_the_range_ends_shifted_draws_end():
    drawn = TimestepSampler(SDXL, base=512).draw(100_000, generator=seeded(), size=(128, 128))
    assert (drawn == 999).double().mean() == pytest.approx(np.mean(SDXL.sigmas > 14.61 / 2), abs=0.003)
    sampler = TimestepSampler(SDXL, 100, 400, base=512)
    assert sampler.draw(20_000, generator=seeded(), size=(128, 128)).max() == 399
    assert sampler.draw(20_000, generator=seeded(), size=(32, 32)).min() == 100


@pytest.mark.parametrize("size", [(128, 128), (200, 90), (48, 64), (256, 256)])
def test_weights_of_a_shifted_density_keep_the_loss_of_shifted_uniform_draws(size):
    options = dict(base=1024, min_timestep=20, max_timestep=990)
    sampler = TimestepSampler(
        SDXL, density=LogitNormal(), weighted=True, uniform_share=0.2, stratified=True, **options
    )
    uniform = TimestepSampler(SDXL, stratified=True, **options).draw(970_000, size=size)
    drawn = sampler.draw(970_000, size=size)
    for loss in (np.ones(1000), np.cos(np.arange(1000) / 99) + 2, SDXL.snr):
        weighted = sampler.weights(drawn, size).double().numpy() * loss[drawn]
        assert weighted.mean() == pytest.approx(loss[uniform].mean(), rel=1e-3)


def test_a_resolution_shift_must_know_the_size():
    sampler = TimestepSampler(SDXL, base=1024, terminal_share=0.5, terminal_start=900)
    for ask in (lambda: sampler.draw(3), lambda: sampler.weights(torch.tensor([3]))):
        with pytest.raises(ValueError, match="needs the latents' size: give their height and width"):
            ask()


# ---------------------------------------------------------------- edges


@pytest.mark.parametrize(
    "options",
    [{}, {"terminal_share": 0.5}, {"density": Beta()}, {"density": LogitNormal(), "uniform_share": 0.1}],
    ids=str,
)
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
        ({"weighted": True}, "weighted and uniform_share belong to a density"),
        ({"uniform_share": 0.1}, "weighted and uniform_share belong to a density"),
        ({"density": Beta(), "uniform_share": 1.0}, r"uniform_share must lie in \[0, 1\), got 1.0"),
        ({"base": 0}, "base must be a canvas's side in pixels, got 0"),
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
