"""What the package says: on standard error, from the main process, by one logger, without random numbers."""

import importlib
import io
import logging
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from sdxl_fixes import log


@pytest.fixture
def root():
    """What the root logger's handlers are given: trainers put handlers of their own on it."""
    records, handler = [], logging.Handler(0)
    handler.emit = records.append
    logging.getLogger().addHandler(handler)
    yield records
    logging.getLogger().removeHandler(handler)


def test_lines_are_prefixed_and_warnings_marked(capsys):
    log.say("one\n  two")
    log.warn("three, 100 % of it")  # no format string
    said = capsys.readouterr()
    assert said.err == "sdxl-fixes: one\n  two\nsdxl-fixes: WARNING: three, 100 % of it\n" and said.out == ""


def test_who_stops_says_why_from_every_process(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as stopped:
        log.stop("--x: wrong", 2)
    assert stopped.value.code == 2 and capsys.readouterr().err == "sdxl-fixes: --x: wrong\n"


@pytest.mark.parametrize("rank", ["1", "7"])
def test_only_the_main_process_speaks(rank, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", rank)
    log.say("one")
    log.warn("two")
    assert capsys.readouterr().err == "" and (log.rank(), log.world_size()) == (int(rank), 8)
    monkeypatch.setenv("RANK", "0")
    log.warn("two")
    assert capsys.readouterr().err == "sdxl-fixes: WARNING: two\n"


def test_nothing_goes_to_the_root_logger(root, capsys):
    log.say("one")
    log.warn("two")
    assert root == [] and capsys.readouterr().err.count("sdxl-fixes: ") == 2
    logging.getLogger("another").warning("heard")
    assert [record.msg for record in root] == ["heard"]


def test_a_trainers_logging_set_up_changes_nothing(root, capsys):
    """As kohya's setup_logging and accelerate's examples do."""
    stream = io.StringIO()
    handler, level = logging.StreamHandler(stream), logging.getLogger().level
    try:
        logging.basicConfig(level=logging.ERROR, handlers=[handler], force=False)
        logging.getLogger().setLevel(logging.ERROR)
        log.say("one")
    finally:
        logging.getLogger().setLevel(level)
        logging.getLogger().removeHandler(handler)
    assert stream.getvalue() == "" and capsys.readouterr().err == "sdxl-fixes: one\n"


def test_importing_again_adds_no_second_line(capsys):
    importlib.reload(log)
    log.say("one")
    assert capsys.readouterr().err == "sdxl-fixes: one\n"
    assert [type(handler).__name__ for handler in log.logger.handlers].count("_Lines") == 1


def test_a_host_may_take_the_lines_elsewhere_or_silence_them(capsys):
    log.logger.setLevel(logging.ERROR)
    try:
        log.warn("two")
    finally:
        log.logger.setLevel(logging.INFO)
    assert capsys.readouterr().err == ""


def test_a_handler_and_a_level_that_the_program_gave_before_are_obeyed():
    code = (
        "import logging, sys\nlogger = logging.getLogger('sdxl_fixes')\n"
        "handler = logging.StreamHandler(sys.stdout)\n"
        "handler.setFormatter(logging.Formatter('%(name)s %(levelname)s %(message)s'))\n"
        "logger.addHandler(handler)\nlogger.setLevel(logging.WARNING)\n"
        "from sdxl_fixes.log import say, warn\nsay('one')\nwarn('two')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("sdxl_fixes WARNING two\n", "")


def test_using_the_core_sets_up_no_logging():
    code = "import logging, sdxl_fixes as s; s.Objective(s.NoiseSchedule.sdxl()); s.fix_scheduler"
    code += "; print(logging.getLogger('sdxl_fixes').handlers, logging.getLogger().handlers)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[] []\n"


def test_a_line_does_not_tear_a_bar():
    code = "from tqdm import tqdm; from sdxl_fixes.log import say\nfor n in tqdm([0, 1]): say(f'line {n}')\n"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = process.stderr.replace("\r", "\n").split("\n")
    assert [line for line in lines if "line" in line] == ["sdxl-fixes: line 0", "sdxl-fixes: line 1"]


def test_speaking_draws_no_random_number():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    log.say("one")
    log.warn("two")
    after = random.getstate(), np.random.get_state(), torch.get_rng_state()
    assert before[0] == after[0] and torch.equal(before[2], after[2])
    assert str(before[1]) == str(after[1]) and np.array_equal(before[1][1], after[1][1])
