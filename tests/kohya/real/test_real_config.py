"""--config_file as the real sd-scripts reads it, with our check behind it. Set SD_SCRIPTS to run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import checkouts
import pytest

HERE = Path(__file__).resolve().parent
pytestmark = [
    pytest.mark.kohya,
    pytest.mark.skipif(not checkouts.named(), reason=checkouts.SKIP),
]

FITS = """
[model]
max_token_length = 75
noise_offset_type = "Original"
[ours]
terminal_sigma = "300"
terminal_timestep_share = "0.3"
chunk_layout = "77n"
stratified_timesteps = true
zero_terminal_sr = true
[loss]
huber_c = "0.2"
min_snr_gamma = 5
max_timestep = 900.0
"""
INFINITE = "terminal_sigma = inf\n"
REFUSED = {
    'stratified_timesteps = "false"': "--stratified_timesteps: expected true or false, without quotes, "
    "got 'false'",
    'v_parameterization = "true"': "--v_parameterization: expected true or false, without quotes, got 'true'",
    'loss_type = "hubber"': "--loss_type: expected one of l1, l2, huber, smooth_l1, got 'hubber'",
    "terminal_sigma = true": "--terminal_sigma: expected a number, got True",
    'max_token_length = "long"': "--max_token_length: expected a whole number, got 'long'",
}


def test_the_real_reader_takes_what_the_command_line_would_and_refuses_the_rest(tmp_path):
    files = [tmp_path / f"{number}.toml" for number in range(2 + len(REFUSED))]
    for file, text in zip(files, (FITS, INFINITE, *REFUSED), strict=True):
        file.write_text(text)
    command = [sys.executable, str(HERE / "parse_config.py"), *map(str, files)]
    process = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert process.returncode == 0, process.stderr[-3000:]
    fits, infinite, *refused = json.loads(process.stdout.splitlines()[-1])
    values = {
        "terminal_sigma": 300.0,
        "terminal_timestep_share": 0.3,
        "chunk_layout": "77n",
        "stratified_timesteps": True,
    }
    values |= {
        "huber_c": 0.2,
        "min_snr_gamma": 5,
        "max_token_length": 75,
        "max_timestep": 900,
        "zero_terminal_snr": False,
    }
    assert {name: fits[name] for name in values} == values and infinite["terminal_sigma"] == float("inf")
    for said, file, sentence in zip(refused, files[2:], REFUSED.values(), strict=True):
        assert said == f"--config_file {file}: {sentence}: correct it, or leave the flag out"
    warnings = [line for line in process.stderr.splitlines() if "sdxl-fixes: WARNING" in line]
    assert (
        len(warnings) == 1
        and "no flag 'zero_terminal_sr'" in warnings[0]
        and ("did you mean zero_terminal_snr?") in warnings[0]
    )


def test_the_trainer_ends_with_the_sentence_and_status_2(tmp_path):
    (tmp_path / "my.toml").write_text('stratified_timesteps = "false"\n')
    script = checkouts.first() / "sdxl_train.py"
    command = [sys.executable, "-m", "sdxl_fixes.kohya", str(script), "--config_file", "my.toml"]
    process = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert process.returncode == 2 and "Traceback" not in process.stderr
    assert process.stderr.splitlines()[-1].startswith(
        "sdxl-fixes: --config_file my.toml: --stratified_timesteps: expected true or false"
    )
