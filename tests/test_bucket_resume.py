"""kill -9 at any batch and resume on another number of ranks and another batch size; and the sampler inside
accelerate."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import accelerate
import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from two_processes import TWO

from sdxl_fixes.buckets import ChunkBucketBatchSampler

HERE = Path(__file__).resolve().parent
RUNS = ((2, 4), (3, 4), (1, 6))  # ranks, batch size


def start(folder, run):
    world_size, batch_size = RUNS[run]
    words = [sys.executable, str(HERE / "support" / "bucket_worker.py"), str(folder), str(run)]
    return [
        subprocess.Popen([*words, str(rank), str(world_size), str(batch_size)]) for rank in range(world_size)
    ]


def test_killed_and_resumed_on_other_ranks_sees_every_sample_once(tmp_path):
    rng = np.random.default_rng(0)
    samples = 3000
    np.savez(
        tmp_path / "data.npz",
        buckets=rng.integers(0, 7, samples),
        chunks=rng.choice([1, 2, 3], samples, p=[0.6, 0.35, 0.05]),
    )
    seen, state = Counter(), tmp_path / "state.json"
    for run in range(len(RUNS)):
        processes, last = start(tmp_path, run), run == len(RUNS) - 1
        if not last:
            while not (state.exists() and json.loads(state.read_text())["run"] == run):
                assert not any(process.poll() for process in processes)
                time.sleep(0.005)
            time.sleep(random.Random(run).uniform(0.02, 0.15))
            for kill in (signal.SIGSTOP, signal.SIGKILL):  # none sees that another is gone
                for process in processes:
                    process.send_signal(kill)
        codes = [process.wait(600) for process in processes]
        assert codes == [0 if last else -signal.SIGKILL] * len(processes)
        saved = json.loads(state.read_text())
        assert saved["run"] == run and saved["steps"] > 0
        for rank in range(RUNS[run][0]):
            lines = (tmp_path / f"log-{run}-{rank}.jsonl").read_text().splitlines()
            for line in lines[
                : saved["steps"]
            ]:  # what the last save has; anything after it was trained by nobody
                seen.update(json.loads(line))
    # the aligned run has three ranks: a rest of one or two samples of a bucket
    # (of seven) may be seen by each of them
    assert samples <= seen.total() == saved["sampler"]["samples"] <= samples + 7 * (RUNS[1][0] - 1)
    assert max(seen.values()) <= RUNS[1][0]
    assert set(seen) == set(range(samples)) and len(saved["sampler"]["segments"]) == len(RUNS)


def data(samples=500):
    rng = np.random.default_rng(1)
    return rng.integers(0, 5, samples), rng.integers(1, 4, samples)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_accelerates_shards_lose_mix_and_repeat_nothing(world_size):
    buckets, chunks = data()
    sampler = ChunkBucketBatchSampler(buckets, chunks, batch_size=8, rank=None, world_size=world_size)
    shards = [BatchSamplerShard(sampler, world_size, rank, even_batches=False) for rank in range(world_size)]
    assert not hasattr(sampler, "batch_size") and len(sampler) % world_size == 0
    epochs = []
    for shard in shards:
        sampler.set_epoch(0)
        epochs.append(list(shard))
    assert len({len(epoch) for epoch in epochs}) == 1
    assert Counter(i for epoch in epochs for batch in epoch for i in batch) == Counter(range(500))
    assert all(len(set(buckets[batch])) == 1 for epoch in epochs for batch in epoch)
    own = [
        list(ChunkBucketBatchSampler(buckets, chunks, batch_size=8, rank=r, world_size=world_size))
        for r in range(world_size)
    ]
    assert epochs == own


class Trained:
    """A sampler and how many of its batches are trained, for accelerate's checkpoints."""

    def __init__(self, sampler):
        self.sampler, self.steps = sampler, 0

    def state_dict(self):
        return self.sampler.state_dict(self.steps)

    def load_state_dict(self, state):
        self.sampler.load_state_dict(state)


@pytest.mark.parametrize("stateful", [False, True])
def test_accelerates_checkpoints_hold_what_was_trained_not_what_was_fetched(tmp_path, stateful, monkeypatch):
    """accelerate's loader is a batch ahead: its own stateful one knows, otherwise the loop must count."""
    if not hasattr(getattr(accelerate, "DataLoaderConfiguration", None), "use_stateful_dataloader"):
        pytest.skip("accelerate before 0.34 has no stateful loader")
    if stateful:
        pytest.importorskip("torchdata.stateful_dataloader", reason="pip install torchdata to run")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    expected = list(ChunkBucketBatchSampler(*data(), batch_size=8))

    def prepare():
        config = accelerate.DataLoaderConfiguration(even_batches=False, use_stateful_dataloader=stateful)
        accelerator = accelerate.Accelerator(dataloader_config=config)
        sampler = ChunkBucketBatchSampler(*data(), batch_size=8, rank=None)
        trained = Trained(sampler)
        if not stateful:
            accelerator.register_for_checkpointing(trained)
        loader = torch.utils.data.DataLoader(torch.arange(500), batch_sampler=sampler)
        return accelerator, trained, accelerator.prepare(loader)

    accelerator, trained, loader = prepare()
    for batch, wanted in zip(loader, expected[:7], strict=False):
        assert batch.tolist() == wanted
        trained.steps += 1
        if trained.steps == 7:
            break
    accelerator.save_state(str(tmp_path))
    assert trained.sampler.state_dict()["segments"][0]["batches"] == 8
    accelerator, trained, loader = prepare()
    accelerator.load_state(str(tmp_path))
    assert [batch.tolist() for batch in loader] == expected[7:]


PREPARED = """
import sys, json, torch, numpy as np
from accelerate import Accelerator, DataLoaderConfiguration
from sdxl_fixes.buckets import ChunkBucketBatchSampler
accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(even_batches=False))
rng = np.random.default_rng(1)
sampler = ChunkBucketBatchSampler(rng.integers(0, 5, 500), rng.integers(1, 4, 500), batch_size=8, rank=None,
                                  world_size=accelerator.num_processes)
loader = accelerator.prepare(torch.utils.data.DataLoader(torch.arange(500), batch_sampler=sampler))
if sys.argv[1]:
    sampler.load_state_dict(json.loads(sys.argv[1]))
    loader.iteration = sampler.epoch  # accelerate counts its own epochs
steps, seen, states = int(sys.argv[2]), [], []
for step, batch in enumerate(loader):
    seen.append(batch.tolist())
    if step + 1 == steps:
        break
out = {"seen": seen, "state": sampler.state_dict(len(seen)), "rank": accelerator.process_index}
print("OUT" + json.dumps(out) + "\\n", end="", flush=True)
"""


def prepared(folder, world_size, state="", steps=0):
    script = folder / "prepared.py"
    script.write_text(PREPARED)
    words = [sys.executable, *(TWO if world_size > 1 else ())]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "1",
    }
    process = subprocess.run(
        [*words, str(script), state, str(steps)],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment,
        cwd=folder,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    return sorted(
        (json.loads(part.splitlines()[0]) for part in process.stdout.split("OUT")[1:]),
        key=lambda out: out["rank"],
    )


@pytest.mark.slow
def test_prepared_by_accelerate_on_two_processes_and_resumed_on_one(tmp_path):
    first = prepared(tmp_path, 2, steps=9)
    assert len(first) == 2 and first[0]["state"] == first[1]["state"]
    rest = prepared(tmp_path, 1, json.dumps(first[0]["state"]))
    seen = Counter(i for out in (*first, *rest) for batch in out["seen"] for i in batch)
    assert [len(out["seen"]) for out in first] == [9, 9] and seen == Counter(range(500))
