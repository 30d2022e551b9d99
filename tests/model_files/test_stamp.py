"""What a stamp writes, where, and what it refuses; and what inspect says of it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from models import KINDS, model, write

from sdxl_fixes import NoiseSchedule
from sdxl_fixes.checkpoint import RECORD_KEY, STAND_IN_SIGMA, Sampling, metadata, read_record
from sdxl_fixes.cli import main
from sdxl_fixes.model_files.header import ROOM_KEY, read_header
from sdxl_fixes.model_files.model_file import ModelFile
from sdxl_fixes.model_files.stamp import stamp_file
from sdxl_fixes.model_files.write import data_hash
from sdxl_fixes.uis.verdicts import UIS, verdicts

SDXL = NoiseSchedule.sdxl()
ZERO = SDXL.zero_terminal_snr()
UNET = "model.diffusion_model."
# flags -> the schedule, top-level markers, modelspec.prediction_type
CASES = {
    "eps 14.6": (["--prediction_type", "epsilon"], SDXL, [], "epsilon"),
    "v": (["--prediction_type", "v_prediction"], SDXL, ["v_pred"], "v"),
    "v ztsnr": (
        ["--prediction_type", "v_prediction", "--zero_terminal_snr"],
        ZERO,
        ["v_pred", "ztsnr"],
        "v-zsnr",
    ),
    "eps ztsnr": (["--prediction_type", "epsilon", "--zero_terminal_snr"], ZERO, ["ztsnr"], None),
    "eps 300": (
        ["--prediction_type", "epsilon", "--terminal_sigma", "300"],
        SDXL.with_terminal_sigma(300),
        [],
        None,
    ),
    "v tail": (
        ["--prediction_type", "v_prediction", "--terminal_sigma", "300", "--terminal_sigma_method", "tail"],
        SDXL.with_terminal_sigma(300, "tail"),
        [],
        None,
    ),
    "v cosine": (["--prediction_type", "v_prediction", "--base", "cosine"], NoiseSchedule.cosine(), [], None),
    "flow": (["--prediction_type", "flow_prediction"], NoiseSchedule.flow(), [], "sd3"),
    "flow 3": (
        ["--prediction_type", "flow_prediction", "--flow_shift", "3"],
        NoiseSchedule.flow(3),
        [],
        "sd3",
    ),
    "v of shift 3": (
        ["--prediction_type", "v_prediction", "--flow_shift", "3"],
        NoiseSchedule.flow(3),
        [],
        None,
    ),
}


def names(path):
    return [
        name
        for name in read_header(path).tensors
        if name.rpartition(".")[2] in ("v_pred", "ztsnr", "sigma_max")
    ]


@pytest.mark.parametrize("case", CASES)
def test_what_each_case_gets(case, tmp_path, capsys):
    flags, schedule, markers, says = CASES[case]
    path = model(tmp_path / "m.safetensors", metadata={"modelspec.title": "mine", "format": "pt"})
    before = data_hash(path)
    assert main(["stamp", str(path), *flags, "--check"]) == 0
    read = read_header(path)
    assert (
        read_record(read.metadata) == Sampling(schedule, flags[1])
        and read.metadata.get("modelspec.prediction_type") == says
    )
    assert read.metadata["modelspec.title"] == "mine" and set(names(path)) == set(markers)
    assert all(read.tensors[name].shape == (0,) and read.tensors[name].dtype == "F32" for name in markers)
    assert data_hash(path) == before and before in capsys.readouterr().out
    json.loads(read.metadata[RECORD_KEY], parse_constant=pytest.fail)  # strict
    ours = next(row for row in verdicts(path)[2] if row.ui == "ComfyUI with our node")
    assert ours.right and not ModelFile.read(path).contradictions(Sampling(schedule, flags[1]))
    again = path.read_bytes()
    assert (
        main(["stamp", str(path)]) == 0
        and "unchanged" in capsys.readouterr().out
        and path.read_bytes() == again
    )


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("checkpoint", {"v_pred", "ztsnr"}),  # never under the U-Net's prefix: kohya refuses such a file
        ("unet", {"v_pred", "ztsnr", UNET + "v_pred", UNET + "ztsnr"}),
        ("bare_unet", {"v_pred", "ztsnr"}),
        ("diffusers_unet", set()),
        ("lora", set()),
    ],
)
def test_where_markers_go(kind, expected, tmp_path):
    path = model(tmp_path / "m.safetensors", kind)
    made = stamp_file(path, Sampling(ZERO, "v_prediction"))
    assert (
        made.kind == kind
        and set(names(path)) == expected
        and read_record(read_header(path).metadata).schedule == ZERO
    )
    assert {name for name in read_header(path).tensors if name not in expected} == set(KINDS[kind])


def test_the_stock_libraries_read_it(tmp_path):
    from safetensors import safe_open

    path = model(tmp_path / "m.safetensors", data=bytes(range(100)))
    stamp_file(path, Sampling(ZERO, "v_prediction"))
    with safe_open(path, "pt") as file:
        assert file.get_tensor("v_pred").shape == (0,) and file.metadata()["format"] == "pt"
        assert file.get_tensor(UNET + "input_blocks.0.0.weight").flatten()[:50].numpy().tobytes() == bytes(
            range(100)
        )


@pytest.mark.parametrize(
    ("header", "flags", "sentence"),
    [
        ({"v_pred": [0]}, ["epsilon"], "its marker v_pred says v_prediction"),
        ({"v_pred": [0], "ztsnr": [0]}, ["v_prediction"], "its marker ztsnr says zero terminal SNR"),
        ({"edm_vpred.sigma_max": [1]}, ["v_prediction"], "its marker edm_vpred.sigma_max says an EDM model"),
        (
            {"modelspec.prediction_type": "epsilon"},
            ["v_prediction"],
            "its modelspec.prediction_type says epsilon",
        ),
        ({"modelspec.prediction_type": "v"}, ["flow_prediction"], "its modelspec.prediction_type says v"),
        (
            {"ss_zero_terminal_snr": "False"},
            ["v_prediction", "--zero_terminal_snr"],
            "its ss_zero_terminal_snr says False",
        ),
        (
            metadata(SDXL, "v_prediction"),
            ["epsilon"],
            "its record says v_prediction, sigma 0.02917 to 14.6146",
        ),
    ],
)
def test_a_contradiction_is_refused_unless_told(header, flags, sentence, tmp_path, capsys):
    extra = {name: shape for name, shape in header.items() if isinstance(shape, list)}
    said = {name: text for name, text in header.items() if isinstance(text, str)}
    path = write(tmp_path / "m.safetensors", {**KINDS["checkpoint"], **extra}, said or None)
    before, data = path.read_bytes(), data_hash(path)
    words = ["stamp", str(path), "--prediction_type", *flags]
    assert main(words) == 2 and path.read_bytes() == before
    error = capsys.readouterr().err
    assert sentence in error and "give --force" in error and error.count("\n") == 1
    assert main([*words, "--force"]) == 0 and data_hash(path) == data
    truth = ModelFile.read(path).record
    assert truth.prediction_type == flags[0] and not ModelFile.read(path).contradictions(truth)


def test_what_adds_to_the_file_is_no_contradiction(tmp_path):
    """OneTrainer writes v_pred and never ztsnr; a marker that would now mean a wrong table goes."""
    for sampling, left in (
        (Sampling(ZERO, "v_prediction"), {"v_pred", "ztsnr"}),
        (Sampling(NoiseSchedule.cosine(), "v_prediction"), set()),
    ):
        path = write(
            tmp_path / "m.safetensors",
            {**KINDS["checkpoint"], "v_pred": [0]},
            {"modelspec.prediction_type": "v"},
        )
        stamp_file(path, sampling)
        assert set(names(path)) == left


def test_a_marker_with_bytes_is_renamed(tmp_path):
    path = write(tmp_path / "m.safetensors", {"v_pred": [3], **KINDS["checkpoint"]}, data=b"abcdef")
    before = data_hash(path)
    stamp_file(path, Sampling(SDXL, "epsilon"), force=True)
    assert (
        data_hash(path) == before
        and "sdxl_fixes.removed.v_pred" in read_header(path).tensors
        and "v_pred" not in read_header(path).tensors
    )


def test_other_models_are_refused(tmp_path, capsys):
    sd1 = write(
        tmp_path / "sd1.safetensors",
        {UNET + "input_blocks.0.0.weight": [320, 4, 3, 3], "first_stage_model.x": [1]},
    )
    assert (
        main(["stamp", str(sd1), "--prediction_type", "v_prediction"]) == 2
        and "not of SDXL" in capsys.readouterr().err
    )
    assert main(["stamp", str(sd1), "--prediction_type", "v_prediction", "--force"]) == 0
    assert names(sd1) == [] and read_record(read_header(sd1).metadata) == Sampling(SDXL, "v_prediction")
    vae = write(tmp_path / "vae.safetensors", {"decoder.conv_in.weight": [1]})
    assert (
        main(["stamp", str(vae), "--prediction_type", "epsilon"]) == 2
        and "is a VAE without a U-Net" in capsys.readouterr().err
    )
    pickle = tmp_path / "m.ckpt"
    pickle.write_bytes(b"PK\x03\x04")
    assert main(["inspect", str(pickle)]) == 2 and "never opened" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "does not say how it was trained"),
        (["--zero_terminal_snr"], "tell also what the model predicts"),
        (
            ["--prediction_type", "epsilon", "--base", "cosine", "--flow_shift", "3"],
            "--flow_shift belongs to --base flow",
        ),
        (["--from", "nowhere", "--zero_terminal_snr"], "two sources"),
        (
            ["--prediction_type", "epsilon", "--terminal_sigma", "300", "--yaml"],
            "a YAML can tell A1111 only v-prediction",
        ),
        (["--prediction_type", "epsilon", "--terminal_sigma", "-1"], "--terminal_sigma -1"),
        (
            ["--prediction_type", "flow_prediction", "--flow_shift", "0"],
            "--flow_shift 0: shift must be a positive number",
        ),
        (["--from", "nowhere", "--terminal_sigma", "0"], "two sources"),
    ],
)
def test_wrong_input_is_one_sentence(words, sentence, tmp_path, capsys):
    path = model(tmp_path / "m.safetensors")
    assert main(["stamp", str(path), *words]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1 and list(tmp_path.iterdir()) == [path]


def test_sources(tmp_path, capsys):
    """A scheduler config, a record, a stamped file and a diffusers folder, instead of flags."""
    config, record, folder = tmp_path / "scheduler_config.json", tmp_path / "record.json", tmp_path / "folder"
    config.write_text(json.dumps({**SDXL.to_config("v_prediction"), "rescale_betas_zero_snr": True}))
    record.write_text(metadata(SDXL.with_terminal_sigma(300, "beta_end"), "epsilon")[RECORD_KEY])
    stamped = model(tmp_path / "s.safetensors")
    stamp_file(stamped, Sampling(NoiseSchedule.flow(3), "flow_prediction"))
    (folder / "scheduler").mkdir(parents=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps(SDXL.with_terminal_sigma(100, "beta_end").to_config("sample"))
    )
    expected = {
        config: Sampling(ZERO, "v_prediction"),
        record: Sampling(SDXL.with_terminal_sigma(300, "beta_end"), "epsilon"),
        stamped: Sampling(NoiseSchedule.flow(3), "flow_prediction"),
        folder: Sampling(SDXL.with_terminal_sigma(100, "beta_end"), "sample"),
    }
    for source, sampling in expected.items():
        path = model(tmp_path / "m.safetensors")
        assert (
            main(["stamp", str(path), "--from", str(source)]) == 0 and ModelFile.read(path).record == sampling
        )
    bare = tmp_path / "bare.json"
    bare.write_text(SDXL.to_json())
    path = model(tmp_path / "m.safetensors")
    assert (
        main(["stamp", str(path), "--from", str(bare)]) == 2
        and "tell also what the model predicts" in capsys.readouterr().err
    )
    assert main(["stamp", str(path), "--from", str(bare), "--prediction_type", "v_prediction"]) == 0
    assert main(["stamp", str(path), "--from", str(config), "--prediction_type", "epsilon"]) == 2


def test_dry_run_writes_nothing_and_output_elsewhere(tmp_path, capsys):
    path, other = model(tmp_path / "m.safetensors"), tmp_path / "other.safetensors"
    before = path.read_bytes()
    words = ["stamp", str(path), "--prediction_type", "v_prediction"]
    assert (
        main([*words, "--dry-run"]) == 0
        and "markers: v_pred" in capsys.readouterr().out
        and list(tmp_path.iterdir()) == [path]
    )
    assert (
        main([*words, "--output", str(other)]) == 0
        and path.read_bytes() == before
        and names(other) == ["v_pred"]
    )
    assert main([*words, "--output", str(other)]) == 2 and "exists already" in capsys.readouterr().err


def test_diffusers_folder_and_shards(tmp_path, capsys):
    folder = tmp_path / "model"
    for name in ("unet", "scheduler", "vae"):
        (folder / name).mkdir(parents=True)
    shapes = list(KINDS["diffusers_unet"].items())
    for i in (1, 2):
        write(
            folder / "unet" / f"diffusion_pytorch_model-0000{i}-of-00002.safetensors",
            dict(shapes[i - 1 : 1 + i]),
            {"format": "pt"},
        )
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")
    write(folder / "vae" / "diffusion_pytorch_model.safetensors", {"x": [1]})
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(
        json.dumps(
            {
                "_class_name": "DDIMScheduler",
                "clip_sample": False,
                **SDXL.to_config("epsilon"),
                "timestep_spacing": "leading",
            }
        )
    )
    assert main(["stamp", str(folder), "--prediction_type", "v_prediction", "--terminal_sigma", "300"]) == 0
    for file in (folder / "unet").glob("*.safetensors"):
        assert (
            read_record(read_header(file).metadata) == Sampling(SDXL.with_terminal_sigma(300), "v_prediction")
            and names(file) == []
        )
    written = json.loads(config.read_text())
    assert (written["_class_name"], written["clip_sample"], written["timestep_spacing"]) == (
        "DDIMScheduler",
        False,
        "trailing",
    )
    assert (
        NoiseSchedule.from_config(written) == SDXL.with_terminal_sigma(300)
        and written["prediction_type"] == "v_prediction"
    )
    assert read_header(folder / "vae" / "diffusion_pytorch_model.safetensors").metadata == {}
    rows = {row.ui: row for row in verdicts(folder)[2]}
    assert (
        rows["diffusers"].right
        and rows["InvokeAI"].right
        and rows["ComfyUI with our node"].right
        and rows["SD.Next"].sigma_max == pytest.approx(300)
    )
    before = config.read_bytes()
    assert main(["stamp", str(folder), "--prediction_type", "epsilon"]) == 2 and config.read_bytes() == before
    for file in (folder / "unet").glob("*.safetensors"):  # other files, the same scheduler
        write(file, dict(shapes[:1]), {"format": "pt"})
    assert main(["stamp", str(folder), "--prediction_type", "epsilon"]) == 2
    assert (
        "scheduler_config.json says v_prediction" in capsys.readouterr().err and config.read_bytes() == before
    )
    assert (
        main(["stamp", str(folder), "--prediction_type", "epsilon", "--force"]) == 0
        and config.read_bytes() != before
    )
    assert (
        main(["stamp", str(tmp_path), "--prediction_type", "epsilon"]) == 2
        and "neither a diffusers folder" in capsys.readouterr().err
    )


def test_the_config_beside_is_what_stock_diffusers_samples(tmp_path):
    """DDIM, Euler and UniPC of the installed diffusers, made from the file by its path."""
    diffusers = pytest.importorskip("diffusers")
    for case, (flags, schedule, _, _) in CASES.items():
        path = model(tmp_path / "m.safetensors")
        assert main(["stamp", str(path), *flags]) == 0
        config = tmp_path / "m.scheduler_config.json"
        made = getattr(diffusers, json.loads(config.read_text())["_class_name"]).from_pretrained(str(config))
        made.set_timesteps(10)
        sigmas = np.asarray(made.sigmas, dtype=np.float64)
        if "flow" in case:
            shift = 3 if "3" in case else 1
            u = np.linspace(1, 1 / 1000, 11)[:-1]
            np.testing.assert_allclose(sigmas[:10], shift * u / (1 + (shift - 1) * u), rtol=2e-3, atol=2e-3)
        else:
            expected = STAND_IN_SIGMA if np.isinf(schedule.terminal_sigma) else schedule.terminal_sigma
            assert sigmas[0] == pytest.approx(expected, rel=2e-3) and float(made.timesteps[0]) == 999
        config.unlink()


def test_yaml_is_a_config_that_says_v(tmp_path):
    path = model(tmp_path / "m.safetensors")
    assert main(["stamp", str(path), "--prediction_type", "v_prediction", "--yaml"]) == 0
    yaml = json.loads((tmp_path / "m.yaml").read_text())  # JSON is YAML
    target = yaml["model"]["params"]["denoiser_config"]["params"]["scaling_config"]["target"]
    assert target.rpartition(".")[2] == "VScaling"
    assert {row.ui: row for row in verdicts(path)[2]}["A1111 up to 1.10"].right
    (tmp_path / "m.yaml").write_text("model: mine")
    assert (
        main(["stamp", str(path), "--prediction_type", "v_prediction", "--yaml"]) == 2
        and (tmp_path / "m.yaml").read_text() == "model: mine"
    )


@pytest.mark.parametrize(
    "yaml",
    [
        "# not sgm.modules.diffusionmodules.denoiser_scaling.VScaling\nmodel: {params: {}}\n",
        "model:\n  params:\n    denoiser_config:\n      params:\n        scaling_config:\n"
        "          target: sgm.modules.diffusionmodules.denoiser_scaling.EpsScaling\n",
        "denoiser_scaling.VScaling",
        "denoiser_scaling.VScaling: [",
        "",
    ],
)
def test_a_yaml_says_v_only_where_a1111_reads_it(tmp_path, yaml):
    path = model(tmp_path / "m.safetensors")
    assert main(["stamp", str(path), "--prediction_type", "v_prediction"]) == 0
    scaling = "{scaling_config: {target: x.denoiser_scaling.VScaling}}"
    target = f"{{model: {{params: {{denoiser_config: {{params: {scaling}}}}}}}}}"
    for content, right in ((yaml, False), (target, True)):
        (tmp_path / "m.yaml").write_text(content)
        assert {row.ui: row for row in verdicts(path)[2]}["A1111 up to 1.10"].right == right


def test_a_yaml_that_is_not_utf8_is_named_and_replaced_only_by_force(tmp_path, capsys):
    path, yaml = model(tmp_path / "m.safetensors"), tmp_path / "m.yaml"
    yaml.write_bytes(b"caf\xe9")
    words = ["stamp", str(path), "--prediction_type", "v_prediction", "--yaml"]
    assert main(words) == 2 and f"{yaml} exists already and says something else" in capsys.readouterr().err
    assert main([*words, "--force"]) == 0 and "VScaling" in yaml.read_text()


def test_room_of_our_own_saves_is_used(tmp_path):
    path = model(tmp_path / "m.safetensors", metadata={ROOM_KEY: " " * 32768, "format": "pt"})
    size = path.stat().st_size
    stamp_file(path, Sampling(SDXL.with_terminal_sigma(300, "beta_end"), "epsilon"))
    assert path.stat().st_size == size and ROOM_KEY not in read_header(path).metadata


def test_inspect_speaks_text_json_and_markdown(tmp_path, capsys):
    path = model(tmp_path / "m.safetensors")
    assert main(["inspect", str(path)]) == 0 and "does not say how it was trained" in capsys.readouterr().out
    assert main(["inspect", str(path), "--markdown"]) == 2 and "stamp it first" in capsys.readouterr().err
    stamp_file(path, Sampling(SDXL.with_terminal_sigma(300, "beta_end"), "epsilon"))
    assert main(["inspect", str(path), "--all"]) == 0
    text = capsys.readouterr().out
    assert all(ui in text for ui in UIS) and "WRONG: install the node" in text
    assert main(["inspect", str(path), "--json"]) == 0
    content = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert content["terminal_sigma"] == pytest.approx(300) and [row["ui"] for row in content["uis"]] == list(
        UIS
    )
    assert main(["inspect", str(path), "--markdown"]) == 0
    card = capsys.readouterr().out
    assert "predicts **epsilon**" in card and "ends at **sigma 300**" in card
    assert "Load Checkpoint), ComfyUI (Load Diffusion Model), SwarmUI**: install the node" in card


def test_inspect_mends_what_a_crash_left(tmp_path, capsys):
    from sdxl_fixes.model_files import write as w

    path = model(tmp_path / "m.safetensors")
    before = path.read_bytes()
    w._write_journal(path, read_header(path), 0)
    path.write_bytes(before[:8] + b"{torn" + before[13:])
    assert (
        main(["inspect", str(path)]) == 0
        and "its old header was put back" in capsys.readouterr().out
        and path.read_bytes() == before
    )


def test_reading_costs_no_diffusers():
    code = (
        "import sys, sdxl_fixes.commands.stamp; assert not {'diffusers', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1] / "support")


def test_the_page_on_loading_is_up_to_date():
    from loading_page import page

    assert page() == (Path(__file__).resolve().parents[2] / "docs" / "loading.md").read_text(
        encoding="utf-8"
    ), "run python benchmarks/loading_page.py > docs/loading.md"


def test_a_stamp_that_no_word_of_modelspec_says_takes_the_old_word_out(tmp_path):
    """SwarmUI would build SDXL's own table of it."""
    file = tmp_path / "m.safetensors"
    model(file, metadata={"modelspec.prediction_type": "v", "modelspec.title": "kept"})
    stamp_file(file, Sampling(SDXL.with_terminal_sigma(300), "v_prediction"))
    found = read_header(file).metadata
    assert "modelspec.prediction_type" not in found and found["modelspec.title"] == "kept"


def test_swarmui_samples_an_unstamped_flow_file_at_its_own_shift(tmp_path):
    """Sigma Shift is 3 there if the user gives none: sigma = 3 t / (1 + 2 t), of t = n / 1000."""
    path = model(tmp_path / "m.safetensors", metadata={"modelspec.prediction_type": "sd3"})
    row = next(row for row in verdicts(path)[2] if row.ui == "SwarmUI")
    t = np.arange(1, 1000) / 1000
    s = row.sampling.schedule.levels(flow=True)[1][:999]
    assert row.sampling.prediction_type == "flow_prediction"
    assert s == pytest.approx(3 * t / (1 + 2 * t), abs=2e-3)


def test_diffusers_starts_zero_terminal_snr_at_its_own_stand_in(tmp_path):
    """The page says the first sigma that diffusers' own class has."""
    import diffusers

    (tmp_path / "unet").mkdir()
    model(tmp_path / "unet" / "diffusion_pytorch_model.safetensors", "diffusers_unet")
    law = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler = diffusers.EulerDiscreteScheduler(
        **law, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    scheduler.save_pretrained(tmp_path / "scheduler")
    row = next(row for row in verdicts(tmp_path)[2] if row.ui == "diffusers")
    assert row.sigma_max == pytest.approx(float(scheduler.sigmas.max()), rel=1e-3)
