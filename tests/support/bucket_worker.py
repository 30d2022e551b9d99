"""bucket_worker.py FOLDER RUN RANK WORLD_SIZE BATCH_SIZE: one rank of a training that test_bucket_resume.py
kills at any moment.

Every step is: log the batch, wait for the other ranks, and rank 0 saves the sampler's state. A run begins
from the last state. One that is to be killed waits for that before its end, should the killer come late; the
last one leaves without Python's finalization, as two_processes.py says.
"""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch.distributed as dist

from sdxl_fixes.buckets import ChunkBucketBatchSampler

LAST = 2
folder, run, rank, world_size, batch_size = Path(sys.argv[1]), *map(int, sys.argv[2:])
data = np.load(folder / "data.npz")
sampler = ChunkBucketBatchSampler(
    data["buckets"],
    data["chunks"],
    batch_size=batch_size,
    rank=rank,
    world_size=world_size,
    seed=8,
    aligned=run == 1,
)
if (folder / "state.json").exists():
    sampler.load_state_dict(json.loads((folder / "state.json").read_text())["sampler"])
dist.init_process_group("gloo", init_method=f"file://{folder}/store-{run}", rank=rank, world_size=world_size)
with open(folder / f"log-{run}-{rank}.jsonl", "w", buffering=1) as log:
    for step, batch in enumerate(sampler):
        log.write(json.dumps(batch) + "\n")
        dist.barrier()
        if rank == 0:
            partial = folder / "state.part"
            partial.write_text(
                json.dumps({"run": run, "steps": step + 1, "sampler": sampler.state_dict(step + 1)})
            )
            os.replace(partial, folder / "state.json")
        time.sleep(0.002 if run == LAST or step < 100 else 600)
dist.destroy_process_group()
os._exit(0)
