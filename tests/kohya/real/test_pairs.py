"""--speed with another fix by itself, one pair in each real trainer: see pairs.py, which has all. Set
SD_SCRIPTS."""

import subprocess
import sys
from pathlib import Path

import pairs
import pytest
from runs import _environment
from test_real_trainer import pytestmark  # noqa: F401

PROGRAM = Path(__file__).with_name("pairs.py")


@pytest.mark.slow
@pytest.mark.parametrize("script", pairs.CASES)
def test_an_accumulated_step_is_the_same_with_syncs_and_differs_by_rounding_with_fused(script):
    parts = ("--parts", "syncs,compile", "syncs,fused,compile")
    command = [sys.executable, str(PROGRAM), "--only", script, *parts, "--", "accumulation"]
    process = subprocess.run(command, capture_output=True, text=True, env=_environment(None), timeout=900)
    assert process.returncode == 0 and "All is as it must be." in process.stdout, process.stdout
    assert f"{script}, accumulation" in process.stdout
