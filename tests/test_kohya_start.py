"""Starting a patched trainer: the doctor, and refusals, against a stand-in for a checkout (no trainer needed)."""

import subprocess
import sys

import pytest

from sdxl_fixes.cli import main
from sdxl_fixes.kohya.doctor import examine
from sdxl_fixes.kohya.patches import PATCHES


@pytest.fixture
def checkout(tmp_path):
    """A folder with the functions that the patch table names, and nothing in them."""
    sources = {}
    for patch in PATCHES:
        module, _, path = patch.target.partition(":")
        sources.setdefault(module.rpartition(".")[2], {})[path] = patch.parameters
    (tmp_path / "library").mkdir()
    for module, functions in sources.items():
        text, owners = "", set()
        for path, parameters in sorted(functions.items()):
            owner, _, name = path.rpartition(".")
            text += f"class {owner}:\n" if owner and owner not in owners else ""
            text += f"{'    ' if owner else ''}def {name}({', '.join(parameters)}): pass\n"
            owners.add(owner)
        (tmp_path / "library" / f"{module}.py").write_text(text)
    (tmp_path / "sdxl_train.py").write_text("import sys; print('trained', sys.argv[1:])\n")
    return tmp_path


def test_doctor_prints_the_table_and_says_that_all_fits(checkout, capsys):
    report, fits = examine(checkout / "sdxl_train.py")
    assert fits and "v0.10.0 or newer" in report and all(patch.target in report for patch in PATCHES)
    assert main(["doctor", str(checkout)]) == 0 and "REFUSED" not in capsys.readouterr().out


def test_doctor_names_what_does_not_fit(checkout):
    util = checkout / "library" / "train_util.py"
    util.write_text(util.read_text().replace("reduction, huber_c)", "reduction, huber_c, eps, scale)") + "\n# fixed_timesteps")
    report, fits = examine(checkout)
    assert not fits and "67372a" in report and report.count("REFUSED") == 1
    assert "found (model_pred, target, loss_type, reduction, huber_c, eps, scale)" in report


def test_doctor_refuses_what_is_older(checkout, capsys):
    util = checkout / "library" / "train_util.py"
    util.write_text(util.read_text().replace("get_huber_threshold_if_needed", "get_timesteps_and_huber_c"))
    assert main(["doctor", str(checkout)]) == 1
    out = capsys.readouterr().out
    assert "v0.8.7 to v0.9.1" in out and "nothing can be patched: v0.10.0 or newer is needed" in out


def test_doctor_says_when_there_is_no_trainer(tmp_path, capsys):
    assert main(["doctor", str(tmp_path)]) == 2 and "is no sd-scripts" in capsys.readouterr().err


def launcher(*words, cwd):
    return subprocess.run([sys.executable, "-m", "sdxl_fixes.kohya", *words], capture_output=True, text=True, cwd=cwd, timeout=120)


def test_launcher_names_what_is_missing(checkout):
    assert "usage: python -m sdxl_fixes.kohya" in launcher(cwd=checkout).stderr
    assert "fine_tune.py is not one of the trainers" in launcher("fine_tune.py", cwd=checkout).stderr
    assert "there is no nowhere/sdxl_train.py" in launcher("nowhere/sdxl_train.py", cwd=checkout).stderr.replace("\\", "/")


def test_launcher_refuses_an_old_trainer_without_a_traceback(checkout):
    util = checkout / "library" / "train_util.py"
    util.write_text(util.read_text().replace("get_huber_threshold_if_needed", "get_timesteps_and_huber_c"))
    process = launcher("sdxl_train.py", cwd=checkout)
    assert process.returncode == 1 and process.stderr.startswith("sdxl-fixes: sd-scripts v0.10.0 or newer is needed")


def test_launcher_runs_the_script_with_its_own_arguments(checkout):
    process = launcher("sdxl_train.py", "--learning_rate", "1", cwd=checkout)
    assert process.stdout == "trained ['--learning_rate', '1']\n" and process.returncode == 0


@pytest.mark.parametrize(("value", "status"), [(True, 0), ("false", 2)])
def test_launcher_refuses_a_config_files_value_in_one_sentence_and_with_status_2(checkout, value, status):
    util, empty = checkout / "library" / "train_util.py", "def read_config_from_file(args, parser): pass"
    assert empty in util.read_text()
    reading = empty.replace("pass", f"args.zero_terminal_snr = {value!r}; return args")
    util.write_text(util.read_text().replace(empty, reading))
    (checkout / "sdxl_train.py").write_text(
        "import argparse, sys; from library import train_util; parser = argparse.ArgumentParser(); parser.add_argument('--config_file')\n"
        "parser.add_argument('--zero_terminal_snr', action='store_true')\n"
        "print(train_util.read_config_from_file(parser.parse_args(), parser).zero_terminal_snr)\n"
    )
    process = launcher("sdxl_train.py", "--config_file", "my.toml", cwd=checkout)
    said = "sdxl-fixes: --config_file my.toml: --zero_terminal_snr: expected true or false, without quotes, got 'false': correct it, "
    said += "or leave the flag out\n"
    assert (process.returncode, process.stdout, process.stderr) == ((2, "", said) if status else (0, "True\n", ""))
