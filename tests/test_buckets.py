"""The batch sampler: every sample once, no mixed batches, equal ranks, resume to the sample; the properties
are hypothesis's to break."""

import itertools
import json
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sdxl_fixes.buckets
from sdxl_fixes.buckets import _PIECE, ChunkBucketBatchSampler, _argsort, _codes


def facts_model(samples, buckets=40, seed=0):
    """Aspect buckets, and chunk counts as prompts of N(45, 30) words and 1.35 tokens a word have them."""
    rng = np.random.default_rng(seed)
    share = np.array([59.8, 38.4, 1.9])
    return rng.integers(0, buckets, samples), rng.choice([1, 2, 3], samples, p=share / share.sum())


@st.composite
def data(draw):
    samples = draw(st.integers(1, 120))
    column = st.lists(st.integers(0, 3), min_size=samples, max_size=samples)
    return np.array(draw(column)) * 7 - 3, np.array(draw(column)) + 1


OPTIONS = st.fixed_dictionaries(
    {
        "batch_size": st.integers(1, 9),
        "world_size": st.integers(1, 5),
        "leftovers": st.sampled_from(["merge", "smaller"]),
        "aligned": st.booleans(),
    }
)


def ranks(data, options, **more):
    return [
        ChunkBucketBatchSampler(*data, rank=rank, **options, **more) for rank in range(options["world_size"])
    ]


def flat(epochs):
    return [index for batches in epochs for batch in batches for index in batch]


@given(data(), OPTIONS, st.integers(0, 3), st.integers(0, 2**63))
def test_an_epoch_holds_every_sample_once_in_unmixed_batches_equally_on_all_ranks(data, options, epoch, seed):
    buckets, chunks = data
    samplers = ranks(data, options, seed=seed)
    for sampler in samplers:
        sampler.set_epoch(epoch)
    account, epochs = samplers[0].account(), [list(sampler) for sampler in samplers]
    assert len({len(batches) for batches in epochs}) == 1 and len(epochs[0]) == len(samplers[0])
    counts = Counter(flat(epochs))
    assert set(counts) == set(range(len(buckets)))
    assert sum(counts.values()) - len(buckets) == account.repeated and account.lost == 0
    if (
        account.repeated and not options["aligned"]
    ):  # only where there are fewer samples than a step of single ones needs
        assert account.repeated < options["world_size"] and all(
            len(batch) == 1 for batches in epochs for batch in batches
        )
    steps = list(zip(*epochs, strict=True))
    for batch in (batch for step in steps for batch in step):
        assert 0 < len(batch) <= options["batch_size"]
        assert len(set(buckets[batch])) == 1
        assert len(set(chunks[batch])) == 1 or options["leftovers"] == "merge"
    if options["aligned"]:
        for step in steps:
            assert len({buckets[batch[0]] for batch in step}) == 1
            assert max(map(len, step)) - min(map(len, step)) <= 1
    own = sum(
        chunks[batch].tolist() != [chunks[batch].max()] * len(batch)
        for batch in (b for step in steps for b in step)
    )
    whole = options["world_size"] if options["aligned"] else 1
    assert own <= whole * len(set(buckets)) * (
        len(set(chunks)) - 1
    )  # merging upward mixes at a border of two chunk counts, once


@given(data(), OPTIONS, st.integers(0, 2), st.data())
def test_seeking_is_skipping(data, options, epoch, draw):
    sampler = ranks(data, options, seed=5)[-1]
    sampler.set_epoch(epoch)
    batches = list(sampler)
    taken = draw.draw(st.integers(0, len(batches)))
    again = ranks(data, options, seed=5)[-1]
    again.set_epoch(epoch)
    iterator = iter(again)
    skipped = [next(iterator) for _ in range(taken)]
    state = json.loads(json.dumps(again.state_dict()))
    assert skipped == batches[:taken]
    resumed = ranks(data, options, seed=99)[-1]
    resumed.load_state_dict(state)
    if taken < len(batches):
        assert (
            resumed.epoch == epoch
            and len(resumed) == len(batches) - taken
            and list(resumed) == batches[taken:]
        )
        assert resumed.account() == sampler.account()
    else:
        sampler.set_epoch(epoch + 1)
        assert resumed.epoch == epoch + 1 and list(resumed) == list(sampler)


@given(data(), st.lists(OPTIONS, min_size=2, max_size=4), st.data())
def test_resumes_under_any_other_settings_see_exactly_the_rest(data, chain, draw):
    state, seen, repeated = None, Counter(), 0
    for options in chain:
        samplers = ranks(data, options, seed=1)
        for sampler in samplers:
            if state is not None:
                sampler.load_state_dict(state)
        if samplers[0].epoch == 1:
            break
        steps = draw.draw(st.integers(0, len(samplers[0])))
        for sampler in samplers:
            iterator = iter(sampler)
            seen.update(index for _ in range(steps) for index in next(iterator))
        states = [sampler.state_dict() for sampler in samplers]
        assert all(other == states[0] for other in states)
        state, repeated = json.loads(json.dumps(states[0])), samplers[0].account().repeated
    else:
        for sampler in ranks(data, chain[-1], seed=1):
            sampler.load_state_dict(state)
            if sampler.epoch == 0:
                seen.update(flat([list(sampler)]))
    assert set(seen) == set(range(len(data[0])))
    assert sum(seen.values()) - len(seen) == repeated  # what was said to be repeated, and nothing else


@given(data(), OPTIONS, OPTIONS)
def test_a_state_of_an_epoch_s_end_goes_on_with_the_next_under_any_settings(data, first, second):
    trained = ranks(data, first, seed=2)
    for sampler in trained:
        assert list(sampler)
    state, resumed = json.loads(json.dumps(trained[0].state_dict())), ranks(data, second, seed=9)
    for sampler in resumed:
        sampler.load_state_dict(state)
    assert {sampler.epoch for sampler in resumed} == {1}
    fresh = ranks(data, second, seed=2)
    for sampler in fresh:
        sampler.set_epoch(1)
    epochs = [list(sampler) for sampler in resumed]
    assert epochs == [list(sampler) for sampler in fresh] and set(flat(epochs)) == set(range(len(data[0])))


@given(st.lists(st.tuples(st.integers(0, 2**50), st.integers(0, 2**64 - 1)), min_size=1), st.integers(0, 50))
def test_sorting_by_group_and_random_bits_is_pythons(pairs, narrow):
    """Also where groups and indices leave no bits to shuffle by."""
    group = np.array([group >> narrow for group, _ in pairs], dtype=np.int64)
    bits = np.array([bits for _, bits in pairs], dtype=np.uint64)
    found = _argsort(group, bits)
    width = max(1, (len(pairs) - 1).bit_length()) + max(1, int(group.max()).bit_length())
    cut = np.uint64(width if width <= 48 else 0)  # so many of the random bits do not count
    keys = list(zip(group.tolist(), (bits >> cut).tolist(), strict=True))
    assert sorted(found.tolist()) == list(range(len(pairs)))
    assert [keys[k] for k in found] == sorted(keys)


def test_an_iteration_that_another_has_replaced_moves_nothing():
    sampler = ChunkBucketBatchSampler([0] * 10, [1] * 10, batch_size=2)
    old = iter(sampler)
    next(old)
    new = iter(sampler)
    next(new)
    assert len(list(old)) == 4
    assert sampler.state_dict()["samples"] == 4
    sampler.set_epoch(5)
    list(new)
    assert (sampler.epoch, sampler.state_dict()["samples"]) == (5, 0)


@given(data(), st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.data())
def test_another_rank_count_keeps_the_order(data, first_world, second_world, batch_size, draw):
    """Elastic determinism: the batches come in the same order whoever trains them."""
    alone = [
        ChunkBucketBatchSampler(*data, batch_size=batch_size, rank=None, world_size=w)
        for w in (first_world, second_world)
    ]
    steps = draw.draw(st.integers(0, max(0, len(alone[0]) // first_world - 3)))
    whole = list(alone[0])
    alone[1].load_state_dict(
        ChunkBucketBatchSampler(*data, batch_size=batch_size, world_size=first_world).state_dict(steps)
    )
    rest = list(alone[1])
    untouched = max(
        0,
        len(whole)
        - steps * first_world
        - 2 * (first_world + second_world)
        - sum(len(b) < batch_size for b in whole),
    )
    assert rest[:untouched] == whole[steps * first_world :][:untouched]


@given(
    data(), OPTIONS, st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.5, 3.0]), min_size=120, max_size=120)
)
def test_repeats_hold_exactly_over_the_epochs(data, options, repeats):
    repeats = np.array(repeats[: len(data[0])])
    repeats[0] = 3
    samplers, counts, extra = ranks(data, options, repeats=repeats, seed=3), Counter(), 0
    for epoch in range(4):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        extra += samplers[0].account().repeated
        counts.update(flat([list(sampler) for sampler in samplers]))
        for index, repeat in enumerate(repeats.tolist()):
            assert counts[index] >= int(repeat * (epoch + 1))
    assert sum(counts.values()) == extra + (4 * repeats).sum()


def test_fractional_repeats_do_not_all_fall_into_the_same_epoch():
    sampler = ChunkBucketBatchSampler(np.zeros(1000, int), np.ones(1000, int), batch_size=10, repeats=0.5)
    first, second = set(flat([list(sampler)])), set(flat([list(sampler)]))
    assert not first & second and len(first | second) == 1000 and 430 < len(first) < 570


@pytest.mark.parametrize("batch_size", [4, 16, 32, 64])
def test_text_costs_the_floor(batch_size):
    """facts.md: 1.42 chunks at any batch size, where aspect buckets alone cost 1.95 to 2.70."""
    buckets, chunks = facts_model(200_000)
    account = ChunkBucketBatchSampler(buckets, chunks, batch_size=batch_size).account()
    plain = ChunkBucketBatchSampler(buckets, np.ones_like(chunks), batch_size=batch_size)
    by_aspect = np.mean([chunks[batch].max() for batch in plain])
    assert account.floor == pytest.approx(1.42, abs=0.005) and account.chunks == pytest.approx(1.42, abs=0.02)
    assert by_aspect == pytest.approx({4: 1.95, 16: 2.26, 32: 2.45, 64: 2.70}[batch_size], abs=0.03)


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_a_small_set_loses_and_repeats_nothing(world_size):
    data = facts_model(1000)
    for leftovers in ("merge", "smaller"):
        account = ChunkBucketBatchSampler(
            *data, batch_size=16, world_size=world_size, leftovers=leftovers
        ).account()
        assert (account.lost, account.repeated) == (0, 0)
    merged = ChunkBucketBatchSampler(*data, batch_size=16, world_size=world_size).account()
    assert merged.smaller < account.smaller and merged.batches < account.batches
    dropped = ChunkBucketBatchSampler(*data, batch_size=16, leftovers="drop").account()
    assert dropped.smaller == 0 and dropped.lost > 250  # what merging saves


def test_dropping_counts_what_it_drops():
    buckets, chunks = np.array([0] * 10 + [1] * 7), np.ones(17, int)
    samplers = [
        ChunkBucketBatchSampler(buckets, chunks, batch_size=4, leftovers="drop", rank=r, world_size=2)
        for r in range(2)
    ]
    assert all(len(batch) == 4 for sampler in samplers for batch in sampler)
    assert (
        samplers[0].account().lost == 17 - 8 and samplers[0].account().batches == 2
    )  # 2 + 1 batches, of which one rank would miss the third


def test_order_is_random_by_seed_and_epoch_and_not_by_anything_else():
    data = facts_model(3000)
    sampler, other = (
        ChunkBucketBatchSampler(*data, batch_size=8, seed=4),
        ChunkBucketBatchSampler(*data, batch_size=8, seed=4),
    )
    first, second = list(sampler), list(sampler)
    assert sampler.epoch == 1 and first != second
    other.set_epoch(1)
    assert list(other) == second
    assert list(ChunkBucketBatchSampler(*data, batch_size=8, seed=5)) != first
    neighbours = np.mean([abs(a[0] - b[0]) for a, b in itertools.pairwise(first)])
    assert neighbours == pytest.approx(1000, rel=0.2)  # of random pairs of 0..2999


def test_the_order_is_this_one():
    """Recorded: a change of the plan would break every state that users have saved."""
    sampler = ChunkBucketBatchSampler(
        [0, 1, 0, 1, 0, 1, 0, 1, 0, 0], [1, 1, 1, 2, 2, 1, 1, 1, 3, 1], batch_size=3, seed=11
    )
    assert list(sampler) == [[6, 4, 8], [0, 9, 2], [3], [5, 7, 1]]


def test_a_bucket_is_met_in_proportion_to_its_size():
    sizes = [400, 200, 100]
    buckets = np.repeat([0, 1, 2], sizes)
    firsts = Counter()
    for seed in range(300):
        firsts[
            int(
                buckets[
                    next(iter(ChunkBucketBatchSampler(buckets, np.ones(700, int), batch_size=10, seed=seed)))[
                        0
                    ]
                ]
            )
        ] += 1
    assert [firsts[b] / 300 for b in range(3)] == pytest.approx([4 / 7, 2 / 7, 1 / 7], abs=0.09)


def test_shuffling_reaches_every_place_equally():
    sampler, counts = (
        ChunkBucketBatchSampler(np.zeros(6, int), np.ones(6, int), batch_size=6),
        np.zeros((6, 6)),
    )
    for epoch in range(1200):
        sampler.set_epoch(epoch)
        counts[np.arange(6), next(iter(sampler))] += 1
    assert ((counts - 200) ** 2 / 200).sum() < 52.6  # 0.1 % limit for 25 degrees of freedom


def test_prompts_drawn_per_epoch_are_bucketed_as_drawn():
    drawn = {epoch: np.random.default_rng(epoch).integers(1, 4, 200) for epoch in range(3)}
    sampler = ChunkBucketBatchSampler(
        np.arange(200) % 3, lambda epoch: drawn[epoch], batch_size=4, leftovers="smaller"
    )
    for epoch in range(3):
        assert all(len(set(drawn[epoch][batch])) == 1 for batch in sampler) and sampler.epoch == epoch
    state = sampler.state_dict(2)
    drawn[2] = drawn[2][::-1]
    with pytest.raises(ValueError, match="other data"):
        ChunkBucketBatchSampler(np.arange(200) % 3, lambda epoch: drawn[epoch], batch_size=4).load_state_dict(
            state
        )


@pytest.mark.parametrize("change", ["buckets", "chunks", "repeats", "length"])
def test_a_state_of_other_data_is_refused_and_changes_nothing(change):
    buckets, chunks = facts_model(100)
    state = ChunkBucketBatchSampler(buckets, chunks, batch_size=4, seed=1).state_dict(3)
    other = {"buckets": buckets.copy(), "chunks": chunks.copy(), "repeats": 1}
    if change == "length":
        other["buckets"], other["chunks"] = buckets[:-1], chunks[:-1]
    elif change == "repeats":
        other["repeats"] = 2
    else:
        other[change][50] = other[change][50] % 3 + 1
    sampler = ChunkBucketBatchSampler(
        other["buckets"], other["chunks"], batch_size=4, repeats=other["repeats"], seed=2
    )
    expected = list(
        ChunkBucketBatchSampler(
            other["buckets"], other["chunks"], batch_size=4, repeats=other["repeats"], seed=2
        )
    )
    with pytest.raises(ValueError, match="the state was saved with other data"):
        sampler.load_state_dict(state)
    assert list(sampler) == expected


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: state.clear(), "this is no state of a bucket sampler"),
        (lambda state: state.pop("segments"), "damaged"),
        (lambda state: state.update(segments=[]), "damaged"),
        (
            lambda state: state["segments"][0].update(batches=10**6),
            "10\\*\\*6|1000000 batches were seen of .* damaged",
        ),
        (lambda state: state["segments"][0].pop("world_size"), "damaged"),
        (lambda state: state.update(samples=13), "13 samples were seen, which its own plan contradicts"),
    ],
)
def test_a_damaged_state_is_refused(damage, message):
    data = facts_model(100)
    state = ChunkBucketBatchSampler(*data, batch_size=4).state_dict(3)
    damage(state)
    with pytest.raises(ValueError, match=message):
        ChunkBucketBatchSampler(*data, batch_size=4).load_state_dict(state)


def test_going_back_behind_a_loaded_state_is_refused():
    """accelerate calls set_epoch(0) in a resumed process unless told where it stands."""
    data = facts_model(100)
    sampler = ChunkBucketBatchSampler(*data, batch_size=4)
    sampler.set_epoch(3)
    state = sampler.state_dict(2)
    resumed = ChunkBucketBatchSampler(*data, batch_size=4)
    resumed.load_state_dict(state)
    with pytest.raises(
        ValueError,
        match=r"set_epoch\(0\) goes back behind the loaded state, which stands in epoch 3: .*iteration",
    ):
        resumed.set_epoch(0)
    resumed.set_epoch(3)
    assert list(resumed) == list(sampler)[2:]


def test_state_of_a_prefetching_loader_counts_what_was_trained():
    from torch.utils.data import DataLoader

    data = facts_model(200)
    sampler = ChunkBucketBatchSampler(*data, batch_size=4)
    expected = list(ChunkBucketBatchSampler(*data, batch_size=4))
    loader = iter(
        DataLoader(np.arange(200), batch_sampler=sampler, num_workers=2, prefetch_factor=4, collate_fn=list)
    )
    trained = [[int(x) for x in next(loader)] for _ in range(5)]
    state = sampler.state_dict(5)
    assert trained == expected[:5] and sampler.state_dict()["samples"] > state["samples"]
    resumed = ChunkBucketBatchSampler(*data, batch_size=4)
    resumed.load_state_dict(state)
    assert list(resumed) == expected[5:]


@pytest.mark.parametrize("workers", [0, 2])
def test_stateful_data_loader(workers):
    torchdata = pytest.importorskip("torchdata.stateful_dataloader", reason="pip install torchdata to run")
    data = facts_model(200)

    def loader():
        sampler = ChunkBucketBatchSampler(*data, batch_size=4)
        return torchdata.StatefulDataLoader(
            np.arange(200), batch_sampler=sampler, num_workers=workers, collate_fn=list
        )

    whole, interrupted, resumed = loader(), loader(), loader()
    expected = [[[int(x) for x in batch] for batch in whole] for _ in range(2)]
    assert expected[0] != expected[1]
    for _, batch in zip(range(7), interrupted, strict=False):
        assert batch
    resumed.load_state_dict(json.loads(json.dumps(interrupted.state_dict())))
    assert [[int(x) for x in batch] for batch in resumed] == expected[0][7:]
    assert [[int(x) for x in batch] for batch in resumed] == expected[1]


def test_planning_a_million_samples_takes_30_mb_and_keeps_8():
    """21 and 7 bytes a sample at batch size 16, so 100 million fit a machine's every process."""
    data = facts_model(1_000_000)
    tracemalloc.start()
    sampler = ChunkBucketBatchSampler(*data, batch_size=16)
    next(iter(sampler))
    sampler.account()
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 30e6 and kept < 8e6


@given(st.lists(st.integers(-(2**62), 2**62), min_size=1), st.integers(0, 61))
def test_buckets_are_coded_as_numpy_s_unique_does(values, narrow):
    values = np.array(values) >> narrow
    for piece in (3, _PIECE):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sdxl_fixes.buckets, "_PIECE", piece)
            assert _codes(values).tolist() == np.unique(values, return_inverse=True)[1].tolist()


@given(data(), OPTIONS)
def test_computing_in_pieces_changes_nothing(data, options):
    whole = ChunkBucketBatchSampler(*data, **options, rank=None)
    expected = list(whole), whole.account(), whole.state_dict()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sdxl_fixes.buckets, "_PIECE", 3)
        pieces = ChunkBucketBatchSampler(*data, **options, rank=None)
        assert (list(pieces), pieces.account(), pieces.state_dict()) == expected


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([], []), {}, "there are no samples"),
        (([0, 1], [1]), {}, "one number per sample: expected 2, got 1"),
        (([0, 1], [1, 0]), {}, "at least 1 .* got 0 for sample 1"),
        (([0.5, 1], [1, 1]), {}, "buckets must be whole numbers"),
        (([0, 1], [[1], [1]]), {}, "chunks must be whole numbers, one per sample"),
        (([0], [1]), {"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        (([0], [1]), {"world_size": 2, "rank": 2}, r"rank must lie in \[0, 2\)"),
        (([0], [1]), {"leftovers": "lose"}, "merge, smaller, drop, got 'lose'"),
        (([0], [1]), {"repeats": [1, 2]}, "repeats must be a number, or 1 numbers"),
        (([0], [1]), {"repeats": -1}, "repeats must be"),
        (([0], [1]), {"seed": -1}, "seed must be"),
        (([0], [1]), {"seed": 2**64}, "seed must be"),
    ],
)
def test_nonsense_is_refused_in_a_sentence(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        ChunkBucketBatchSampler(*arguments, **{"batch_size": 2, **options})


def test_every_seed_of_64_bits_is_another():
    seeds = [0, 2**63, 2**63 + 1, 2**64 - 1]
    orders = {
        tuple(map(tuple, ChunkBucketBatchSampler([0] * 40, [1] * 40, batch_size=4, seed=seed)))
        for seed in seeds
    }
    assert len(orders) == len(seeds)


@pytest.mark.parametrize("options", [{"leftovers": "drop"}, {"repeats": 0}])
def test_an_epoch_without_a_batch_is_refused(options):
    with pytest.raises(ValueError, match="epoch 0 has no batch"):
        list(ChunkBucketBatchSampler([0, 1, 2], [1, 1, 1], batch_size=2, **options))


def test_steps_beyond_the_epoch_are_refused():
    sampler = ChunkBucketBatchSampler([0] * 10, [1] * 10, batch_size=2)
    with pytest.raises(ValueError, match=r"steps must lie in \[0, 5\], what this iteration has, got 6"):
        sampler.state_dict(6)
    sampler.load_state_dict(sampler.state_dict(3))
    assert len(sampler) == 2


def test_merged_counts_the_samples_whose_batch_is_longer_than_they_are():
    """By the batches themselves: one of three short prompts and a long one, one of long ones."""
    buckets, chunks = np.zeros(8, dtype=int), np.array([1, 1, 1, 2, 2, 2, 2, 2])
    sampler = ChunkBucketBatchSampler(buckets, chunks, batch_size=4, seed=1)
    longer = sum(int((chunks[batch] < chunks[batch].max()).sum()) for batch in sampler)
    assert longer == sampler.account().merged == 3
    apart = ChunkBucketBatchSampler(buckets, chunks, batch_size=4, seed=1, leftovers="smaller")
    assert apart.account().merged == 0


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_step_that_was_left_within_is_dealt_out_again(world_size):
    """rank=None: what one rank was given of it is no step."""
    options = dict(batch_size=4, seed=2, rank=None, world_size=world_size)
    whole = list(ChunkBucketBatchSampler(*facts_model(400), **options))
    sampler = ChunkBucketBatchSampler(*facts_model(400), **options)
    stopped = iter(sampler)
    taken = [next(stopped) for _ in range(world_size + 1)]
    assert taken == whole[: world_size + 1] and next(iter(sampler)) == whole[world_size]
