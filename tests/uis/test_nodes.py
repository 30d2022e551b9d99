"""What is copied into UIs: the same sigmas as NoiseSchedule, no failure on any file, and an installer that
touches nothing else."""

import configparser
import importlib.util
import io
import json
import sys
import time
import warnings
from contextlib import nullcontext
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from models import model, write

from sdxl_fixes import NoiseSchedule
from sdxl_fixes.checkpoint import RECORD_KEY, Sampling, metadata
from sdxl_fixes.cli import main
from sdxl_fixes.model_files.stamp import stamp_file
from sdxl_fixes.uis.install import FOLDER, STAMP, TARGETS
from sdxl_fixes.uis.verdicts import ZERO_SNR_SIGMA
from sdxl_fixes.version import __version__

tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")


@pytest.fixture(scope="module")
def reader():
    """schedule_file.py as a UI loads it: by path."""
    path = resources.files("sdxl_fixes").joinpath("uis/nodes/schedule_file.py")
    spec = importlib.util.spec_from_file_location("schedule_file", str(path))
    module = importlib.util.module_from_spec(spec)
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


def test_whole_numbers_are_numbers(reader):
    read = reader.parse_record(json.dumps({**RECORD, "betas": [0.1, 0.5, 1]}))
    np.testing.assert_allclose(read.sigmas, [1 / 3, (11 / 9) ** 0.5, ZERO_SNR_SIGMA])


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
    ],
)
def test_a_broken_record_is_one_sentence(reader, change, tmp_path):
    path = write(tmp_path / "m.safetensors", {"x": [1]}, {RECORD_KEY: json.dumps({**RECORD, **change})})
    with pytest.raises(reader.RecordError) as error:
        reader.read_schedule(str(path))
    assert_one_sentence(reader.why(error.value))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "1", '{"format": 1}'])
def test_a_record_that_is_no_object_is_one_sentence(reader, text, tmp_path):
    path = write(tmp_path / "m.safetensors", {"x": [1]}, {RECORD_KEY: text})
    with pytest.raises(reader.RecordError) as error:
        reader.read_schedule(str(path))
    assert_one_sentence(reader.why(error.value))


def assert_one_sentence(text):
    assert text.startswith("its schedule record cannot be ") and text.isprintable() and len(text) < 500


DEEP = "[" * 100_000 + "]" * 100_000
HOSTILE = {
    "deep": DEEP,
    "deep betas": json.dumps({**RECORD, "betas": 0}).replace('"betas": 0', f'"betas": {DEEP}'),
    "nested betas": json.dumps({**RECORD, "betas": [[[[0.1]]]]}),
    "a million digits": json.dumps({**RECORD, "version": 0}).replace(": 0", f": {'9' * 1_000_000}", 1),
    "digits in betas": json.dumps({**RECORD, "betas": 0}).replace(": 0", f": [{'9' * 1_000_000}, 0.1]", 1),
    "too long": json.dumps({**RECORD, "more": "x" * 5_000_000}),
    "nan": json.dumps({**RECORD, "betas": [float("nan")] * 1000}),
    "strings": json.dumps({**RECORD, "betas": ["0.001", "0.002"]}),
    "truths": json.dumps({**RECORD, "betas": [True, True]}),
    "an object": json.dumps({**RECORD, "betas": {"0": 0.1}}),
    "a list as version": json.dumps({**RECORD, "version": ["\x1b[31m\r\n" * 99_999]}),
    "controls": json.dumps({**RECORD, "prediction_type": "\x1b[2J\x07\n\u202e" * 99_999}),
    "half a pair": json.dumps({**RECORD, "prediction_type": "\ud800"}),
    "not ASCII": json.dumps({**RECORD, "more": "\ud800"}, ensure_ascii=False),
    "not text": RECORD,
    "beyond float32": json.dumps({**RECORD, "betas": [0.1] * 10 + [1 - 1e-15] * 6}),
    "starts at zero": json.dumps({**RECORD, "betas": [1e-18, 0.1]}),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_record_is_one_sentence_at_once(reader, case, tmp_path):
    path, started = (
        write(tmp_path / "m.safetensors", {"x": [1]}, {RECORD_KEY: HOSTILE[case]}),
        time.process_time(),
    )
    with warnings.catch_warnings(action="error") if sys.version_info >= (3, 11) else nullcontext():
        with pytest.raises(reader.RecordError) as error:
            reader.read_schedule(str(path))
    assert_one_sentence(reader.why(error.value))
    assert time.process_time() - started < 5


@pytest.mark.parametrize("content", [DEEP, "{" + DEEP, f'{{"x": {"9" * 1_000_000}}}', '"\xff', "\x00" * 99])
def test_a_hostile_header_is_no_record(reader, content, tmp_path):
    raw, path = content.encode("latin-1") + RECORD_KEY.encode(), tmp_path / "m.safetensors"
    for claimed in (len(raw), 100_000_000, 2**63):
        path.write_bytes(claimed.to_bytes(8, "little") + raw)
        assert reader.read_schedule(str(path)) is None


def test_what_a_file_says_cannot_reach_a_console_raw(reader, monkeypatch):
    said = reader.printable("a\x1b[31m\r\nb\u202e\ud800\u732b" * 999)
    assert said.isprintable() and len(said) <= 210 and "\u732b" in said and "\\x1b" in said
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))
    assert reader.printable("\u732b\u00e9") == "\\u732b\u00e9"


def test_a_modelspec_that_cannot_be_saved_again_is_left_out(reader, tmp_path):
    for text in ("\ud800", "v\n", 1):
        meta = {RECORD_KEY: json.dumps(RECORD), "modelspec.prediction_type": text}
        read = reader.read_schedule(str(write(tmp_path / "m.safetensors", {"x": [1]}, meta)))
        assert read.modelspec is None and read.prediction_type == "epsilon"


class Sampler:
    """What ComfyUI's and Forge's objects do, in float64; with one thing wrong."""

    def __init__(self, schedule, wrong):
        self.schedule, self.wrong = schedule, wrong
        self.sigmas = torch.from_numpy(schedule.sigmas) * (1.001 if wrong == "table" else 1)

    def timestep(self, sigma):
        if self.schedule.flow:
            return sigma * (1 if self.wrong == "timestep" else 1000)
        return (self.sigmas - sigma).abs().argmin(0, keepdim=True) + (self.wrong == "timestep")

    def calculate_input(self, sigma, x):
        return x if self.schedule.flow != (self.wrong == "input") else x / (1 + sigma**2) ** 0.5

    def calculate_denoised(self, sigma, output, x):
        v = self.schedule.prediction_type == "v_prediction"
        if v != (self.wrong == "image"):
            return x / (1 + sigma**2) - output * sigma / (1 + sigma**2) ** 0.5
        return x - sigma * output

    def noise_scaling(self, sigma, noise, image):
        flow = self.schedule.flow != (self.wrong == "noise")
        return image * (1 - sigma if flow else 1) + sigma * noise


@pytest.mark.parametrize("wrong", ["", "table", "timestep", "input", "image", "noise"])
@pytest.mark.parametrize(
    "schedule, predicts",
    [
        (SDXL.with_terminal_sigma(300), "epsilon"),
        (SDXL.zero_terminal_snr(), "v_prediction"),
        (NoiseSchedule.flow(3), "flow_prediction"),
    ],
)
def test_an_object_that_would_not_sample_by_the_record_is_refused(reader, schedule, predicts, wrong):
    read = reader.parse_record(dict(metadata(schedule, predicts))[RECORD_KEY])
    if not wrong:
        return reader.check(Sampler(read, wrong), read)
    with pytest.raises(reader.RecordError, match="would not be the record's"):
        reader.check(Sampler(read, wrong), read)


def lay_out(target, root, layout):
    """A folder that looks like the UI's, with an addition of somebody else's; and what the user names."""
    code = {"portable": root / target.portable, "apart": root / "elsewhere"}.get(layout, root)
    (code / target.known_by).parent.mkdir(parents=True)
    (code / target.known_by).touch()
    home = root if layout == "apart" else code
    for name in (f"{target.room}/others", *(target.beside[:1] if layout == "apart" else ())):
        (home / name).mkdir(parents=True)
    return home / target.room if layout == "room" else root, home / target.room / FOLDER


LAYOUTS = ("code", "portable", "apart", "room")


@pytest.fixture(params=[(name, layout) for name in TARGETS for layout in LAYOUTS], ids="-".join)
def ui(request, tmp_path):
    """The UI's name, what the user names, and where the node or extension must lie."""
    name, layout = request.param
    return name, *lay_out(TARGETS[name], tmp_path, layout)


def test_install_status_remove(ui, capsys):
    name, root, folder = ui
    before = sorted(folder.parent.rglob("*"))
    assert main([name, "status", str(root)]) == 0 and capsys.readouterr().out == "not installed\n"
    for _ in range(2):  # again is the same
        assert main([name, "install", str(root)]) == 0 and "restart" in capsys.readouterr().out
    assert {str(file.relative_to(folder)) for file in folder.rglob("*.*")} == {
        STAMP,
        *TARGETS[name].files.values(),
    }
    next(folder.rglob("*.py")).with_name("__pycache__").mkdir()
    assert main([name, "status", str(root)]) == 0 and "another" not in capsys.readouterr().out
    next(folder.rglob("*.py")).write_text("old")
    assert main([name, "status", str(root)]) == 0 and "install again" in capsys.readouterr().out
    assert main([name, "remove", str(root)]) == 0 and sorted(folder.parent.rglob("*")) == before
    assert (
        main([name, "remove", str(root)]) == 0
        and "was not installed" in capsys.readouterr().out.splitlines()[-1]
    )


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_of_others_is_touched(name, tmp_path, capsys):
    root, folder = lay_out(TARGETS[name], tmp_path, "code")
    folder.mkdir()
    (folder / "mine.py").write_text("x")
    for action in ("install", "remove", "status"):
        assert main([name, action, str(root)]) == 2 and "is not ours" in capsys.readouterr().err
    assert (folder / "mine.py").read_text() == "x" and not (folder / STAMP).exists()
    (folder / "mine.py").rename(folder.parent / "mine.py")
    folder.rmdir()
    (folder.parent / "others" / STAMP).touch()
    folder.symlink_to(folder.parent / "others")
    assert main([name, "install", str(root)]) == 2 and "is not ours" in capsys.readouterr().err
    folder.unlink()
    assert main([name, "install", str(root)]) == 0
    (folder / "notes\n.txt").write_text("x")
    capsys.readouterr()
    for action in ("install", "remove", "status"):
        assert main([name, action, str(root)]) == 2
        assert "holds notes\\n.txt, which is not ours: move it away first\n" in capsys.readouterr().err
    assert (folder / "notes\n.txt").read_text() == "x"


@pytest.mark.parametrize("name", TARGETS)
def test_another_folder_is_told_what_was_expected(name, tmp_path, capsys):
    target = TARGETS[name]
    folders = [tmp_path, tmp_path / target.room, tmp_path / "nowhere"]
    if name == "webui":
        (tmp_path / target.room).mkdir()  # other programs have extensions, too
    for folder in folders:
        for action in ("install", "remove", "status"):
            assert main([name, action, str(folder)]) == 2
            said = capsys.readouterr().err
            assert "is not the folder of" in said and target.known_by in said and target.apart in said
    assert not list(tmp_path.rglob(FOLDER))


def test_the_nodes_metadata_are_this_packages():
    """As ComfyUI's registry wants them (docs.comfy.org/registry/specifications)."""
    text = resources.files("sdxl_fixes").joinpath("uis/nodes/comfyui/pyproject.toml").read_text("utf-8")
    project, comfy = (said := tomllib.loads(text))["project"], said["tool"]["comfy"]
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parents[2] / "setup.cfg", encoding="utf-8")
    assert project["name"] == setup["metadata"]["name"] and project["version"] == __version__
    assert project["license"] == {"text": setup["metadata"]["license_expression"]}
    assert project["requires-python"] == setup["options"]["python_requires"]
    assert project["dependencies"] == [] and 0 < len(comfy["DisplayName"]) < 100
    assert "isolation" not in comfy  # in a process of its own it could replace nothing of comfy.sd
    gaps = {"PublisherId": comfy, "Repository": project.get("urls", {})}
    for name, where in gaps.items():  # nobody has registered: a comment says so, and nothing is made up
        assert name not in where and name in text
