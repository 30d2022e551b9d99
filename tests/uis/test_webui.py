"""The extension for Forge, reForge and A1111, against the real classes of FORGE and REFORGE (paths of
checkouts), and the attributes that A1111's samplers read. COMFYUI_PYTHON names a Python with torch if this
one is not to be used."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from models import model

from sdxl_fixes import NoiseSchedule
from sdxl_fixes.checkpoint import Sampling
from sdxl_fixes.model_files.stamp import stamp_file
from sdxl_fixes.prediction import x0_and_noise
from sdxl_fixes.uis.install import TARGETS, install
from sdxl_fixes.uis.verdicts import ZERO_SNR_SIGMA

SDXL = NoiseSchedule.sdxl()
CASES = {
    "v": Sampling(SDXL, "v_prediction"),
    "v ztsnr": Sampling(SDXL.zero_terminal_snr(), "v_prediction"),
    "eps ztsnr": Sampling(SDXL.zero_terminal_snr(), "epsilon"),
    "eps 300": Sampling(SDXL.with_terminal_sigma(300), "epsilon"),
    "v cosine": Sampling(NoiseSchedule.from_betas(NoiseSchedule.cosine().betas), "v_prediction"),
    "flow 3": Sampling(NoiseSchedule.flow(3.0), "flow_prediction"),
}
CHECKOUTS = {"forge": os.environ.get("FORGE"), "reforge": os.environ.get("REFORGE"), "a1111": "."}


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
    for case, sampling in CASES.items():
        files.append(model(folder / f"{case}.safetensors"))
        stamp_file(files[-1], sampling)
    command = [
        os.environ.get("COMFYUI_PYTHON", sys.executable),
        Path(__file__).with_name("webui_run.py"),
        ui,
        checkout,
        extension,
        *files,
    ]
    process = subprocess.run(command, capture_output=True, text=True, cwd=checkout, timeout=300)
    assert process.returncode == 0, process.stderr[-3000:]
    return ui, dict(zip(CASES, json.loads(process.stdout.partition("RESULTS")[2]), strict=True))


def expected(sampling):
    sigmas = sampling.schedule.sigmas.copy()
    if sampling.prediction_type == "flow_prediction":
        u = np.arange(1, 1001) / 1000
        return 3 * u / (1 + 2 * u)
    sigmas[-1] = ZERO_SNR_SIGMA if np.isinf(sigmas[-1]) else sigmas[-1]
    return sigmas


@pytest.mark.parametrize("case", CASES)
def test_the_table_and_the_prediction_are_the_files(results, case):
    ui, made = results[0], results[1][case]
    sampling, sigmas = CASES[case], expected(CASES[case])
    flow = sampling.prediction_type == "flow_prediction"
    if flow and ui != "forge":  # left as it was, and a sentence printed
        assert made["parameterization"] == "eps" and made["alphas_cumprod"][-1] == pytest.approx(
            SDXL.alphas_cumprod[-1], rel=1e-4
        )
        return
    if ui != "forge":
        np.testing.assert_allclose(made["alphas_cumprod"], 1 / (1 + sigmas**2), rtol=1e-5)
        assert (
            made["parameterization"] == ("v" if sampling.prediction_type == "v_prediction" else "eps")
            and made["ztsnr"] is False
        )
    if ui == "a1111":
        return
    np.testing.assert_allclose(made["sigmas"], sigmas, rtol=2e-6)
    assert made["config_ztsnr"] is False or ui == "reforge"
    assert made["timesteps"] == pytest.approx(
        [1000 * s for s in sigmas[[0, 499, 999]]] if flow else [0, 499, 999], rel=1e-5
    )
    import torch

    x, output, sigma = torch.tensor(made["x"]), torch.tensor(made["output"]), sigmas[700]
    norm = 1.0 if flow else (1 + sigma**2) ** 0.5  # these UIs hold x0 + sigma noise
    level = (1 - sigma, sigma) if flow else (1 / norm, sigma / norm)
    x0, _ = x0_and_noise(output, sampling.prediction_type, x / norm, *level)
    np.testing.assert_allclose(made["denoised"], x0, rtol=1e-3, atol=1e-3)


def test_the_next_checkpoint_finds_stock_again(results):
    if results[0] != "a1111":
        pytest.skip("Forge and reForge make a new model")
    for made in results[1].values():
        assert made["after"]["parameterization"] == "eps"
        np.testing.assert_allclose(made["after"]["alphas_cumprod"], SDXL.alphas_cumprod, rtol=1e-4)
