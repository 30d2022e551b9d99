"""python benchmarks/host_overhead.py: what the fixes cost the host per training step, in microseconds.

The made-up sd-scripts of tests/ (a convolution for a U-Net, latents 4 x 4 x 8 x 8) is run unpatched, patched
with nothing on, and patched with fixes on, in turn, in one process; a step's time is its median over the run.
Beside it stands what the same features cost upstream's own functions. On a GPU such microseconds are hidden
behind the device's work; what counts there is that no step waits for the device.
"""

import itertools
import statistics
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))
from made_up_trainer import build, run

V = (
    "--v_parameterization",
    "--zero_terminal_snr",
    "--loss_type",
    "huber",
    "--min_snr_gamma",
    "5",
    "--ip_noise_gamma",
    "0.1",
)
OURS = (
    "--min_snr_floor",
    "--stratified_timesteps",
    "--terminal_timestep_share",
    "0.3",
    "--ip_noise_gamma_random_strength",
)
CASES = {
    "unpatched": ("unpatched", ()),
    "patched, nothing on": ("module", ()),
    "unpatched, upstream's form of the features": ("unpatched", V),
    "patched, the same": ("module", V),
    "patched, all fixes of a step": ("module", (*V, *OURS)),
}


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    rounds, steps = 9, 150
    found: dict[str, list[float]] = {name: [] for name in CASES}
    with tempfile.TemporaryDirectory() as folder:
        root = build(Path(folder))
        for _ in range(rounds):
            for name, (how, flags) in CASES.items():
                run(root, "sdxl_train.py", "--max_train_steps", str(steps), *flags, how=how)
                times = torch.load(root / "out" / "times.pt")
                found[name].append(1e6 * statistics.median(b - a for a, b in itertools.pairwise(times)))
    print("| case | us per step, median of the runs | least | over unpatched |\n|---|---|---|---|")
    base = statistics.median(found["unpatched"])
    for name, values in found.items():
        middle = statistics.median(values)
        print(f"| {name} | {middle:.0f} | {min(values):.0f} | {middle - base:+.0f} |")


if __name__ == "__main__":
    main()
