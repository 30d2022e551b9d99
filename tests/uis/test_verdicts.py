"""What inspect says of file names, of markers and of scheduler configs, against what diffusers' own classes
do with them."""

import inspect
import json
import math

import diffusers
import numpy as np
import pytest
import torch
from loading import SAMPLINGS, stamped_folder
from models import KINDS, model, write

from sdxl_fixes import NoiseSchedule
from sdxl_fixes.checkpoint import Sampling, overruled, samplable, sampling_of_config, stock_config
from sdxl_fixes.cli import main
from sdxl_fixes.uis.verdicts import CASES, UIS, verdicts

SDXL = NoiseSchedule.sdxl()
LONG = SDXL.with_terminal_sigma(300)
# SD.Next 058a7f0c asks the file's name; a flower is no flow
NAMES = {
    "bigASPv25": "flow_prediction",
    "NoobAI-RF-v0.2": "flow_prediction",
    "my-Flow-mix": "flow_prediction",
    "wildFlowerXL": "epsilon",
    "overflowers": "epsilon",
    "noobai-v-pred-1.0": "v_prediction",
    "NoobAI_vPred": "v_prediction",
    "mix_v_pred": "v_prediction",
    "mix": "epsilon",
}


def row(path, ui):
    return {row.ui: row for row in verdicts(path)[2]}[ui]


@pytest.mark.parametrize("name", NAMES)
def test_sd_next_goes_by_the_name_of_the_file(name, tmp_path):
    said = row(model(tmp_path / f"{name}.safetensors"), "SD.Next")
    assert said.sampling.prediction_type == NAMES[name]
    assert said.sampling.zero_terminal == (NAMES[name] == "v_prediction")


@pytest.mark.parametrize(
    ("place", "flow"),
    [("Rectified-Flow/m", True), ("models/myRECTIFIEDmix", True), ("rectify/m", False), ("flow/m", False)],
)
def test_forge_neo_goes_by_the_word_rectified_anywhere_in_the_path(place, flow, tmp_path, monkeypatch):
    path = tmp_path / f"{place}.safetensors"
    path.parent.mkdir()
    model(path)
    assert (row(path, "Forge Neo").sampling.prediction_type == "flow_prediction") == flow
    assert row(path, "Forge").sampling == Sampling(SDXL, "epsilon")
    monkeypatch.chdir(path.parent)  # the whole path, however it was typed
    relative = row(type(path)(path.name), "Forge Neo")
    assert (relative.sampling.prediction_type == "flow_prediction") == flow


def test_markers_are_believed_where_there_is_no_record(tmp_path):
    path = write(tmp_path / "noob.safetensors", {**KINDS["checkpoint"], "v_pred": [0], "ztsnr": [0]})
    assert verdicts(path)[1] == Sampling(SDXL.zero_terminal_snr(), "v_prediction")
    assert row(path, "ComfyUI, Load Checkpoint").right and row(path, "InvokeAI").right is False


def test_every_ui_has_a_row_for_a_file_and_for_a_folder(tmp_path):
    assert [row.ui for row in verdicts(model(tmp_path / "m.safetensors"))[2]] == list(UIS)
    assert [row.ui for row in verdicts(folder_of(tmp_path, LONG.to_config("epsilon")))[2]] == list(UIS)


CLASSES = (
    *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DDIMScheduler"),
    *("DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "HeunDiscreteScheduler"),
)
# beside the schedule
CHANGES = [
    {},
    {"sigma_max": 2.0},
    {"sigma_min": 1.0},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_karras_sigmas": True, "sigma_max": 2.0},
    {"use_karras_sigmas": True, "sigma_min": 1.0},
    {"timestep_type": "continuous"},
    {"clip_sample": True},
    {"clip_sample": None},
    {"thresholding": True},
    {"timestep_spacing": "leading"},
    {"timestep_spacing": "linspace"},
    {"timestep_spacing": None},
    {"rescale_betas_zero_snr": True, "trained_betas": None, "beta_schedule": "scaled_linear"}
    | {"beta_start": 0.00085, "beta_end": 0.012},
]


def case(name, changes):
    """A config of the class; None in ``changes`` means that it does not say it. None if the class has not got
    the key."""
    known = inspect.signature(getattr(diffusers, name).__init__).parameters
    if not all(key in known or key == "rescale_betas_zero_snr" for key in changes):
        return None
    config = LONG.to_config("v_prediction")
    if "rescale_betas_zero_snr" not in known:
        del config["rescale_betas_zero_snr"]
    if "clip_sample" in known:
        config["clip_sample"] = False
    config |= {"_class_name": name} | changes
    return {k: v for k, v in config.items() if not (v is None and changes.get(k, 0) is None)}


def samples_what_it_says(config):
    """Whether diffusers' class begins at the last timestep and sigma that the config describes, ends low,
    tells the network trained timesteps, and returns the image of a network that knows it: 2 everywhere."""
    says = sampling_of_config(config).schedule
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    scheduler.set_timesteps(10)
    terminal = min(says.terminal_sigma, 4096.0)
    if hasattr(scheduler, "sigmas"):
        sigmas = [float(sigma) for sigma in scheduler.sigmas]
        if not math.isclose(sigmas[0], terminal, rel_tol=0.01) or sigmas[-2] > 0.5:
            return False
    if float(scheduler.timesteps[0]) < len(says) - 2:
        return False
    alpha, sigma, told = says.levels()
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * float(
        scheduler.init_noise_sigma
    )
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(x, t)
        a, s = np.interp(float(t), told, alpha), np.interp(float(t), told, sigma)
        noise = (given - a * 2) / s
        x = scheduler.step(a * noise - s * 2, t, x).prev_sample
    return abs(float(x.mean()) - 2) < 0.1


@pytest.mark.parametrize("name", CLASSES)
def test_what_overrules_a_config_is_what_diffusers_samples_otherwise(name):
    found = set()
    for changes in CHANGES:
        config = case(name, changes)
        if config is not None:
            right = samples_what_it_says(config)
            assert right == (not overruled(config)), (changes, overruled(config))
            found.add(right)
    assert found == {True, False}


def test_leading_is_stocks_own_on_stocks_own_betas():
    config = {**SDXL.to_config("epsilon"), "timestep_spacing": "leading"}
    assert overruled(config) == []


def test_flow_sigmas_set_trained_betas_aside():
    if "use_flow_sigmas" not in inspect.signature(diffusers.UniPCMultistepScheduler.__init__).parameters:
        pytest.skip("this diffusers knows no use_flow_sigmas")
    config = {**NoiseSchedule.from_betas(NoiseSchedule.flow(7).betas).to_config("flow_prediction")}
    config |= {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True, "flow_shift": 2.5}
    made = diffusers.UniPCMultistepScheduler.from_config(config)
    made.set_timesteps(10)
    _, says, _ = sampling_of_config(config).schedule.levels(flow=True)
    _, other, _ = NoiseSchedule.flow(2.5).levels(flow=True)
    assert float(made.sigmas[5]) == pytest.approx(other[499], abs=1e-3)
    assert abs(float(made.sigmas[5]) - says[499]) > 0.1
    assert overruled(config) == ["use_flow_sigmas sets its trained_betas aside"]


def test_diffusers_sdxl_pipeline_runs_with_no_flow_matching_class():
    assert not hasattr(diffusers.FlowMatchEulerDiscreteScheduler(), "init_noise_sigma")
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    assert "SDXL pipeline" in overruled(config)[0]


def folder_of(tmp_path, config):
    folder = tmp_path / "folder"
    for name in ("unet", "scheduler"):
        (folder / name).mkdir(parents=True)
    model(folder / "unet" / "diffusion_pytorch_model.safetensors", "diffusers_unet")
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    return folder


def test_inspect_says_what_overrules_a_folder_and_the_command_that_mends_it(tmp_path, capsys):
    config = case("EulerDiscreteScheduler", {"timestep_type": "continuous"})
    folder = folder_of(tmp_path, config)
    for ui in ("diffusers", "SD.Next", "InvokeAI"):
        said = row(folder, ui)
        assert said.right is False and said.missing.startswith("timestep_type continuous")
        assert said.missing.endswith(f"sdxl-fixes stamp {folder}")
    assert main(["inspect", str(folder)]) == 0
    assert "WRONG: timestep_type continuous tells the network 0.25 log sigma" in capsys.readouterr().out
    del config["timestep_type"]
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    assert row(folder, "diffusers").right


def test_zero_terminal_snr_ends_where_diffusers_class_ends_it(tmp_path):
    config = {"_class_name": "EulerDiscreteScheduler", **SDXL.to_config("v_prediction")}
    config["rescale_betas_zero_snr"] = True
    folder, made = folder_of(tmp_path, config), diffusers.EulerDiscreteScheduler.from_config(config)
    made.set_timesteps(10)
    for ui in ("diffusers", "SD.Next", "InvokeAI"):
        assert row(folder, ui).right
        assert row(folder, ui).sigma_max == pytest.approx(float(made.sigmas[0]), rel=1e-3)


@pytest.mark.parametrize("case", SAMPLINGS)
def test_diffusers_samples_a_stamped_folder_as_the_row_says(case, tmp_path):
    folder, truth = stamped_folder(tmp_path / "folder", SAMPLINGS[case]), SAMPLINGS[case]
    said = row(folder, "diffusers")
    config = diffusers.EulerDiscreteScheduler.load_config(folder / "scheduler")
    made = getattr(diffusers, config["_class_name"]).from_pretrained(folder / "scheduler")
    assert (said.right, said.sampling, made.config.prediction_type) == (True, truth, truth.prediction_type)
    if case == "flow":
        if "use_flow_sigmas" not in made.config:
            pytest.skip("this diffusers knows no use_flow_sigmas")
        made.set_timesteps(10)
        levels = truth.schedule.levels(flow=True)[1]
        assert float(made.sigmas[5]) == pytest.approx(levels[int(made.timesteps[5])], abs=2e-3)
        return
    np.testing.assert_allclose(made.alphas_cumprod, samplable(truth.schedule).alphas_cumprod, atol=1e-6)
    assert CASES == UIS["diffusers"].ran_folder == tuple(SAMPLINGS)


def test_a_flow_matching_config_that_tells_no_shift_has_its_classs_own():
    made = diffusers.FlowMatchEulerDiscreteScheduler()
    says = sampling_of_config({"_class_name": "FlowMatchEulerDiscreteScheduler"})
    assert says == Sampling(NoiseSchedule.flow(made.config.shift), "flow_prediction")
    assert not says.zero_terminal and Sampling(SDXL.zero_terminal_snr(), "sample").zero_terminal


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("base", [None, *CHANGES], ids=str)
def test_what_the_one_writer_writes_is_overruled_by_nothing(kind, base):
    """Whatever the old config said."""
    for schedule in (SDXL, LONG, SDXL.with_terminal_sigma(300, "tail")):
        for name in ("EulerDiscreteScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler"):
            old = None if base is None else {**SDXL.to_config("epsilon"), "_class_name": name} | base
            written = stock_config(Sampling(schedule, kind), old)
            assert overruled(written) == [] and sampling_of_config(written).schedule == schedule


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({"prediction_type": "v"}, Sampling(SDXL, "v_prediction")),
        ({"modelspec.prediction_type": " ", "prediction_type": "v"}, Sampling(SDXL, "v_prediction")),
        ({"modelspec.prediction_type": "epsilon", "prediction_type": "v"}, Sampling(SDXL, "epsilon")),
        ({"modelspec.prediction_type": "x0"}, Sampling(SDXL, "sample")),
    ],
)
def test_swarmui_takes_the_word_without_its_prefix_too(entries, expected, tmp_path):
    """T2IModelHandler.cs of 062407c7: the first of the two that is not blank."""
    path = model(tmp_path / "m.safetensors", metadata=entries)
    assert row(path, "SwarmUI").sampling == expected
