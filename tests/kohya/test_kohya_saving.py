"""The kohya adapter and what the base model says: a warning where the flags train otherwise, and the truth in
what is saved."""

import argparse
import json

import pytest
from models import model

from sdxl_fixes import NoiseSchedule
from sdxl_fixes.checkpoint import Sampling, read_record
from sdxl_fixes.kohya import checkpoint
from sdxl_fixes.kohya import run as kohya_run
from sdxl_fixes.kohya.run import SESSION
from sdxl_fixes.model_files.header import ROOM_KEY
from sdxl_fixes.model_files.stamp import stamp_file

SDXL = NoiseSchedule.sdxl()


@pytest.fixture
def start(capsys):
    """Start a run as the trainer's arguments do; returns it and what was printed."""

    def run(base, **flags):
        SESSION.begin(kohya_run.start(argparse.Namespace(pretrained_model_name_or_path=str(base), **flags)))
        return SESSION.run, capsys.readouterr().err

    yield run
    SESSION.reset()


V_ZERO = dict(v_parameterization=True, zero_terminal_snr=True)
# what the base says -> the advice that a run without flags gets
ADVICE = {
    "v": (Sampling(SDXL, "v_prediction"), "give --v_parameterization\n"),
    "v ztsnr": (
        Sampling(SDXL.zero_terminal_snr(), "v_prediction"),
        "give --v_parameterization --zero_terminal_snr\n",
    ),
    "eps 300": (
        Sampling(SDXL.with_terminal_sigma(300, "beta_end"), "epsilon"),
        "give --terminal_sigma 300 --terminal_sigma_method beta_end\n",
    ),
    "v tail": (
        Sampling(SDXL.with_terminal_sigma(100, "tail", 700), "v_prediction"),
        "--terminal_sigma 100 --terminal_sigma_method tail --terminal_sigma_start 700\n",
    ),
    "flow": (
        Sampling(NoiseSchedule.flow(2.5), "flow_prediction"),
        "give --prediction_type flow_prediction --flow_shift 2.5\n",
    ),
    "a flow of its own": (Sampling(SDXL, "flow_prediction"), "no flags of this trainer train on"),
    "cosine": (Sampling(NoiseSchedule.cosine(), "epsilon"), "no flags of this trainer train on"),
}


@pytest.mark.parametrize("case", ADVICE)
def test_a_base_that_says_otherwise_is_warned_about(case, start, tmp_path):
    sampling, advice = ADVICE[case]
    base = model(tmp_path / "base.safetensors")
    stamp_file(base, sampling)
    run, said = start(base)
    assert "WARNING" in said and advice in said and str(sampling) in said
    spec = checkpoint.model_spec(lambda: {"modelspec.title": "x"})
    assert (
        read_record(spec) == Sampling(SDXL, "epsilon") == Sampling(run.schedule, run.prediction_type)
    )  # what was trained
    assert spec["modelspec.prediction_type"] == "epsilon" and spec["modelspec.title"] == "x"


def test_the_advice_is_followed_without_a_warning_and_carries_record_and_markers(start, tmp_path):
    base = model(tmp_path / "base.safetensors")
    stamp_file(base, Sampling(SDXL.zero_terminal_snr(), "v_prediction"))
    _, said = start(base, **V_ZERO)
    assert "WARNING" not in said
    saved = {}
    checkpoint.save_file(lambda tensors, filename: saved.update(tensors), {"w": 1}, "x")
    assert set(saved) == {"w", "v_pred", "ztsnr"}


def test_markers_alone_and_folders_speak_too(start, tmp_path):
    from models import KINDS, write

    base = write(tmp_path / "m.safetensors", {**KINDS["checkpoint"], "v_pred": [0], "ztsnr": [0]})
    assert (
        "give --v_parameterization --zero_terminal_snr" in start(base)[1]
        and "WARNING" not in start(base, **V_ZERO)[1]
    )
    (tmp_path / "folder" / "scheduler").mkdir(parents=True)
    config = tmp_path / "folder" / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(SDXL.to_config("v_prediction")))
    assert "give --v_parameterization\n" in start(config.parent.parent)[1]


@pytest.mark.parametrize(
    "base", ["stabilityai/stable-diffusion-xl-base-1.0", "plain", "stock folder", "pickle", "broken"]
)
def test_a_base_that_says_nothing_changes_nothing(base, start, tmp_path):
    path = tmp_path / "m.safetensors"
    if base == "plain":
        base = model(path)
    elif base == "stock folder":
        (tmp_path / "scheduler").mkdir()
        (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(SDXL.to_config("epsilon")))
        base = tmp_path
    elif base in ("pickle", "broken"):
        path.write_bytes(b"PK\x03\x04" if base == "pickle" else b"{}")
        base = path
    run, said = start(base)
    assert "WARNING" not in said and not run.on
    assert checkpoint.model_spec(lambda: {"a": "b"}) == {"a": "b"}


def test_saves_leave_room_for_a_later_stamp(start, tmp_path):
    start(tmp_path / "nowhere", v_parameterization=True)
    spec = checkpoint.model_spec(dict)
    assert 16_384 <= len(spec[ROOM_KEY]) <= 65_536 and not spec[ROOM_KEY].strip()


def test_a_base_that_says_v_by_modelspec_alone_and_a_lora_that_is_continued_are_noticed(start, tmp_path):
    from models import KINDS, write

    spoken = write(tmp_path / "spec.safetensors", KINDS["checkpoint"], {"modelspec.prediction_type": "v"})
    run, said = start(spoken)
    assert "give --v_parameterization\n" in said and "saving" in run.on
    lora = write(tmp_path / "lora.safetensors", KINDS["lora"])
    stamp_file(lora, Sampling(SDXL.zero_terminal_snr(), "v_prediction"))
    run, said = start("plain", network_weights=str(lora))
    assert (
        "lora.safetensors says that it is sampled as v_prediction" in said
        and "give --v_parameterization --zero_terminal_snr" in said
    )
    assert "WARNING" not in start("plain", network_weights=str(lora), **V_ZERO)[1]


def test_a_base_whose_record_is_broken_is_named(start, tmp_path):
    from models import KINDS, write

    base = write(
        tmp_path / "b.safetensors",
        KINDS["checkpoint"],
        {"sdxl_fixes.schedule": '{"format": "sdxl_fixes.schedule"}'},
    )
    assert "b.safetensors" in start(base)[1] and "what it says of its schedule is not known" in start(base)[1]


def test_the_trainers_word_of_modelspec_goes_where_it_would_be_wrong(start, tmp_path):
    """v-prediction on a schedule that "v" does not mean."""
    start(model(tmp_path / "base.safetensors"), v_parameterization=True, terminal_sigma=300.0)
    spec = checkpoint.model_spec(lambda: {"modelspec.prediction_type": "v", "modelspec.title": "kept"})
    assert "modelspec.prediction_type" not in spec and spec["modelspec.title"] == "kept"
