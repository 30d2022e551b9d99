"""What is copied into UIs: the same sigmas as NoiseSchedule, no failure on any file, and an installer that
touches nothing else."""

import importlib.util
import json

import numpy as np
import pytest
from models import model, write

from sdxl_fixes import NoiseSchedule
from sdxl_fixes.checkpoint import RECORD_KEY, Sampling, metadata
from sdxl_fixes.cli import main
from sdxl_fixes.model_files.stamp import stamp_file
from sdxl_fixes.uis.install import FOLDER, STAMP, TARGETS
from sdxl_fixes.uis.verdicts import ZERO_SNR_SIGMA


@pytest.fixture(scope="module")
def reader():
    """schedule_file.py as a UI loads it: by path."""
    from importlib import resources

    path = resources.files("sdxl_fixes").joinpath("uis/nodes/schedule_file.py")
    spec = importlib.util.spec_from_file_location("schedule_file", str(path))
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["schedule_file"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


SDXL = NoiseSchedule.sdxl()
SCHEDULES = [
    SDXL,
    SDXL.zero_terminal_snr(),
    SDXL.with_terminal_sigma(300, "beta_end"),
    SDXL.with_terminal_sigma(300, "tail"),
    SDXL.with_terminal_sigma(20000, "rescale"),
    NoiseSchedule.cosine(),
    NoiseSchedule.linear(),
    NoiseSchedule.scaled_linear(num_timesteps=500),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_sigmas_equal_the_schedules_bit_for_bit(reader, schedule, tmp_path):
    path = write(
        tmp_path / "m.safetensors",
        {"x": [1]},
        {k: v for k, v in metadata(schedule, "v_prediction").items() if v},
    )
    read = reader.read_schedule(str(path))
    assert np.array_equal(reader.betas_to_sigmas(schedule.betas), schedule.sigmas)
    assert np.array_equal(read.sigmas[:-1], schedule.sigmas[:-1]) and read.prediction_type == "v_prediction"
    assert read.sigmas[-1] == (
        max(ZERO_SNR_SIGMA, 2 * schedule.sigmas[-2]) if np.isinf(schedule.sigmas[-1]) else schedule.sigmas[-1]
    )
    assert read.zero_snr == np.isinf(schedule.sigmas[-1])


@pytest.mark.parametrize("shift", [1, 3, 12])
def test_flow_is_the_papers_noise_level(reader, shift, tmp_path):
    path = write(
        tmp_path / "m.safetensors", {"x": [1]}, dict(metadata(NoiseSchedule.flow(shift), "flow_prediction"))
    )
    read, u = reader.read_schedule(str(path)), np.arange(1, 1001) / 1000
    np.testing.assert_allclose(read.sigmas, shift * u / (1 + (shift - 1) * u), rtol=1e-9)
    assert read.shift == shift and read.sigmas[-1] == 1


def test_markers_and_modelspec_are_carried(reader, tmp_path):
    for kind in ("checkpoint", "unet"):
        path = model(tmp_path / "m.safetensors", kind)
        stamp_file(path, Sampling(SDXL.zero_terminal_snr(), "v_prediction"))
        read = reader.read_schedule(str(path))
        assert read.markers == ("v_pred", "ztsnr") and read.modelspec == "v-zsnr"


def test_files_without_a_record_are_none(reader, tmp_path):
    path = tmp_path / "m.safetensors"
    assert reader.read_schedule(str(tmp_path / "nowhere")) is None
    for content in (
        b"",
        b"\x01",
        b"PK\x03\x04" + bytes(60),
        (99).to_bytes(8, "little") + b"{}",
        (2**60).to_bytes(8, "little") + b"{}",
    ):
        path.write_bytes(content)
        assert reader.read_schedule(str(path)) is None
    assert reader.read_schedule(str(model(path))) is None


RECORD = json.loads(metadata(SDXL, "epsilon")[RECORD_KEY])


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"format": "other"},
        {"prediction_type": "velocity"},
        {"prediction_type": None},
        {"betas": None},
        {"betas": []},
        {"betas": [0.1, "x"]},
        {"betas": [0.1, -0.1]},
        {"betas": [0.1, 1.5]},
        {"betas": [[0.1, 0.2]]},
        {"betas": [0.1, 10**400]},
        {"betas": [0.1, 1e-18, 0.1]},
        {"prediction_type": "flow_prediction", "recipe": None},
    ],
)
def test_a_broken_record_is_one_sentence(reader, change, tmp_path):
    path = write(tmp_path / "m.safetensors", {"x": [1]}, {RECORD_KEY: json.dumps({**RECORD, **change})})
    with pytest.raises(ValueError, match="its schedule record cannot be used") as error:
        reader.read_schedule(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "1", '{"format": 1}'])
def test_a_record_that_is_no_object_is_one_sentence(reader, text, tmp_path):
    path = write(tmp_path / "m.safetensors", {"x": [1]}, {RECORD_KEY: text})
    with pytest.raises(ValueError, match="its schedule record cannot be used"):
        reader.read_schedule(str(path))


@pytest.fixture(params=TARGETS)
def ui(request, tmp_path):
    """A folder that looks like the UI, with an addition of somebody else's."""
    target = TARGETS[request.param]
    (tmp_path / target.known_by).parent.mkdir(parents=True)
    (tmp_path / target.known_by).touch()
    (tmp_path / target.room / "others").mkdir(parents=True)
    return request.param, tmp_path, tmp_path / target.room / FOLDER


def test_install_status_remove(ui, capsys):
    name, root, folder = ui
    before = sorted(root.rglob("*"))
    assert main([name, "status", str(root)]) == 0 and capsys.readouterr().out == "not installed\n"
    for _ in range(2):  # again is the same
        assert main([name, "install", str(root)]) == 0 and "restart" in capsys.readouterr().out
    assert {str(file.relative_to(folder)) for file in folder.rglob("*.py")} == set(
        TARGETS[name].files.values()
    )
    assert main([name, "status", str(root)]) == 0 and "another" not in capsys.readouterr().out
    next(folder.rglob("*.py")).write_text("old")
    assert main([name, "status", str(root)]) == 0 and "install again" in capsys.readouterr().out
    assert main([name, "remove", str(root)]) == 0 and sorted(root.rglob("*")) == before
    assert (
        main([name, "remove", str(root)]) == 0
        and "was not installed" in capsys.readouterr().out.splitlines()[-1]
    )


def test_nothing_of_others_is_touched(ui, tmp_path, capsys):
    name, root, folder = ui
    folder.mkdir()
    (folder / "mine.py").write_text("x")
    for action in ("install", "remove", "status"):
        assert main([name, action, str(root)]) == 2 and "is not ours" in capsys.readouterr().err
    assert (folder / "mine.py").read_text() == "x" and not (folder / STAMP).exists()
    assert (
        main([name, "install", str(root / TARGETS[name].room)]) == 2
        and "is not the folder of" in capsys.readouterr().err
    )
