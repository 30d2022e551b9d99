"""examples/custom_loop.py: what it saves, and that a resumed run is the uninterrupted one."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import accelerate.accelerator
import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler
from two_processes import TWO

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
                timeout=600,
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


class Killed(Exception):
    """Stands for the end of the process."""


# what accelerate writes one after the other, and the move at the end
@pytest.mark.parametrize(
    "place", ["save_model", "save_accelerator_state", "save_custom_state", "rename"], ids=str
)
def test_a_run_killed_inside_a_checkpoint_goes_on_from_the_one_before(tmp_path, loop, monkeypatch, place):
    whole = loop(tmp_path / "whole", "--steps", "7")
    owner = os if place == "rename" else Accelerator if place == "save_model" else accelerate.accelerator
    name, calls = {"save_model": "save_state"}.get(place, place), []
    original = getattr(owner, name)

    def dies(*args, **kwargs):
        result = None if place == "rename" else original(*args, **kwargs)
        calls.append(args)
        # the second checkpoint; there are two custom states in each
        if len(calls) == (3 if place == "save_custom_state" else 2):
            raise Killed
        return original(*args, **kwargs) if place == "rename" else result

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dies)
        with pytest.raises(Killed):
            loop(tmp_path / "parts", "--steps", "7")
    resumed = loop(tmp_path / "parts", "--steps", "7", "--resume")
    assert resumed["first_step"] == 3 and resumed["losses"] == whole["losses"][3:]
    assert sorted(path.name for path in (tmp_path / "parts").glob("check*")) == [
        "checkpoint-3",
        "checkpoint-6",
    ]


def test_the_last_two_checkpoints_are_kept(tmp_path, loop):
    loop(tmp_path, "--steps", "9", "--checkpoint_every", "1")
    assert sorted(path.name for path in tmp_path.glob("check*")) == ["checkpoint-8", "checkpoint-9"]
    with pytest.raises(SystemExit, match="holds checkpoints: give --resume, or another --output_dir"):
        loop(tmp_path, "--steps", "9")


def test_resuming_on_another_schedule_or_on_nothing_is_one_sentence(tmp_path, loop, monkeypatch):
    with pytest.raises(SystemExit, match=r"--resume: .* holds no checkpoint-STEP: start without it"):
        loop(tmp_path, "--steps", "4", "--resume")
    loop(tmp_path, "--steps", "4")
    another = "trained with another prediction type or schedule"
    with pytest.raises(SystemExit, match=another):
        loop(tmp_path, "--steps", "7", "--resume", "--prediction_type", "sample")
    monkeypatch.setattr(sys.modules[__name__], "FLAGS", ("--checkpoint_every", "3", "--stratified_timesteps"))
    with pytest.raises(SystemExit, match=another):
        loop(tmp_path, "--steps", "7", "--resume", "--terminal_sigma", "100")


def test_a_batch_larger_than_the_data_is_one_sentence(tmp_path, loop):
    with pytest.raises(SystemExit, match=r"--batch_size 25: expected 1\.\.24"):
        loop(tmp_path, "--batch_size", "25")
    assert loop(tmp_path, "--batch_size", "24", "--steps", "1")["first_step"] == 0


def test_accumulated_batches_make_one_optimizer_step_and_resume(tmp_path, loop, monkeypatch):
    accumulated = ("--gradient_accumulation_steps", "2")
    steps, original = [], torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        steps.append(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    whole = loop(tmp_path / "whole", "--steps", "5", *accumulated)
    assert len(steps) == 5 == len(whole["losses"])
    loop(tmp_path / "parts", "--steps", "4", *accumulated)
    resumed = loop(tmp_path / "parts", "--steps", "5", "--resume", *accumulated)
    assert resumed["losses"] == whole["losses"][3:]
    assert loop(tmp_path / "plain", "--steps", "5")["losses"] != whole["losses"]


@pytest.mark.slow
def test_two_processes_resume_bit_for_bit_and_share_the_strata(tmp_path, loop):
    validating = ("--steps", "6", "--stable_loss_steps", "6")
    whole = loop(tmp_path / "whole", *validating, launcher=TWO)
    loop(tmp_path / "parts", "--steps", "3", launcher=TWO)
    resumed = loop(tmp_path / "parts", *validating, "--resume", launcher=TWO)
    assert resumed["losses"] == whole["losses"][3:] and resumed["validation"] == whole["validation"]
