"""What a training resumes from: broken records are one sentence, and every pair of settings goes on where it
should, by a model of its own."""

import argparse
import dataclasses
import json
import random

import numpy as np
import pytest
import torch

from sdxl_fixes import NoiseSchedule, TimestepSampler
from sdxl_fixes.checkpoint import Sampling
from sdxl_fixes.errors import FixError
from sdxl_fixes.flags import TrainingFlags
from sdxl_fixes.trainers.fixes import Fix
from sdxl_fixes.trainers.run import Trainer, prepare
from sdxl_fixes.trainers.session import Session
from sdxl_fixes.trainers.stable_loss import StableLoss
from sdxl_fixes.trainers.states import RECORD, load_state, save_state

TRAINER = Trainer("somebody/some-trainer", "--v", {"timesteps": Fix()})


def session():
    made = Session("some trainer")
    flags = TrainingFlags(stratified_timesteps=True)
    trained = Sampling(NoiseSchedule.sdxl(), "epsilon")
    made.run = prepare(TRAINER, argparse.Namespace(seed=1), frozenset(["timesteps"]), {}, flags, trained)
    return made


def upstream(accelerator, folder):
    return "upstream"


@pytest.fixture
def saved(tmp_path):
    """A state's folder, and what its record holds."""
    assert save_state(session(), upstream, None, str(tmp_path)) == "upstream"
    return tmp_path, json.loads((tmp_path / RECORD).read_text(encoding="utf-8"))


def test_a_whole_state_is_resumed(saved):
    made = session()
    made.run.timesteps.draw(3)
    assert load_state(made, upstream, None, str(saved[0])) == "upstream"
    assert made.run.timesteps.state_dict() == saved[1]["timesteps"]


class Full:
    """An average that finds the disk full."""

    def save(self, folder):
        raise OSError("no space left on device")


def full_disk(accelerator, folder):
    raise OSError("no space left on device")


@pytest.mark.parametrize(("state", "average"), [(full_disk, None), (upstream, Full())])
def test_a_state_that_was_not_finished_has_no_record_be_it_over_a_whole_one(saved, state, average):
    """The record is taken away first and written last: what has one is whole."""
    made = session()
    made.run = dataclasses.replace(made.run, ema=average)
    with pytest.raises(OSError, match="no space left"):
        save_state(made, state, None, str(saved[0]))
    assert not (saved[0] / RECORD).exists()


@pytest.mark.parametrize(
    "broken",
    [
        lambda record: b"",
        lambda record: b"{",
        lambda record: b"\xff\xfe",
        lambda record: b"[" * 100_000,
        lambda record: b"[]",
        lambda record: b"null",
        lambda record: b"{}",
        lambda record: {**record, "schedule": None},
        lambda record: {**record, "schedule": {"format": "sdxl_fixes.schedule"}},
        lambda record: {**record, "timesteps": []},
        lambda record: {**record, "timesteps": {}},
        lambda record: {**record, "timesteps": {**record["timesteps"], "drawn": "many"}},
        lambda record: {**record, "timesteps": {**record["timesteps"], "accumulation": 0}},
        lambda record: {**record, "timesteps": {**record["timesteps"], "drawn": 1, "accumulation": 2}},
        lambda record: {**record, "timesteps": {**record["timesteps"], "seed": -1}},
    ],
)
def test_a_broken_record_is_one_sentence(saved, broken):
    folder, record = saved
    content = broken(record)
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    (folder / RECORD).write_bytes(content)
    with pytest.raises(FixError) as error:
        load_state(session(), upstream, None, str(folder))
    said = str(error.value)
    assert said.startswith(f"cannot resume from {folder / RECORD} (") and "\n" not in said
    assert said.endswith("): resume from another state") and len(said) < len(str(folder)) + 400


def test_timesteps_resume_under_any_settings_where_a_model_says():
    """The steps done are those that were finished, under any accumulation and world size; the draws after
    them are a new sampler's that has done as many."""
    rng = random.Random(0)
    for _ in range(300):
        seed, draws = rng.randrange(2**64), rng.randrange(9)
        old, new = ((rng.choice([1, 2, 3]), rng.choice([1, 2, 3])) for _ in range(2))
        made = [
            TimestepSampler(
                NoiseSchedule.sdxl(), stratified=True, seed=seed, accumulation=accumulation, world_size=world
            )
            for accumulation, world in (old, new, new)
        ]
        for _ in range(draws):
            made[0].draw(2)
        if draws % old[0] and new != old:
            with pytest.raises(ValueError, match="saved inside an optimizer step"):
                made[1].load_state_dict(made[0].state_dict())
            continue
        made[1].load_state_dict(json.loads(json.dumps(made[0].state_dict())))
        for _ in range(draws // old[0] * new[0] + draws % old[0]):
            made[2].draw(2)
        for _ in range(4):
            assert torch.equal(made[1].draw(2), made[2].draw(2))


def test_the_stable_loss_resumes_under_any_settings_where_a_model_says(tmp_path):
    """A rank goes on with what it kept if it keeps as many now; else with what it sees, until it is
    complete."""
    rng = random.Random(0)
    for number in range(60):
        folder, distinct = tmp_path / str(number), rng.randint(1, 6)
        settings = [(rng.randint(1, 6), rng.randint(1, 3)) for _ in range(2)]
        rank = rng.randrange(min(processes for _, processes in settings))
        kept, wanted_then, cut = [], 0, rng.randint(1, 30)
        for turn, (images, processes) in enumerate(settings):
            made = StableLoss(None, 1, images, rank, processes, folder, resumed=bool(turn))
            wanted = len(np.array_split(np.arange(images), processes)[rank])
            again = bool(turn and kept is not None and processes == settings[0][1] and wanted == wanted_then)
            assert made.wanted == wanted and made.found == again
            seen = 0
            for k in range(cut if not turn else 40):
                latents = torch.full((1, 1, 2, 2), float(k % distinct))
                made.noised(latents)
                made.called(torch.nn.Identity(), latents, torch.zeros(1))
                seen += 1
            found = [float(latents[0, 0, 0]) for latents, _ in made.kept]
            if again:
                assert found == kept
            else:
                fresh = list(range(min(wanted, distinct, seen)))
                assert found == fresh
                done = not wanted or len(fresh) == wanted or seen >= 4 * wanted
                assert made.complete == done
                kept, wanted_then = (found if done and wanted else None), wanted
