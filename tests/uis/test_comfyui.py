"""What the real ComfyUI makes of our files, with and without the node. Set COMFYUI to a checkout (and
COMFYUI_PYTHON to a Python that has its requirements, if this one has not); a full-size SDXL checkpoint is
loaded, sparse, with its weights left out."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from known_network import sampled_by_diffusers
from models import KINDS, PREFIXED, write

from sdxl_fixes import NoiseSchedule
from sdxl_fixes.checkpoint import RECORD_KEY, Sampling, read_record
from sdxl_fixes.model_files.header import read_header
from sdxl_fixes.model_files.stamp import stamp_file
from sdxl_fixes.uis.install import TARGETS, install
from sdxl_fixes.uis.verdicts import ZERO_SNR_SIGMA, verdicts

CHECKOUT = os.environ.get("COMFYUI")
pytestmark = pytest.mark.skipif(
    CHECKOUT is None,
    reason="runs the real ComfyUI: set COMFYUI=path/to/ComfyUI (and COMFYUI_PYTHON to a Python with its "
    "requirements)",
)
SDXL = NoiseSchedule.sdxl()
CASES = {
    "eps 14.6": Sampling(SDXL, "epsilon"),
    "v": Sampling(SDXL, "v_prediction"),
    "v ztsnr": Sampling(SDXL.zero_terminal_snr(), "v_prediction"),
    "eps ztsnr": Sampling(SDXL.zero_terminal_snr(), "epsilon"),
    "eps 300": Sampling(SDXL.with_terminal_sigma(300), "epsilon"),
    "v 300 tail": Sampling(SDXL.with_terminal_sigma(300, "tail"), "v_prediction"),
    "v cosine betas": Sampling(NoiseSchedule.from_betas(NoiseSchedule.cosine().betas), "v_prediction"),
    "x0 100": Sampling(SDXL.with_terminal_sigma(100), "sample"),
    "v 500 timesteps": Sampling(NoiseSchedule.scaled_linear(num_timesteps=500), "v_prediction"),
    "flow": Sampling(NoiseSchedule.flow(), "flow_prediction"),
    "flow shift 3": Sampling(NoiseSchedule.flow(3.0), "flow_prediction"),
}
HOSTILE = {
    "deep": "[" * 9999,
    "control": json.dumps({"format": "\x1b[2J\r\n" * 9999, "version": 1}),
    "float": json.dumps({"format": RECORD_KEY, "version": 1, "betas": [1e-18] * 9}),
}
# what ComfyUI alone can know: prediction, sigma_max
ALONE = {"v": ("v_prediction", SDXL.terminal_sigma), "v ztsnr": ("v_prediction", ZERO_SNR_SIGMA)}
CLASSES = {"EPS": "epsilon", "V_PREDICTION": "v_prediction", "X0": "sample", "CONST": "flow_prediction"}


def run(folder, *words):
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    script = Path(__file__).with_name("comfyui_run.py")
    process = subprocess.run(
        [python, script, CHECKOUT, folder, *words], capture_output=True, text=True, cwd=CHECKOUT, timeout=900
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return process


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Every case, loaded every way, by one start of ComfyUI: (file, loader, node, then) -> what it made of
    it."""
    folder = tmp_path_factory.mktemp("comfyui")
    run(folder)
    keys = json.loads((folder / "keys.json").read_text())
    (folder / "comfy").mkdir()
    (
        folder / "comfy" / "model_sampling.py"
    ).touch()  # what install knows ComfyUI by: the checkout itself is not touched
    (folder / "custom_nodes").mkdir()
    install(TARGETS["comfyui"], folder)
    unet = {name: shape for name, shape in keys.items() if name.startswith("model.diffusion_model.")}
    bare = {name.removeprefix("model.diffusion_model."): shape for name, shape in unet.items()}
    cases = []
    for case, sampling in CASES.items():
        file = write(folder / f"{case}.safetensors", keys)
        stamp_file(file, sampling)
        assert file.stat().st_size > 6.9e9 and file.stat().st_blocks * 512 < 1e7
        cases += [
            {"file": file.name, "loader": loader, "node": node}
            for loader in ("checkpoint", "unet")
            for node in (False, True)
        ]
        cases.append({"file": file.name, "loader": "checkpoint", "node": True, "save": True, "then": "save"})
        cases.append({"file": file.name, "loader": "checkpoint", "node": True, "then": "lora", "save": True})
        cases += [
            {"file": file.name, "loader": loader, "node": True, "then": then}
            for loader in ("checkpoint", "unet")
            for then in ("reload", "dynamic")
        ]
    for kind, shapes in (("unet", unet), ("bare_unet", bare)):
        file = write(folder / f"{kind}.safetensors", shapes)
        stamp_file(file, CASES["v ztsnr"])
        cases += [
            {"file": file.name, "loader": loader, "node": node}
            for loader in ("checkpoint", "unet")
            for node in (False, True)
        ]
    lora = write(folder / "lora.safetensors", KINDS["lora"])
    stamp_file(lora, CASES["v 300 tail"])
    write(folder / "plain.safetensors", keys)
    write(
        folder / "broken.safetensors", keys, {RECORD_KEY: '{"format": "sdxl_fixes.schedule", "version": 1}'}
    )
    for file in ("plain.safetensors", "broken.safetensors"):
        cases += [{"file": file, "loader": "checkpoint", "node": node} for node in (False, True)]
    for file in HOSTILE:
        write(folder / f"{file}.safetensors", keys, {RECORD_KEY: HOSTILE[file]})
        cases.append({"file": f"{file}.safetensors", "loader": "checkpoint", "node": True})
    cases.append({"file": "eps 300.safetensors", "loader": "nothing", "node": True})
    for then in ("discrete", "sd3", "from file loras/lora.safetensors"):
        cases.append(
            {"file": "eps 300.safetensors", "loader": "checkpoint", "node": True, "then": then, "save": True}
        )
    (folder / "cases.json").write_text(json.dumps(cases))
    process = run(folder)
    (folder / "stderr.txt").write_text(process.stderr, encoding="utf-8")
    text = process.stdout.partition("RESULTS")[2]
    (folder / "results.json").write_text(text)
    found = json.loads(text)
    return folder, {
        (made["file"], made["loader"], made["node"], made.get("then", "")): made for made in found
    }


def predicts(made):
    return next(CLASSES[name] for name in made["classes"] if name in CLASSES)


def expected(sampling):
    """The table that is to be sampled."""
    sigmas = sampling.schedule.sigmas.copy()
    if sampling.prediction_type == "flow_prediction":
        shift, u = sampling.schedule.made.options["shift"], np.arange(1, 1001) / 1000
        return shift * u / (1 + (shift - 1) * u)  # arXiv:2403.03206 eq. 23
    sigmas[-1] = ZERO_SNR_SIGMA if np.isinf(sigmas[-1]) else sigmas[-1]
    return sigmas


@pytest.mark.parametrize("then", ["", "lora", "reload", "dynamic"])
@pytest.mark.parametrize("loader", ["checkpoint", "unet"])
@pytest.mark.parametrize("case", CASES)
def test_with_the_node_every_schedule_is_sampled(results, case, loader, then):
    """Also with a LoRA, when ComfyUI loads the file once more, and with dynamic VRAM."""
    key = (f"{case}.safetensors", loader, True, then)
    if (then, loader) == ("lora", "unet") or "sigmas" not in results[1][key]:
        pytest.skip("the same as with the other loader, or this ComfyUI loads a file only once")
    made, sampling = results[1][key], CASES[case]
    assert predicts(made) == sampling.prediction_type
    sigmas, last = expected(sampling), len(sampling.schedule) - 1
    if sampling.prediction_type == "flow_prediction":
        assert made["first_timestep"] == pytest.approx(1000)
        assert made["middle_timestep"] == pytest.approx(1000 * sigmas[499], rel=1e-5)
    else:
        assert made["first_timestep"] == last and made["middle_timestep"] == 499
        halfway = np.exp(np.interp(last / 2, np.arange(last + 1), np.log(sigmas)))
        assert made["percent_0.5"] == pytest.approx(halfway, rel=1e-4)
    np.testing.assert_allclose(made["sigmas"], sigmas, rtol=2e-6)
    assert made["first_step"] == pytest.approx(sigmas[last], rel=1e-5)
    if sampling.prediction_type != "sample":  # which diffusers' Euler does not know
        reference = sampled_by_diffusers(sampling, sigmas)
        scale = np.abs(reference).max()
        np.testing.assert_allclose(made["sampled"], reference, rtol=1e-3, atol=1e-3 * scale)


def test_a_checkpoint_that_is_loaded_for_its_other_parts(results):
    assert "sigmas" not in results[1]["eps 300.safetensors", "nothing", True, ""]


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_record_is_one_sentence_in_the_console(results, case):
    folder, made = results
    plain = dict(made["plain.safetensors", "checkpoint", True, ""])
    assert {**made[f"{case}.safetensors", "checkpoint", True, ""], "file": ""} == {**plain, "file": ""}
    text = (folder / "stderr.txt").read_text(encoding="utf-8")
    said = [line for line in text.splitlines() if f"{case}.safetensors: its schedule record" in line]
    assert len(said) == 1 and said[0].endswith("; the model is loaded as without it")
    assert "\x1b" not in text and "Traceback" not in text


@pytest.mark.parametrize("case", CASES)
def test_without_the_node_comfyui_knows_v_and_v_with_zero_snr(results, case):
    made = results[1][f"{case}.safetensors", "checkpoint", False, ""]
    prediction, sigma_max = ALONE.get(case, ("epsilon", SDXL.terminal_sigma))
    assert predicts(made) == prediction and made["sigmas"][-1] == pytest.approx(sigma_max, rel=1e-5)
    made = results[1][f"{case}.safetensors", "unet", False, ""]
    assert predicts(made) == "epsilon" and made["sigmas"][-1] == pytest.approx(SDXL.terminal_sigma, rel=1e-5)


@pytest.mark.parametrize("kind", ["unet", "bare_unet"])
@pytest.mark.parametrize("loader", ["checkpoint", "unet"])
@pytest.mark.parametrize("node", [False, True])
def test_u_nets_alone(results, kind, loader, node):
    made = results[1][f"{kind}.safetensors", loader, node, ""]
    assert predicts(made) == "v_prediction" and made["sigmas"][-1] == pytest.approx(ZERO_SNR_SIGMA, rel=1e-5)


def test_inspect_says_what_comfyui_does(results):
    folder, made = results
    columns = {
        ("checkpoint", False): "ComfyUI, Load Checkpoint",
        ("unet", False): "ComfyUI, Load Diffusion Model",
    }
    columns |= {("checkpoint", True): "ComfyUI with our node", ("unet", True): "ComfyUI with our node"}
    checked = 0
    unreadable = {f"{name}.safetensors" for name in ("broken", *HOSTILE)}
    for file in sorted({key[0] for key in made} - unreadable):
        rows = {row.ui: row for row in verdicts(folder / file)[2]}
        for (loader, node), ui in columns.items():
            if (file, loader, node, "") in made:
                result = made[file, loader, node, ""]
                assert rows[ui].sampling.prediction_type == predicts(result)
                assert rows[ui].sigma_max == pytest.approx(result["sigmas"][-1], rel=1e-5)
                checked += 1
    assert checked >= 4 * len(CASES)


@pytest.mark.parametrize("file", ["plain.safetensors", "broken.safetensors"])
def test_without_a_usable_record_nothing_changes(results, file):
    without, with_node = (results[1][file, "checkpoint", node, ""] for node in (False, True))
    assert {**without, "node": True} == with_node


def test_a_later_sampling_node_wins(results):
    made = results[1]["eps 300.safetensors", "checkpoint", True, "discrete"]
    assert predicts(made) == "v_prediction" and made["sigmas"][-1] == pytest.approx(
        SDXL.terminal_sigma, rel=1e-5
    )
    assert RECORD_KEY not in made["saved"]["metadata"]  # what is saved is no longer what the record says
    made = results[1]["eps 300.safetensors", "checkpoint", True, "sd3"]
    assert predicts(made) == "flow_prediction" and made["sigmas"][-1] == 1


def test_the_explicit_node_takes_any_file(results):
    made = results[1]["eps 300.safetensors", "checkpoint", True, "from file loras/lora.safetensors"]
    assert predicts(made) == "v_prediction" and made["sigmas"][-1] == pytest.approx(300, rel=1e-5)
    assert read_record(made["saved"]["metadata"]) == CASES["v 300 tail"]


@pytest.mark.parametrize("then", ["save", "lora"])
@pytest.mark.parametrize("case", CASES)
def test_save_checkpoint_keeps_record_and_markers(results, case, then):
    saved, source = (
        results[1][f"{case}.safetensors", "checkpoint", True, then]["saved"],
        read_header(results[0] / f"{case}.safetensors"),
    )
    assert read_record(saved["metadata"]) == CASES[case]
    assert saved["metadata"].get("modelspec.prediction_type") == source.metadata.get(
        "modelspec.prediction_type"
    )
    assert saved["names"] == sorted({"v_pred", "ztsnr"} & set(source.tensors))


def test_the_stand_ins_elsewhere_have_real_names(results):
    keys = json.loads((results[0] / "keys.json").read_text())
    assert len(keys) == 2515 and all(keys[name] == shape for name, shape in PREFIXED.items())
