"""How a base model, LoRA or diffusers folder says it is sampled: what is believed before what, and what is
wrong with it."""

import json

import pytest
from models import KINDS, model, write

from sdxl_fixes import NoiseSchedule
from sdxl_fixes.checkpoint import RECORD_KEY, Sampling, metadata, stock_config
from sdxl_fixes.cli import main
from sdxl_fixes.model_files.header import FormatError
from sdxl_fixes.model_files.model_file import ModelFile, read_sampling
from sdxl_fixes.schedulers import CLASSES

SDXL = NoiseSchedule.sdxl()
ZERO = SDXL.zero_terminal_snr()
V, V_ZERO, EPSILON_ZERO = (
    Sampling(SDXL, "v_prediction"),
    Sampling(ZERO, "v_prediction"),
    Sampling(ZERO, "epsilon"),
)
STOCK = Sampling(SDXL, "epsilon")
FLOW = Sampling(NoiseSchedule.flow(2.5), "flow_prediction")
SAYS = "modelspec.prediction_type"
UNET = "model.diffusion_model."


def record_of(sampling):
    return {RECORD_KEY: metadata(sampling.schedule, sampling.prediction_type)[RECORD_KEY]}


# markers, metadata -> what the file says
FILES = {
    "nothing": ([], None, None),
    "epsilon": ([], {SAYS: "epsilon"}, None),
    "kohya's v": ([], {SAYS: "v"}, V),
    "v with zero terminal SNR": ([], {SAYS: "v-zsnr"}, V_ZERO),
    "kohya's LoRA": ([], {SAYS: "v", "ss_zero_terminal_snr": "True", "ss_v2": "False"}, V_ZERO),
    "kohya's LoRA without": ([], {SAYS: "v", "ss_zero_terminal_snr": "False"}, V),
    "epsilon with zero terminal SNR": ([], {SAYS: "epsilon", "ss_zero_terminal_snr": "True"}, EPSILON_ZERO),
    "another architecture": ([], {"ss_v2": "True"}, None),
    "flow, no shift": ([], {SAYS: "sd3"}, None),
    "flow, recorded": ([], {SAYS: "sd3", **record_of(FLOW)}, FLOW),
    "markers": (["v_pred", "ztsnr"], None, V_ZERO),
    "markers of a U-Net": ([UNET + "v_pred"], None, V),
    "markers before metadata": (["v_pred"], {SAYS: "epsilon", "ss_zero_terminal_snr": "True"}, V),
    "a record before both": (["ztsnr"], {SAYS: "v", **record_of(FLOW)}, FLOW),
    "a record of SDXL's own": (
        ["v_pred"],
        {SAYS: "v", **record_of(Sampling(SDXL, "epsilon"))},
        Sampling(SDXL, "epsilon"),
    ),
}


@pytest.mark.parametrize("case", FILES)
@pytest.mark.parametrize("kind", ["checkpoint", "lora"])
def test_a_file_is_believed_by_record_then_markers_then_metadata(case, kind, tmp_path, capsys):
    markers, entries, expected = FILES[case]
    path = write(tmp_path / "m.safetensors", {**KINDS[kind], **{name: [0] for name in markers}}, entries)
    before = path.read_bytes()
    assert read_sampling(path) == expected
    assert path.read_bytes() == before
    if expected is not None:
        every_command_reads(path, expected, tmp_path, capsys)


def folder_of(tmp_path, config):
    folder = tmp_path / "folder"
    (folder / "scheduler").mkdir(parents=True)
    (folder / "unet").mkdir()
    model(folder / "unet" / "diffusion_pytorch_model.safetensors", "diffusers_unet")
    (folder / "scheduler" / "scheduler_config.json").write_text(
        config if isinstance(config, str) else json.dumps(config)
    )
    return folder


# as diffusers saves it: with the beta schedule that the class does not use for flow
UNIPC = {
    "_class_name": "UniPCMultistepScheduler",
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "trained_betas": None,
}
UNIPC |= {
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 2.5,
    "num_train_timesteps": 1000,
}
FOLDERS = {
    "SDXL's own": ({**SDXL.to_config("epsilon"), "timestep_spacing": "leading"}, STOCK),
    "v": (SDXL.to_config("v_prediction"), V),
    "rescaled": ({**SDXL.to_config("v_prediction"), "rescale_betas_zero_snr": True}, V_ZERO),
    "another end": (
        SDXL.with_terminal_sigma(300).to_config("epsilon"),
        Sampling(SDXL.with_terminal_sigma(300), "epsilon"),
    ),
    "flow, as diffusers saves it": (UNIPC, FLOW),
    "flow, as stamp writes it": (stock_config(FLOW), FLOW),
    "flow matching": (
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 2.5},
        FLOW,
    ),
    "diffusers' default of what is predicted": (
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        STOCK,
    ),
}


def every_command_reads(source, expected, tmp_path, capsys):
    """stamp --from, schedule --from and inspect."""
    file = model(tmp_path / "copy.safetensors")
    assert main(["stamp", str(file), "--from", str(source)]) == 0 and ModelFile.read(file).record == expected
    capsys.readouterr()
    assert main(["schedule", "--from", str(source), "--json"]) == 0
    assert NoiseSchedule.from_record(json.loads(capsys.readouterr().out)["record"]) == expected.schedule
    if source.suffix != ".json":
        assert main(["inspect", str(source), "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert said["prediction_type"] == expected.prediction_type
        assert said["terminal_sigma"] == expected.schedule.to_record()["terminal_sigma"]


def problem_of(path):
    """What is wrong with it, as every reader says it."""
    with pytest.raises(ValueError) as caught:
        read_sampling(path)
    assert not isinstance(caught.value, FormatError)
    return str(caught.value)


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_is_believed_by_its_scheduler_config(case, tmp_path, capsys):
    config, expected = FOLDERS[case]
    folder = folder_of(tmp_path, config)
    assert read_sampling(folder) == expected
    every_command_reads(folder, expected, tmp_path, capsys)
    every_command_reads(folder / "scheduler" / "scheduler_config.json", expected, tmp_path, capsys)


def test_a_folder_is_believed_by_its_unets_record_first(tmp_path, capsys):
    folder = folder_of(tmp_path, SDXL.to_config("epsilon"))
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    write(file, KINDS["diffusers_unet"], record_of(V_ZERO))
    assert read_sampling(folder) == V_ZERO
    every_command_reads(folder, V_ZERO, tmp_path, capsys)
    assert main(["stamp", str(folder), "--prediction_type", "epsilon"]) == 2
    assert "its record says v_prediction" in capsys.readouterr().err
    assert main(["stamp", str(folder)]) == 0  # the config then says what the record does
    (folder / "unet" / file.name).unlink()
    assert read_sampling(folder) == V_ZERO


def test_the_right_stamp_of_a_flow_folder_is_taken_and_a_wrong_one_refused(tmp_path, capsys):
    folder = folder_of(tmp_path, UNIPC)
    config = folder / "scheduler" / "scheduler_config.json"
    before = config.read_bytes()
    assert main(["stamp", str(folder), "--prediction_type", "v_prediction", "--zero_terminal_snr"]) == 2
    assert (
        "says flow_prediction, sigma 0.002503 to inf, shift 2.5;" in capsys.readouterr().err
        and config.read_bytes() == before
    )
    assert main(["stamp", str(folder), "--prediction_type", "flow_prediction", "--flow_shift", "2.5"]) == 0
    assert read_sampling(folder) == FLOW


def test_a_scheduler_of_flow_reads_as_flow():
    diffusers = pytest.importorskip("diffusers")
    if "use_flow_sigmas" not in diffusers.UniPCMultistepScheduler().config:
        pytest.skip("this diffusers knows no use_flow_sigmas")
    scheduler = diffusers.UniPCMultistepScheduler.from_config(UNIPC)
    assert (
        NoiseSchedule.from_scheduler(scheduler)
        == NoiseSchedule.from_config(scheduler.config)
        == NoiseSchedule.flow(2.5)
    )
    same = CLASSES["UniPCMultistepScheduler"].from_config(UNIPC)  # diffusers steps as it always did
    for each in (scheduler, same):
        each.set_timesteps(7)
    assert type(same) is type(scheduler)
    assert same.timesteps.tolist() == scheduler.timesteps.tolist()
    assert same.sigmas.tolist() == scheduler.sigmas.tolist()


def broken(changes):
    return {RECORD_KEY: json.dumps({**SDXL.to_record(), "prediction_type": "epsilon"} | changes)}


BROKEN = {
    "no JSON": ({RECORD_KEY: "{"}, "its schedule record (sdxl_fixes.schedule) is not JSON"),
    "deep": ({RECORD_KEY: "[" * 100_000}, "its schedule record (sdxl_fixes.schedule) is not JSON"),
    "a list": ({RECORD_KEY: "[1]"}, "not a schedule record"),
    "no ends": (broken({"recipe": [{"make": "linear"}]}), "step 1 of the recipe, linear, lacks beta_start"),
    "no shift": (
        broken({"recipe": [{"make": "flow"}], "prediction_type": "flow_prediction"}),
        "flow, lacks shift",
    ),
    "a list for a name": (broken({"recipe": [{"make": ["x"]}]}), 'must be an object whose "make" is one of'),
    "NaN": (broken({"betas": [0.1, float("nan")]}), "betas[1] is nan"),
    "no prediction type": (broken({"prediction_type": None}), "prediction_type is None"),
    "a schedule alone": ({RECORD_KEY: SDXL.to_json()}, "prediction_type is None: expected a name"),
    "an unknown prediction type": (broken({"prediction_type": "x"}), "unknown prediction_type 'x'"),
    "newer": (broken({"version": 2}), "update sdxl-fixes"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_record_is_a_sentence_everywhere_and_says_nothing(case, tmp_path, capsys):
    entries, sentence = BROKEN[case]
    path = model(tmp_path / "m.safetensors", metadata={**entries, SAYS: "v"})
    problem = problem_of(path)
    assert str(path) in problem and sentence in problem and "\n" not in problem
    record = tmp_path / "record.json"
    record.write_text(entries[RECORD_KEY])
    commands = [
        ["inspect", str(path)],
        ["stamp", str(path)],
        ["stamp", str(path), "--prediction_type", "epsilon"],
    ]
    for words in (
        commands
        if case in ("no JSON", "deep", "a list", "a schedule alone")
        else [*commands, ["stamp", str(path), "--from", str(record)]]
    ):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and sentence in error


@pytest.mark.parametrize("case", BROKEN)
def test_force_mends_a_broken_record(case, tmp_path, capsys):
    """As the sentence advises."""
    path = model(tmp_path / "m.safetensors", metadata=BROKEN[case][0])
    assert main(["stamp", str(path), "--prediction_type", "v_prediction", "--force"]) == 0
    assert "overruled: its record was broken" in capsys.readouterr().out
    assert read_sampling(path) == V


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1]", "holds a list"),
        ({}, "neither trained_betas nor beta_schedule"),
        ({"beta_schedule": {}, "num_train_timesteps": 3}, "unknown beta_schedule {}"),
        (
            {"trained_betas": [[0.1], [0.2, 0.3]], "num_train_timesteps": 2},
            "trained_betas must be one row of numbers",
        ),
        ({**UNIPC, "flow_shift": "2.5"}, "flow_shift is '2.5': expected a number"),
        ({**UNIPC, "flow_shift": -1}, "shift must be a positive number"),
        ({**UNIPC, "prediction_type": "epsilon"}, "use_flow_sigmas"),
        ({**UNIPC, "prediction_type": ["flow_prediction"]}, "unknown prediction_type"),
    ],
)
def test_a_broken_scheduler_config_is_a_sentence_that_names_it(config, sentence, tmp_path, capsys):
    folder = folder_of(tmp_path, config)
    file = folder / "scheduler" / "scheduler_config.json"
    problem = problem_of(folder)
    assert problem.count(str(file)) == 1 and sentence in problem and "\n" not in problem
    for words in (
        ["inspect", str(folder)],
        ["stamp", str(folder)],
        ["stamp", str(model(tmp_path / "m.safetensors")), "--from", str(folder)],
    ):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and sentence in error and str(file) in error


def test_what_cannot_be_read_is_told_from_what_is_broken(tmp_path):
    pickle, missing, empty = tmp_path / "m.ckpt", tmp_path / "nowhere", tmp_path / "folder"
    pickle.write_bytes(b"PK\x03\x04" + bytes(100))
    empty.mkdir()
    with pytest.raises(FormatError, match="never opened"):
        read_sampling(pickle)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_sampling(missing)
    assert read_sampling(empty) is None
