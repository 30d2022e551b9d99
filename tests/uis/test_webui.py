"""The extension for Forge, Forge Neo, reForge and A1111, against the real classes of FORGE, NEO and REFORGE
(paths of checkouts), and the attributes that A1111's samplers read. COMFYUI_PYTHON names a Python with torch
and the UI's requirements if this one is not to be used."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from known_network import sampled_by_diffusers
from models import model, write

from sdxl_fixes import NoiseSchedule
from sdxl_fixes.checkpoint import RECORD_KEY, Sampling
from sdxl_fixes.model_files.stamp import stamp_file
from sdxl_fixes.uis.install import TARGETS, install
from sdxl_fixes.uis.verdicts import ZERO_SNR_SIGMA, verdicts

SDXL = NoiseSchedule.sdxl()
CASES = {
    "eps 14.6": Sampling(SDXL, "epsilon"),
    "v": Sampling(SDXL, "v_prediction"),
    "v ztsnr": Sampling(SDXL.zero_terminal_snr(), "v_prediction"),
    "eps ztsnr": Sampling(SDXL.zero_terminal_snr(), "epsilon"),
    "eps 300": Sampling(SDXL.with_terminal_sigma(300), "epsilon"),
    "eps 300 rectified": Sampling(SDXL.with_terminal_sigma(300), "epsilon"),
    "v cosine": Sampling(NoiseSchedule.from_betas(NoiseSchedule.cosine().betas), "v_prediction"),
    "flow": Sampling(NoiseSchedule.flow(), "flow_prediction"),
    "flow 3": Sampling(NoiseSchedule.flow(3.0), "flow_prediction"),
    "flow 3 rectified": Sampling(NoiseSchedule.flow(3.0), "flow_prediction"),
}
REFUSED = {  # the UI then does as without the extension
    "x0": Sampling(SDXL, "sample"),
    "v 500 timesteps": Sampling(NoiseSchedule.scaled_linear(num_timesteps=500), "v_prediction"),
}
BROKEN = {"nothing": "{}", "control": json.dumps({"format": "\x1b[2J\n" * 999, "version": 1})}
CHECKOUTS = {ui: os.environ.get(ui.upper()) for ui in ("forge", "neo", "reforge")} | {"a1111": "."}


@pytest.fixture(scope="module")
def extension(tmp_path_factory):
    root = tmp_path_factory.mktemp("webui")
    (root / "modules").mkdir()
    (root / "modules" / "script_callbacks.py").touch()
    (root / "extensions").mkdir()
    install(TARGETS["webui"], root)
    return root / "extensions" / "sdxl_fixes_schedule"


@pytest.fixture(scope="module", params=CHECKOUTS)
def results(request, extension, tmp_path_factory):
    """Every case in one UI."""
    ui, checkout = request.param, CHECKOUTS[request.param]
    if checkout is None:
        pytest.skip(f"runs the real {ui}'s classes: set {ui.upper()} to a checkout")
    folder, files = tmp_path_factory.mktemp(ui), []
    for case, sampling in (CASES | REFUSED).items():
        files.append(model(folder / f"{case}.safetensors"))
        stamp_file(files[-1], sampling)
    files += [
        write(folder / f"{case}.safetensors", {"x": [1]}, {RECORD_KEY: text}) for case, text in BROKEN.items()
    ]
    command = [
        os.environ.get("COMFYUI_PYTHON", sys.executable),
        Path(__file__).with_name("webui_run.py"),
        ui,
        checkout,
        extension,
        *files,
    ]
    process = subprocess.run(command, capture_output=True, text=True, cwd=checkout, timeout=600)
    assert process.returncode == 0, process.stderr[-3000:]
    made = json.loads(process.stdout.partition("RESULTS")[2])
    return ui, dict(zip([*CASES, *REFUSED, *BROKEN], made, strict=True)), folder


def expected(sampling):
    sigmas = sampling.schedule.sigmas.copy()
    if sampling.prediction_type == "flow_prediction":
        shift, u = sampling.schedule.made.options["shift"], np.arange(1, 1001) / 1000
        return shift * u / (1 + (shift - 1) * u)  # arXiv:2403.03206 eq. 23
    sigmas[-1] = ZERO_SNR_SIGMA if np.isinf(sigmas[-1]) else sigmas[-1]
    return sigmas


def followed(ui, sampling):
    """reForge and A1111 have no way to sample flow but by hand."""
    return sampling.prediction_type != "flow_prediction" or ui in ("forge", "neo")


@pytest.mark.parametrize("case", CASES)
def test_the_table_and_the_prediction_are_the_files(results, case):
    ui, made = results[0], results[1][case]
    sampling, sigmas = CASES[case], expected(CASES[case])
    flow = sampling.prediction_type == "flow_prediction"
    if not followed(ui, sampling):
        return
    assert made["said"] == []
    if ui in ("a1111", "reforge"):
        np.testing.assert_allclose(made["alphas_cumprod"], 1 / (1 + sigmas**2), rtol=1e-5)
        assert made["parameterization"] == ("v" if sampling.prediction_type == "v_prediction" else "eps")
        assert made["ztsnr"] is False
    else:
        assert made["config_ztsnr"] is False and made["use_shift"] is False
    if ui == "a1111":
        return
    np.testing.assert_allclose(made["sigmas"], sigmas, rtol=2e-6)
    told = 1000 * sigmas[[0, 499, 999]] if flow else [0, 499, 999]
    assert made["timesteps"] == pytest.approx(told, rel=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_what_is_sampled_is_what_diffusers_samples(results, case):
    ui, made = results[0], results[1][case]
    if ui == "a1111" or not followed(ui, CASES[case]):
        pytest.skip("no flow here, and A1111's samplers need the whole web UI")
    reference = sampled_by_diffusers(CASES[case], expected(CASES[case]))
    scale = np.abs(reference).max()
    np.testing.assert_allclose(made["sampled"], reference, rtol=1e-3, atol=1e-3 * scale)
    if case not in ("eps 14.6", "flow 3 rectified"):
        assert np.abs(np.array(made["untouched"]["sampled"]) - reference).max() > 0.01 * scale


@pytest.mark.parametrize("case", [*CASES, *REFUSED, *BROKEN])
def test_what_cannot_be_followed_is_one_sentence_and_changes_nothing(results, case):
    ui, made = results[0], dict(results[1][case])
    if case in CASES and followed(ui, CASES[case]):
        pytest.skip("followed")
    (sentence,) = made.pop("said")
    assert sentence.isprintable() and len(sentence) < 1000 and f"{case}.safetensors: its" in sentence
    assert sentence.endswith("; the model is loaded as without it")
    made.pop("after", None)
    assert made.pop("untouched") == made


@pytest.mark.parametrize("case", [*CASES, *REFUSED])
def test_inspect_says_what_the_extension_does(results, case):
    ui, made, folder = results
    rows = {row.ui: row for row in verdicts(folder / f"{case}.safetensors")[2]}
    names = {"forge": "Forge", "neo": "Forge Neo"}
    said = rows[f"{names.get(ui, 'reForge or A1111')} with our extension"]
    assert said.right == (made[case]["said"] == [])
    if said.right and "sigmas" in made[case]:
        assert said.sigma_max == pytest.approx(made[case]["sigmas"][-1], rel=1e-5)


def test_the_next_checkpoint_finds_stock_again(results):
    if results[0] != "a1111":
        pytest.skip("Forge and reForge make a new model")
    for case in CASES:
        made = results[1][case]
        assert made["after"]["parameterization"] == "eps"
        np.testing.assert_allclose(made["after"]["alphas_cumprod"], SDXL.alphas_cumprod, rtol=1e-4)
