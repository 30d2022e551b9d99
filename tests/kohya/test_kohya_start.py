"""Starting a patched trainer: the doctor, and refusals, on the made-up sd-scripts (no trainer needed)."""

import subprocess
import sys

import pytest
from made_up_trainer import build, edit

from sdxl_fixes.cli import main
from sdxl_fixes.kohya import scripts
from sdxl_fixes.kohya.doctor import examine
from sdxl_fixes.kohya.flags import OURS
from sdxl_fixes.kohya.patches import PATCHES


@pytest.fixture(params=["0.11", "0.10"])
def checkout(tmp_path, request, monkeypatch):
    """A trainer laid out as either version has it, whose loops test_kohya_resume.py has in their place."""
    monkeypatch.setattr("sdxl_fixes.kohya.doctor.LOOPS", {})
    return build(tmp_path, request.param)


def home(checkout, module):
    """The file that has what v0.11 has in ``module``."""
    file = f"library/{module}.py"
    return file if (checkout / file).is_file() else "library/train_util.py"


NOT_TESTED = f"a version that was not tested; tested are {', '.join(scripts.TESTED.values())}"


def test_doctor_prints_the_table_and_says_that_all_fits(checkout, capsys):
    report, fits = examine(checkout / "sdxl_train.py")
    mine = [patch for patch in PATCHES if not patch.only or "sdxl_train.py" in patch.only]
    assert fits and NOT_TESTED in report and all(f"{patch.path}: {patch.purpose}" in report for patch in mine)
    assert main(["doctor", str(checkout / "sdxl_train.py")]) == 0 and "REFUSED" not in capsys.readouterr().out
    assert main(["doctor", str(checkout)]) == 1  # the made-up network trainer has no data set
    out = capsys.readouterr().out
    assert out.count("REFUSED") == 2 and "buckets    REFUSED" in out and "heldout    REFUSED" in out
    assert "x collator_class.__init__" in out
    (checkout / "sdxl_train_network.py").unlink()
    assert main(["doctor", str(checkout)]) == 0 and "REFUSED" not in capsys.readouterr().out


def test_doctor_names_what_does_not_fit(checkout):
    end = "reduction, huber_c=None"
    edit(checkout, home(checkout, "loss"), (f"{end})", f"{end}, eps=0, scale=1)"))
    report, fits = examine(checkout / "sdxl_train.py")
    refused = {line.split()[0] for line in report.splitlines() if "REFUSED" in line}
    assert not fits and refused == {"loss", "weighting", "timesteps", "keep"}  # whose work is done there
    assert "found (model_pred, target, loss_type, reduction, huber_c, eps, scale)" in report


def test_doctor_knows_a_version_that_was_tested_by_what_is_in_it(checkout, monkeypatch):
    monkeypatch.setattr(scripts, "TESTED", {scripts.digest(checkout): "v1.2.3"})
    assert "v1.2.3, tested" in examine(checkout)[0]
    for file in checkout.rglob("*.py"):  # as git gives it out on Windows
        file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    assert "v1.2.3, tested" in examine(checkout)[0]
    edit(checkout, home(checkout, "loss"), ("residual**2", "residual**2.0"))
    assert "a version that was not tested; tested are v1.2.3" in examine(checkout)[0]


def older(checkout):
    edit(checkout, home(checkout, "loss"), ("get_huber_threshold_if_needed", "get_timesteps_and_huber_c"))


def test_doctor_refuses_what_is_older(checkout, capsys):
    older(checkout)
    assert main(["doctor", str(checkout)]) == 1
    out = capsys.readouterr().out
    assert NOT_TESTED in out and "nothing can be patched: v0.10.0 or newer is needed" in out


def test_doctor_says_which_scripts_it_refuses_and_why(checkout, capsys):
    (checkout / "sdxl_train_leco.py").write_text("")
    assert main(["doctor", str(checkout / "sdxl_train_leco.py")]) == 1
    assert "sdxl_train_leco.py: refused, it noises no pictures" in capsys.readouterr().out
    assert main(["doctor", str(checkout / "train_network.py")]) == 1
    assert "train_network.py: not one of the scripts that the fixes are made for" in capsys.readouterr().out


def test_doctor_says_when_there_is_no_trainer(tmp_path, capsys):
    assert main(["doctor", str(tmp_path)]) == 2 and "is no sd-scripts" in capsys.readouterr().err


def launcher(*words, cwd):
    return subprocess.run(
        [sys.executable, "-m", "sdxl_fixes.kohya", *words],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=600,
    )


def test_launchers_help_lists_our_flags_names_kohyas_and_ends_well(tmp_path):
    process = launcher("--help", cwd=tmp_path)
    assert process.returncode == 0 and not process.stderr
    assert process.stdout.startswith("usage: python -m sdxl_fixes.kohya PATH/TO/sdxl_train.py")
    listed, _, served = process.stdout.partition("flags of the trainer's own that fixes serve: ")
    assert all(f"  --{name} " in listed or f"  --{name}\n" in listed for name in OURS)
    assert "--zero_terminal_snr" in served and "--min_snr_gamma" in served and "--fixes" not in served


def test_launcher_names_what_is_missing(checkout):
    assert "usage: python -m sdxl_fixes.kohya" in launcher(cwd=checkout).stderr
    assert "fine_tune.py is not one of the trainers" in launcher("fine_tune.py", cwd=checkout).stderr
    assert "there is no nowhere/sdxl_train.py" in launcher(
        "nowhere/sdxl_train.py", cwd=checkout
    ).stderr.replace("\\", "/")


def test_launcher_refuses_an_old_trainer_without_a_traceback(checkout):
    older(checkout)
    process = launcher("sdxl_train.py", cwd=checkout)
    assert process.returncode == 1 and process.stderr.startswith(
        "sdxl-fixes: sd-scripts v0.10.0 or newer is needed"
    )


def test_launcher_runs_the_script_with_its_own_arguments(checkout):
    (checkout / "sdxl_train.py").write_text("import sys; print('trained', sys.argv[1:])\n")
    process = launcher("sdxl_train.py", "--learning_rate", "1", cwd=checkout)
    assert process.stdout == "trained ['--learning_rate', '1']\n" and process.returncode == 0


@pytest.mark.parametrize(("value", "status"), [(True, 0), ("false", 2)])
def test_launcher_refuses_a_config_files_value_in_one_sentence_and_with_status_2(checkout, value, status):
    file, head = home(checkout, "args"), "def read_config_from_file(args, parser):\n"
    edit(checkout, file, (head, f"{head}    args.zero_terminal_snr = {value!r}\n"))
    module = file.removesuffix(".py").replace("/", ".")
    (checkout / "sdxl_train.py").write_text(
        f"import argparse, sys; import {module} as util; parser = argparse.ArgumentParser()\n"
        "parser.add_argument('--config_file')\n"
        "parser.add_argument('--zero_terminal_snr', action='store_true')\n"
        "print(util.read_config_from_file(parser.parse_args(), parser).zero_terminal_snr)\n"
    )
    process = launcher("sdxl_train.py", "--config_file", "my.toml", cwd=checkout)
    said = (
        "sdxl-fixes: --config_file my.toml: --zero_terminal_snr: expected true or false, without quotes, "
        "got 'false': correct it, "
    )
    said += "or leave the flag out\n"
    assert (process.returncode, process.stdout, process.stderr) == (
        (2, "", said) if status else (0, "True\n", "")
    )


def test_what_has_no_place_in_a_script_is_refused_if_it_was_asked_for_and_left_out_if_not(
    monkeypatch, capsys
):
    from argparse import Namespace

    from sdxl_fixes.errors import FlagError
    from sdxl_fixes.kohya.run import SESSION, start

    monkeypatch.setattr(SESSION, "script_name", lambda: "sdxl_train_control_net_lllite.py")
    run = start(Namespace(zero_terminal_snr=True, v_parameterization=True))
    assert "schedule" in run.on and "saving" in run.on and "previews" not in run.on
    assert "markers" not in capsys.readouterr().err  # they belong to full models
    with pytest.raises(
        FlagError, match=r"'validation'.*its U-Net is told the control image.*--fixes all,-validation"
    ):
        start(Namespace(stable_loss_steps=2))
    monkeypatch.setattr(SESSION, "script_name", lambda: "sd3_train.py")
    with pytest.raises(FlagError, match=r"sd3_train.py is not one of the scripts"):
        start(Namespace(min_snr_gamma=5.0))
    assert start(Namespace()).on == frozenset()
