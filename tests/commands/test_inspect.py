"""What inspect says: one paragraph, the rows that matter; and what it makes of a stranger's words."""

import io
import json
import shlex
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from hostile import JSON
from hypothesis import given, settings
from hypothesis import strategies as st
from loading import LORA, SAMPLINGS, SDXL, stamped_checkpoint, stamped_folder, stamped_lora
from models import KINDS, model, write

from sdxl_fixes.checkpoint import MODELSPEC, RECORD_KEY, Sampling, metadata
from sdxl_fixes.cli import main
from sdxl_fixes.model_files.model_file import ModelFile, read_sampling
from sdxl_fixes.uis.verdicts import UIS

SAYS = "modelspec.prediction_type"


def inspected(path, capsys, *words):
    assert main(["inspect", str(path), *words]) == 0
    return capsys.readouterr().out


def test_sdxls_own_is_one_paragraph(tmp_path, capsys):
    text = inspected(model(tmp_path / "m.safetensors"), capsys)
    assert text.count("\n") == 1 and "every UI takes it for SDXL's own" in text
    stamped = inspected(stamped_checkpoint(tmp_path / "s.safetensors", SAMPLINGS["eps 14.6"]), capsys)
    assert stamped.count("\n") == 1 and "Every UI that loads it gets that right by itself." in stamped


def test_a_lora_is_one_paragraph_and_not_a_table_of_one_sentence(tmp_path, capsys):
    text = inspected(stamped_lora(tmp_path / "l.safetensors", SAMPLINGS["v + ZTSNR"]), capsys)
    assert text.count("\n") == 1 and text.count("the checkpoint that it is used with decides") == 1
    assert "LoRA or other network of SDXL" in text and "node Schedule from file" in text
    card = inspected(tmp_path / "l.safetensors", capsys, "--markdown")
    assert "a checkpoint that is sampled the same way" in card and "|" not in card


@pytest.mark.parametrize("case", SAMPLINGS)
def test_a_row_for_each_that_is_wrong_and_all_with_all(case, tmp_path, capsys):
    path = stamped_checkpoint(tmp_path / "m.safetensors", SAMPLINGS[case])
    text, every = inspected(path, capsys), inspected(path, capsys, "--all")
    lines = every.splitlines()
    rows = [line for line in lines if any(line.startswith(f"{ui}  ") for ui in UIS)]
    wrong = [line for line in rows if "WRONG: " in line]
    assert len(rows) == len(UIS) and [line for line in text.splitlines() if "WRONG: " in line] == wrong
    assert (" right" in text.split("\n\n")[-1]) == (not wrong)


def test_another_model_is_one_sentence_on_what_it_is(tmp_path, capsys):
    name = "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"
    path = write(tmp_path / "m.safetensors", {name: [320, 768], "cond_stage_model.x": [1]})
    text = inspected(path, capsys)
    assert "of Stable Diffusion 1. " in text and "not known here" in text and text.count("\n") == 1
    assert "SDXL's own" not in text
    assert main(["stamp", str(path), "--prediction_type", "v", "--force"]) == 0
    assert "WRONG" not in inspected(path, capsys) and main(["inspect", str(path), "--markdown"]) == 2
    assert "only SDXL's models are known here" in capsys.readouterr().err


def test_a_card_of_flow_names_its_shift(tmp_path, capsys):
    card = inspected(stamped_checkpoint(tmp_path / "m.safetensors", SAMPLINGS["flow"]), capsys, "--markdown")
    assert "rectified flow, shift 1." in card and "inf" not in card and "with our" not in card


def test_what_a_name_makes_a_ui_believe_is_a_row(tmp_path, capsys):
    text = inspected(model(tmp_path / "my-flow.safetensors"), capsys)
    assert "every UI but SD.Next takes it" in text and "flow_prediction" in text.splitlines()[-1]


def test_the_markers_of_noobai_beside_epsilon_are_said_with_the_command_that_mends(tmp_path, capsys):
    path = write(tmp_path / "m.safetensors", {**KINDS["checkpoint"], "v_pred": [0]}, {SAYS: "epsilon"})
    text = inspected(path, capsys)
    assert "But its modelspec.prediction_type says epsilon: sdxl-fixes stamp" in text and "--force" in text
    assert main(["stamp", str(path), "--force"]) == 0
    assert "But " not in inspected(path, capsys)
    assert ModelFile.read(path).record == Sampling(SDXL, "v_prediction")


MERGED = {
    "kohya's merge": {"ss_network_module": "networks.lora", SAYS: "epsilon", "modelspec.merged_from": "a, b"},
    "kohya's extraction": {"ss_network_module": "networks.lora", "ss_network_dim": "4", SAYS: "epsilon"},
    "A1111's merger": {"sd_merge_recipe": "{}", "sd_merge_models": "{}"},
    "a base with v in its name": {"ss_steps": "9", "ss_sd_model_name": "noobaiXLVpred_10.safetensors"},
}


@pytest.mark.parametrize("case", MERGED)
def test_what_merging_lost_is_noticed(case, tmp_path, capsys):
    path = write(tmp_path / "l.safetensors", LORA, MERGED[case])
    text = inspected(path, capsys)
    assert "That may be lost: " in text and f"sdxl-fixes stamp {shlex.quote(str(path))}" in text
    trained = {"ss_network_module": "networks.lora", "ss_steps": "9", SAYS: "epsilon"}
    assert "may be lost" not in inspected(write(tmp_path / "l.safetensors", LORA, trained), capsys)
    known = write(tmp_path / "l.safetensors", LORA, {**MERGED[case], SAYS: "v"})
    assert "may be lost" not in inspected(known, capsys)


@pytest.mark.parametrize(("word", "name"), [("v", "v"), ("v-zsnr", "v + ZTSNR"), ("x0", None)])
def test_modelspecs_words_are_taken_for_a_prediction_type(word, name, tmp_path, capsys):
    path = model(tmp_path / "m.safetensors")
    assert main(["stamp", str(path), "--prediction_type", word]) == 0
    expected = SAMPLINGS[name] if name else Sampling(SDXL, "sample")
    assert ModelFile.read(path).record == expected
    assert metadata(expected.schedule, expected.prediction_type)[SAYS] == word
    assert MODELSPEC[word][0] == expected.prediction_type
    bare = write(tmp_path / "b.safetensors", KINDS["checkpoint"], {SAYS: word})
    assert read_sampling(bare) == expected


def test_a_missing_from_is_a_sentence(tmp_path, capsys):
    missing = tmp_path / "nowhere.json"
    for words in (
        ["schedule", "--from", str(missing)],
        ["stamp", str(model(tmp_path / "m.safetensors")), "--from", str(missing)],
    ):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert f"there is no {missing}: give a .safetensors file, a folder, or a .json" in error
    locked = tmp_path / "locked.json"
    locked.mkdir()
    assert main(["schedule", "--plot", str(locked / "a" / "b.png")]) == 2
    assert "Errno" not in capsys.readouterr().err


ESCAPE = "\x1b[31mred\x07\x9b2J\u202e"


def controls(text):
    return [c for c in text if not c.isprintable() and c not in "\n\u3000"]


@pytest.mark.parametrize("key", [SAYS, "modelspec.merged_from", "ss_zero_terminal_snr", "ss_sd_model_name"])
def test_no_control_character_of_a_file_reaches_the_terminal(key, tmp_path, capsys):
    path = write(tmp_path / f"m{ESCAPE}`|.safetensors", KINDS["checkpoint"], {key: ESCAPE})
    for words in ([], ["--all"], ["--json"]):
        assert not controls(inspected(path, capsys, *words))
    assert main(["stamp", str(path), "--prediction_type", "v"]) == 0
    assert not controls(capsys.readouterr().out)
    card = inspected(path, capsys, "--markdown")
    assert not controls(card) and "`|" not in card


def test_a_broken_records_words_are_escaped_too(tmp_path, capsys):
    for record in (
        '{"format": "' + ESCAPE.encode("unicode_escape").decode() + '"}',
        ESCAPE,
        '{"\\ud800": 1}',
    ):
        path = model(tmp_path / "m.safetensors", metadata={RECORD_KEY: record})
        assert main(["inspect", str(path)]) == 2
        error = capsys.readouterr().err
        assert not controls(error) and error.count("\n") == 1


WORDS = st.sampled_from(["v", "sd3", "True", "x" * 100_000, ESCAPE])
VALUES = st.text(st.characters(codec="utf-8"), max_size=40) | JSON.map(json.dumps) | WORDS
KEYS = st.sampled_from([RECORD_KEY, SAYS, "prediction_type", "modelspec.merged_from", "ss_zero_terminal_snr"])


@settings(max_examples=60)
@given(st.dictionaries(KEYS, VALUES, max_size=4), st.sampled_from(["checkpoint", "lora"]))
def test_any_metadata_is_one_sentence_or_a_short_text(entries, kind):
    out, error = io.StringIO(), io.StringIO()
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(out), redirect_stderr(error):
        path = model(Path(folder) / "m.safetensors", kind, metadata=entries)
        start, status = time.process_time(), main(["inspect", str(path), "--all"])
    said, problem = out.getvalue(), error.getvalue()
    assert time.process_time() - start < 5 and len(said) + len(problem) < 8000
    assert not controls(said + problem) and (status == 0) == (problem == "")
    assert status == 0 or problem.count("\n") == 1


def test_a_folder_is_called_one(tmp_path, capsys):
    text = inspected(stamped_folder(tmp_path / "f", SAMPLINGS["v + ZTSNR"]), capsys)
    assert "folder of a U-Net in diffusers' names of SDXL" in text
    assert "Right by themselves: SD.Next, InvokeAI, diffusers." in text


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"])
def test_flow_matching_configs_that_diffusers_saved_are_read(name, tmp_path, capsys):
    diffusers = pytest.importorskip("diffusers")
    getattr(diffusers, name)(shift=3.0).save_pretrained(tmp_path)
    config, path = tmp_path / "scheduler_config.json", model(tmp_path / "m.safetensors")
    assert main(["schedule", "--from", str(config), "--json"]) == 0
    assert main(["stamp", str(path), "--from", str(config)]) == 0
    truth = ModelFile.read(path).record
    t = getattr(diffusers, name)(shift=3.0)
    assert truth.prediction_type == "flow_prediction"
    assert truth.schedule.levels(flow=True)[1][499] == pytest.approx(float(t.sigmas.flip(0)[499]), abs=2e-3)
