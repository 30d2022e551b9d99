"""What inspect says of InvokeAI, against the real InvokeAI: set INVOKEAI to a checkout, and INVOKEAI_PYTHON
to a Python that has its requirements, if this one has not."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from loading import SAMPLINGS, stamped_checkpoint, stamped_folder, stamped_lora

from sdxl_fixes.uis.verdicts import CASES, UIS, verdicts

CHECKOUT = os.environ.get("INVOKEAI")
pytestmark = pytest.mark.skipif(
    CHECKOUT is None,
    reason="runs the real InvokeAI: set INVOKEAI=path/to/InvokeAI (and INVOKEAI_PYTHON to a Python with its "
    "requirements)",
)
# of its menu: by a class of diffusers that knows rescale_betas_zero_snr, and by one that does not
RESCALING = ("euler", "euler_a", "dpmpp_2m_k", "dpmpp_3m_k", "unipc", "ddim", "ddpm", "lcm", "tcd")
FINITE = ("heun", "lms", "kdpm_2", "kdpm_2_a", "deis", "pndm", "dpmpp_2s", "dpmpp_sde", "er_sde")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Path -> what InvokeAI made of it, by one start."""
    folder = tmp_path_factory.mktemp("invokeai")
    makers = (stamped_checkpoint, ".safetensors"), (stamped_lora, "-lora.safetensors"), (stamped_folder, "")
    paths = {}
    for i, (case, sampling) in enumerate(SAMPLINGS.items()):
        for make, suffix in makers:
            paths[case, make] = make(folder / f"{i}{suffix}", sampling)
    command = [
        os.environ.get("INVOKEAI_PYTHON", sys.executable),
        Path(__file__).with_name("invokeai_run.py"),
        CHECKOUT,
        ",".join(RESCALING + FINITE),
        *paths.values(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    return {key: (path, said[str(path)]) for key, path in paths.items()}


def row(path):
    return {row.ui: row for row in verdicts(path)[2]}["InvokeAI"]


def test_the_row_says_that_this_is_run():
    assert UIS["InvokeAI"].ran == UIS["InvokeAI"].ran_folder == CASES == tuple(SAMPLINGS)


@pytest.mark.parametrize("case", SAMPLINGS)
def test_a_checkpoint_is_taken_for_what_the_row_says(case, results):
    path, said = results[case, stamped_checkpoint]
    assert (said["base"], said["type"]) == ("sdxl", "main")
    assert said["predicts"] == row(path).sampling.prediction_type


@pytest.mark.parametrize("case", SAMPLINGS)
def test_a_lora_stays_a_lora(case, results):
    path, said = results[case, stamped_lora]
    assert said == {"base": "sdxl", "type": "lora", "predicts": None} and row(path).sampling is None


@pytest.mark.parametrize("case", SAMPLINGS)
def test_a_folder_is_sampled_as_the_row_says(case, results):
    path, said = results[case, stamped_folder]
    truth = row(path).sampling
    if truth is None:
        assert case == "flow" and said["type"] == "unknown"
        return
    assert (said["base"], said["predicts"], row(path).right) == ("sdxl", truth.prediction_type, True)
    for name, made in said["samplers"].items():
        assert (made["prediction_type"], made["first"]) == (truth.prediction_type, 999), name
        end = made["alphas_cumprod"][-1]
        if truth.zero_terminal and name in FINITE:
            assert math.sqrt((1 - end) / end) == pytest.approx(14.6146, rel=1e-4), name
        else:
            np.testing.assert_allclose(made["alphas_cumprod"], truth.schedule.alphas_cumprod, atol=2e-6)
            assert not truth.zero_terminal or end <= 2**-24
