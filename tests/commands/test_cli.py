"""The command itself, and sdxl-fixes schedule: numbers, files, and sentences."""

import json
import os
import pkgutil
import subprocess
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from hostile import CONFIGS, JSON, RECORDS, mutations
from hypothesis import given

import sdxl_fixes.commands
from sdxl_fixes import NoiseSchedule
from sdxl_fixes.cli import main
from sdxl_fixes.errors import FixError
from sdxl_fixes.version import __version__


def refuse(constant):
    raise AssertionError(f"{constant} is not strict JSON")


def test_text_has_both_schedules_side_by_side(capsys):
    assert main(["schedule", "--terminal_sigma", "300"]) == 0
    rows = {
        line.split("  ")[0].strip(): line.split() for line in capsys.readouterr().out.splitlines() if line
    }
    assert rows["sigma of the last timestep"][-2:] == ["14.615", "300"]
    assert rows["share of the image still visible at the last timestep"][-4:] == ["6.83", "%", "0.333", "%"]
    assert rows["999"][1:3] == ["14.615", "300"]


def test_json_is_strict_and_holds_the_record(capsys):
    assert main(["schedule", "--zero_terminal_snr", "--json"]) == 0
    content = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert content["this"]["terminal_sigma"] == "inf" and content["this"]["share_above_sdxl"] == 0.12
    assert NoiseSchedule.from_record(content["record"]) == NoiseSchedule.sdxl().zero_terminal_snr()


def test_starts_from_a_file(tmp_path, capsys):
    config, record = tmp_path / "scheduler_config.json", tmp_path / "record.json"
    config.write_text(
        json.dumps(
            {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "num_train_timesteps": 1000}
        )
    )
    record.write_text(NoiseSchedule.cosine().to_json())
    for file, sigma in ((config, 157.41), (record, 20291)):
        assert main(["schedule", "--from", str(file), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["this"]["terminal_sigma"] == pytest.approx(sigma, rel=1e-4)


def test_resolution_doubles_sigma(capsys):
    assert main(["schedule", "--width", "1024", "--height", "1024", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["this"]["terminal_sigma"] == pytest.approx(29.2293, rel=1e-5)


def test_a_shift_of_flow_is_that_of_the_paper(capsys):
    assert main(["schedule", "--flow_shift", "3", "--json"]) == 0
    this = json.loads(capsys.readouterr().out)["this"]
    # s = 3 r/(1 + 2 r), arXiv:2403.03206 eq. 23, so sigma = s/(1 - s) = 3 r/(1 - r) with r = 1/1000 ... 1
    assert this["first_sigma"] == pytest.approx(3 / 999) and this["middle_sigma"] == pytest.approx(3)
    assert this["terminal_sigma"] == "inf"


def test_plot_is_a_png_and_nothing_half_written_stays(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    file = tmp_path / "s.png"
    assert main(["schedule", "--plot", str(file)]) == 0
    assert file.read_bytes().startswith(b"\x89PNG") and [p.name for p in tmp_path.iterdir()] == ["s.png"]
    assert main(["schedule", "--plot", str(tmp_path)]) == 2  # a folder
    assert [p.name for p in tmp_path.iterdir()] == ["s.png"]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert (
        main(["schedule", "--plot", str(file)]) == 2
        and 'pip install "sdxl-fixes[plot]"' in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--width", "1024"], "--width and --height belong together"),
        (
            ["--width", "8", "--height", "8", "--zero_terminal_snr"],
            "leave --terminal_sigma and --zero_terminal_snr out",
        ),
        (["--from", "nowhere.json"], "nowhere.json"),
        (
            ["--base", "cosine", "--terminal_sigma", "300", "--terminal_sigma_method", "beta_end"],
            "use 'rescale', 'tail' or 'last'",
        ),
        (["--from", "x.json", "--base", "flow"], "give one of them"),
        (["--from", "x.json", "--flow_shift", "3"], "--from and --flow_shift are two schedules"),
        (["--base", "sdxl", "--flow_shift", "3"], "--flow_shift belongs to --base flow, not to --base sdxl"),
        (["--flow_shift", "-1"], "--flow_shift -1: shift must be a positive number"),
        (["--width", "0", "--height", "8"], "--width 0 --height 8: width, height and base must be positive"),
        (["--width", "9" * 400, "--height", "8"], "--height 8: "),
    ],
)
def test_wrong_input_is_one_sentence_and_status_2(words, sentence, capsys):
    assert main(["schedule", *words]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("sdxl-fixes schedule: ") and sentence in error and "\n" not in error


@pytest.mark.parametrize(
    "content",
    [
        "[1]",
        "{",
        "{}",
        '{"format": "other"}',
        '{"beta_schedule": "sigmoid"}',
        "[" * 100_000,
        '{"beta_schedule": "linear", "prediction_type": {}}',
        '{"beta_schedule": "linear", "prediction_type": ' + "[" * 900 + "]" * 900 + "}",
        '{"record": {"format": "sdxl_fixes.schedule", "version": 1}}',
    ],
    ids=lambda content: content[:60],
)
def test_a_file_that_describes_no_schedule_is_named(content, tmp_path, capsys):
    file = tmp_path / "odd.json"
    file.write_text(content)
    assert main(["schedule", "--from", str(file)]) == 2
    error = capsys.readouterr().err
    assert "odd.json" in error and error.count("\n") == 1 and len(error) < 600


def test_what_json_printed_is_read_back(tmp_path, capsys):
    file = tmp_path / "printed.json"
    assert main(["schedule", "--terminal_sigma", "300", "--json"]) == 0
    file.write_text(capsys.readouterr().out)
    assert (
        main(["schedule", "--from", str(file), "--json"]) == 0
        and capsys.readouterr().out.strip() == file.read_text().strip()
    )


@given(mutations([*RECORDS, *CONFIGS, {"record": RECORDS[0]}]) | JSON)
def test_any_json_is_a_schedule_or_a_sentence(content):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "x.json"
        file.write_text(json.dumps(content))
        out, error = StringIO(), StringIO()
        with redirect_stdout(out), redirect_stderr(error):
            status = main(["schedule", "--from", str(file), "--json"])
    if status == 0:
        json.loads(out.getvalue(), parse_constant=refuse)
    else:
        assert status == 2 and ("x.json: " in error.getvalue() or "x.json holds" in error.getvalue())
        assert error.getvalue().count("\n") == 1


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--version"], 0, f"sdxl-fixes {__version__}"),
        (["--help"], 0, "webui"),
        (["stamp", "--help"], 0, "--terminal_sigma_method"),
        (["--nonsense"], 2, "unrecognized arguments: --nonsense"),
        (["nonsense"], 2, "invalid choice: 'nonsense'"),
        (["stamp", "x", "--prediction_type", "vpred"], 2, "invalid choice: 'vpred'"),
        (["buckets", "x", "--rule", "theirs"], 2, "invalid choice: 'theirs'"),
        (["demo", "--steps", "0"], 2, "sdxl-fixes demo: --steps must be at least 1, got 0"),
        (["schedule", "--width", "8"], 2, "sdxl-fixes schedule: --width and --height belong together"),
    ],
)
def test_answers_without_importing_torch(words, status, said):
    code = (
        "import sys\nfrom sdxl_fixes.cli import main\ntry:\n    status = main(sys.argv[1:])\n"
        "except SystemExit as end:\n    status = end.code or 0\n"
        "print(*{'torch', 'diffusers', 'transformers'} & set(sys.modules), file=sys.stderr, end='|')\n"
        "sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == status and said in done.stdout + done.stderr
    assert done.stderr.endswith("|") and done.stderr[:-1].rpartition("\n")[2] == ""


def test_no_command_is_the_help_and_status_2(capsys):
    assert main([]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("usage: sdxl-fixes ") and "schedule" in error


def test_every_command_of_the_help_is_a_module_that_registers_itself(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    words = capsys.readouterr().out.split("{")[1].split("}")[0].split(",")
    both = {"comfyui": "uis", "webui": "uis"}
    modules = {module.name for module in pkgutil.iter_modules(sdxl_fixes.commands.__path__)}
    assert {both.get(word, word) for word in words} == modules


BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


@pytest.mark.parametrize("words", [["schedule"], ["--help"]], ids=" ".join)
def test_a_reader_that_leaves_is_no_error(words):
    """As of `sdxl-fixes ... | head`: the status is the one of a program that SIGPIPE ended."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "sdxl_fixes.cli", *words],
            stdout=closed,
            stderr=subprocess.PIPE,
            env=BUFFERED,
        )
    assert (done.returncode, done.stderr) == (128 + 13, b"")


def test_a_long_table_may_lose_its_reader_in_the_middle():
    """More than a pipe holds: print itself is what fails, inside the command."""
    code = (
        "import sys, sdxl_fixes.commands.schedule as command\nfrom sdxl_fixes.cli import main\n"
        "command.as_text = lambda schedule: 'a line of it\\n' * 100_000\nsys.exit(main(['schedule']))"
    )
    done = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=BUFFERED
    )
    assert done.stdout.readline() == b"a line of it\n"
    done.stdout.close()
    assert (done.stderr.read(), done.wait()) == (b"", 128 + 13)


def test_a_console_without_the_letters_prints_their_numbers(tmp_path):
    ui = tmp_path / "caf\u00e9-\u6a21\u578b"
    (ui / "comfy").mkdir(parents=True)
    (ui / "comfy" / "model_sampling.py").touch()
    words = [sys.executable, "-m", "sdxl_fixes.cli", "comfyui", "install", str(ui)]
    done = subprocess.run(words, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "cp1252"})
    assert done.returncode == 0 and done.stderr == b""
    assert b"caf\xe9-\\u6a21\\u578b" in done.stdout


def test_doctor_of_a_path_that_leads_nowhere_asks_for_either_trainer(capsys):
    assert main(["doctor", "train_text_to_image_sdxl.py"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("sdxl-fixes doctor: there is no train_text_to_image_sdxl.py: give")
    assert "sd-scripts" in said and "diffusers" in said and said.count("\n") == 1


def test_a_fix_that_cannot_work_is_a_sentence(monkeypatch, capsys):
    def refuse(args):
        raise FixError("the fix 'x' is out of reach")

    monkeypatch.setattr("sdxl_fixes.commands.schedule.run", refuse)
    assert main(["schedule"]) == 2
    assert capsys.readouterr().err == "sdxl-fixes schedule: the fix 'x' is out of reach\n"
