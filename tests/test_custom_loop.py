"""examples/custom_loop.py: what it saves, and that a resumed run is the uninterrupted one."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers import DDIMScheduler

from sdxl_fixes import NoiseSchedule

LOOP = Path(__file__).resolve().parent.parent / "examples" / "custom_loop.py"
FLAGS = (
    *("--zero_terminal_snr", "--loss_type", "huber", "--min_snr_gamma", "5", "--min_snr_floor"),
    *("--ip_noise_gamma", "0.1", "--stratified_timesteps", "--checkpoint_every", "3"),
)


@pytest.fixture
def loop(monkeypatch):
    """loop(folder, *flags) runs the example in this process and returns what it wrote; ``launcher`` starts it
    in others instead."""

    def run(folder, *flags, launcher=None):
        arguments = [str(LOOP), "--output_dir", str(folder), *FLAGS, *flags]
        if launcher is None:
            monkeypatch.setattr(sys, "argv", arguments)
            runpy.run_path(str(LOOP), run_name="__main__")
        else:
            environment = {
                **os.environ,
                "CUDA_VISIBLE_DEVICES": "",
                "OMP_NUM_THREADS": "1",
                "ACCELERATE_USE_CPU": "true",
            }
            subprocess.run(
                [sys.executable, *launcher, *arguments],
                check=True,
                capture_output=True,
                env=environment,
                timeout=300,
            )
        return json.loads((folder / "losses.json").read_text())

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return run


def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(tmp_path, loop):
    whole = loop(tmp_path / "whole", "--steps", "7")
    loop(tmp_path / "parts", "--steps", "4")  # stops one step after its checkpoint
    resumed = loop(tmp_path / "parts", "--steps", "7", "--resume")
    assert whole["first_step"] == 0 and resumed["first_step"] == 3 and len(resumed["losses"]) == 4
    assert resumed["losses"] == whole["losses"][3:]
    saved = NoiseSchedule.from_scheduler(DDIMScheduler.from_pretrained(tmp_path / "parts" / "scheduler"))
    assert saved == NoiseSchedule.sdxl().zero_terminal_snr()


def test_the_validation_loss_changes_nothing_and_a_resumed_run_has_the_same(tmp_path, loop):
    validating = ("--steps", "6", "--stable_loss_steps", "3")
    plain, validated = loop(tmp_path / "plain", "--steps", "6"), loop(tmp_path / "validated", *validating)
    assert validated["losses"] == plain["losses"] and plain["validation"] == {}
    assert (
        list(validated["validation"]) == ["3", "6"]
        and validated["validation"]["6"] < validated["validation"]["3"]
    )
    loop(tmp_path / "parts", "--steps", "4")
    assert loop(tmp_path / "parts", *validating, "--resume")["validation"] == {
        "6": validated["validation"]["6"]
    }


def test_the_validation_loss_reaches_the_tracker(tmp_path, loop):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    written = loop(tmp_path / "run", "--steps", "2", "--stable_loss_steps", "1", "--log_with", "tensorboard")[
        "validation"
    ]
    events = event_accumulator.EventAccumulator(str(tmp_path / "run" / "custom_loop")).Reload()
    logged = {str(event.step): event.value for event in events.Scalars("validation/loss")}
    assert logged == pytest.approx(written, rel=1e-6) and list(logged) == ["1", "2"]


@pytest.mark.slow
def test_two_processes_resume_bit_for_bit_and_share_the_strata(tmp_path, loop):
    two = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    validating = ("--steps", "6", "--stable_loss_steps", "6")
    whole = loop(tmp_path / "whole", *validating, launcher=two)
    loop(tmp_path / "parts", "--steps", "3", launcher=two)
    resumed = loop(tmp_path / "parts", *validating, "--resume", launcher=two)
    assert resumed["losses"] == whole["losses"][3:] and resumed["validation"] == whole["validation"]
