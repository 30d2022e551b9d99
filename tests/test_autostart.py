"""A plain start of a trainer that is given flags of ours becomes the launcher's; nothing else changes.

Most of it runs in an environment that has the two installed files and a launcher which says how it was
started; no trainer is needed."""

import argparse
import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from installing import LIBRARIES, call, fresh_python, packages, pip

from sdxl_fixes.kohya import flags

SOURCE = Path(__file__).resolve().parent.parent / "integrations" / "autostart"
SPEC = importlib.util.spec_from_file_location("_sdxl_fixes_autostart", SOURCE / "_sdxl_fixes_autostart.py")
autostart = importlib.util.module_from_spec(SPEC)  # by its path: an older editable install does not know it
SPEC.loader.exec_module(autostart)
SCRIPTS = [
    f"sdxl_train{x}.py"
    for x in ("", "_network", "_textual_inversion", "_control_net", "_control_net_lllite", "_leco")
]
MODULE = f"{autostart.__name__}.py"
ENVIRON = {name: value for name, value in os.environ.items() if name not in ("RANK", "PYTHONPATH")}
CONFIG = 'output_name = "x"\nterminal_sigma = 300\n'


def said(places, names, script="sdxl_train.py"):
    return (
        f"sdxl-fixes: {places} flags of ours ({names}): {script} is started as python -m "
        "sdxl_fixes.kohya does\n"
    )


IN_FILE = said("my.toml uses", "terminal_sigma")


class Environment:
    def __init__(self, folder):
        self.python = fresh_python(folder)
        self.site = Path(*call(self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"))
        self.aside = folder / "aside"
        for name in (MODULE, autostart.PTH):
            shutil.copy(SOURCE / name, self.site)
        package = self.site / "sdxl_fixes" / "kohya"
        package.mkdir(parents=True)
        (package.parent / "__init__.py").touch()
        (package / "__main__.py").write_text("import sys; print('launched', sys.orig_argv[1:])\n")

    @contextlib.contextmanager
    def without(self, name):
        (self.site / name).rename(self.aside)
        try:
            yield
        finally:
            self.aside.rename(self.site / name)

    def start(self, *words, cwd, **environ):
        command = [str(self.python), *map(str, words)]
        return subprocess.run(
            command, capture_output=True, text=True, cwd=cwd, env={**ENVIRON, **environ}, timeout=600
        )


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return Environment(tmp_path_factory.mktemp("environment"))


@pytest.fixture
def checkout(tmp_path):
    """A folder that looks like sd-scripts, with a recipe in it."""
    folder = tmp_path / "sd-scripts"
    (folder / "library").mkdir(parents=True)
    (folder / "library" / "train_util.py").touch()
    for name in (*SCRIPTS, "train_network.py", "sdxl_train_mine.py"):
        (folder / name).write_text("import sys; print('plain', sys.argv)\n")
    (folder / "my.toml").write_text(CONFIG)
    return folder


@pytest.fixture
def plain(environment, checkout):
    """Fails unless the words start what they say, with not a byte more."""

    def check(*words, cwd=checkout, **environ):
        process = environment.start(*words, cwd=cwd, **environ)
        assert process.stdout.startswith("plain ") and (process.returncode, process.stderr) == (0, "")

    return check


@pytest.fixture
def launched(environment, checkout):
    """Fails unless the words, without ``options`` of the interpreter, are the launcher's, and the sentence is
    said."""

    def check(sentence, *words, options=(), cwd=checkout, **environ):
        process = environment.start(*options, *words, cwd=cwd, **environ)
        expected = [option for option in options if option != "--"] + [
            "-m",
            "sdxl_fixes.kohya",
            *map(str, words),
        ]
        assert (process.returncode, process.stdout, process.stderr) == (0, f"launched {expected}\n", sentence)

    return check


def test_flags_are_those_that_the_launcher_adds():
    parser = argparse.ArgumentParser(add_help=False)
    flags.add_arguments(lambda parser: None, parser)
    assert sorted(autostart.FLAGS) == sorted(action.dest for action in parser._actions)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_sdxl_trainer_with_a_config_file_of_ours_is_launched(launched, script):
    launched(
        said("my.toml uses", "terminal_sigma", script), script, "--config_file", "my.toml", "--seed", "1"
    )


@pytest.mark.parametrize(
    "words",
    [
        ("--config_file=my.toml",),
        ("--config_file", "my"),
        ("--config_file=my",),
        ("--config", "my.toml"),  # argparse takes it
        ("--config_file", "other.toml", "--config_file", "my.toml"),
    ],
)
def test_config_file_is_found_as_upstream_finds_it(launched, words):
    launched(IN_FILE, "sdxl_train.py", *words)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("chunk_buckets = true\nterminal_sigma = 300\n", "terminal_sigma, chunk_buckets"),
        ("[a]\nseed = 1\n[b]\nmin_snr_floor=true # ours\n", "min_snr_floor"),
        ('"chunk_layout" = "77n"\n', "chunk_layout"),
        ('fixes = ""\n', "fixes"),
        ("stable_loss_steps = 0\n", "stable_loss_steps"),
        ("\ufeff  terminal_sigma\t= 300\r\n", "terminal_sigma"),
        ("a = [\n  terminal_sigma = 300\n", "terminal_sigma"),  # broken: no parser reads it
        ("terminal_sigma =\n", "terminal_sigma"),
    ],
)
@pytest.mark.parametrize("reader", ["parser", "expression"])
def test_keys_of_ours_are_found_in_any_section(checkout, monkeypatch, text, names, reader):
    if reader == "expression":  # Python 3.10
        monkeypatch.setitem(sys.modules, "tomllib", None)
    (checkout / "my.toml").write_text(text, encoding="utf-8")
    assert autostart._keys(checkout / "my.toml").intersection(autostart.FLAGS) == set(names.split(", "))


@pytest.mark.parametrize(
    "text",
    [
        "chunk_buckets = false\n[a]\nstratified_timesteps =false # not now\n",
        "# terminal_sigma = 300\nmy_terminal_sigma = 300\nterminal_sigma_ = 1\n",
        'output_name = "fixes = 1"\n[fixes]\nseed = 1\n',
        "a = [\nchunk_buckets = false\n",
        "",
    ],
)
@pytest.mark.parametrize("reader", ["parser", "expression"])
def test_false_and_comments_and_other_names_are_no_use_of_ours(checkout, monkeypatch, text, reader):
    if reader == "expression":
        monkeypatch.setitem(sys.modules, "tomllib", None)
    (checkout / "my.toml").write_text(text)
    assert not autostart._keys(checkout / "my.toml").intersection(autostart.FLAGS)


def test_flags_of_the_command_line_count_too(launched, checkout):
    line = "the command line uses"
    launched(said(line, "fixes"), "sdxl_train.py", "--fixes", "all")
    launched(
        said(line, "terminal_sigma, chunk_buckets"),
        "sdxl_train.py",
        "--terminal_sigma=300",
        "--seed",
        "1",
        "--chunk_buckets",
    )
    launched(said(line, "terminal_sigma"), "sdxl_train.py", "--terminal-sigma", "300")
    both = said("the command line and my.toml use", "fixes, terminal_sigma")
    launched(both, "sdxl_train.py", "--config_file", "my", "--fixes", "all")


def test_a_trainer_without_flags_of_ours_is_left_alone(plain, checkout):
    plain("sdxl_train.py")
    plain("sdxl_train.py", "--learning_rate", "1", "--min_snr_gamma", "5", "--output_dir", "./fixes")
    plain("sdxl_train.py", "--dataset_config", "my.toml")
    plain("sdxl_train.py", "--config_file", "missing.toml")
    plain("sdxl_train.py", "--config_file")
    (checkout / "my.toml").write_text("chunk_buckets = false\n")
    plain("sdxl_train.py", "--config_file", "my.toml")


@pytest.mark.parametrize(
    "options",
    ["-u", "-X utf8", "-Xutf8", "-W ignore", "-uW ignore", "-O -B", "-X utf8 -W error -u", "-u --", "-I"],
)
def test_options_of_the_interpreter_are_kept(launched, options):
    launched(IN_FILE, "sdxl_train.py", "--config_file", "my.toml", options=options.split())


def test_options_that_cannot_be_told_are_left_out(monkeypatch):
    """Should something have rewritten the arguments, the launcher is started without them rather than with
    other words."""
    monkeypatch.setattr(sys, "orig_argv", ["python", "-u", "sdxl_train.py"])
    for argv, options in (
        (["sdxl_train.py"], ["-u"]),
        (["sdxl_train.py", "--more", "words", "than"], []),
        (["other.py"], []),
    ):
        monkeypatch.setattr(sys, "argv", argv)
        assert autostart._options() == options


def test_paths_are_the_programs_own(launched, checkout, tmp_path):
    (tmp_path / "run").mkdir()
    (checkout / "my.toml").rename(tmp_path / "run" / "my.toml")
    for script in (checkout / "sdxl_train.py", os.path.join("..", "sd-scripts", "sdxl_train.py")):
        launched(IN_FILE, script, "--config_file", "my.toml", "--output_name", "a b", cwd=tmp_path / "run")
    (tmp_path / "run" / "sdxl_train.py").symlink_to(checkout / "sdxl_train.py")
    launched(IN_FILE, "sdxl_train.py", "--config_file", "my.toml", cwd=tmp_path / "run")


def test_one_of_several_processes_says_it_and_all_are_launched(launched):
    launched(IN_FILE, "sdxl_train.py", "--config_file", "my.toml", options=["-u"], RANK="0")
    launched("", "sdxl_train.py", "--config_file", "my.toml", options=["-u"], RANK="1")


def test_a_program_of_that_name_that_is_not_kohyas_is_left_alone(plain, launched, checkout):
    words = ("sdxl_train.py", "--config_file", "my.toml", "--fixes", "all")
    util = checkout / "library" / "train_util.py"
    util.rename(checkout / "library" / "custom_train.py")
    plain(*words)
    (checkout / "library" / "custom_train.py").write_text(
        "def add_custom_train_arguments(parser): ...\n"
    )  # upstream moved its parts
    launched(said("the command line and my.toml use", "fixes, terminal_sigma"), *words)
    shutil.rmtree(checkout / "library")
    plain(*words)


def test_other_programs_are_left_alone(plain, checkout):
    words = ("--config_file", "my.toml", "--fixes", "all")
    for script in ("train_network.py", "sdxl_train_mine.py"):
        plain(script, *words)
    plain("train_network.py", "sdxl_train.py", *words)
    plain("-c", "print('plain c')", "sdxl_train.py", *words)
    (checkout / "sdxl_train.py").rename(checkout / "sdxl_train")
    plain("sdxl_train", *words)


def test_modules_are_left_alone_and_so_the_launcher_does_not_start_itself(plain, environment, checkout):
    words = ("sdxl_train.py", "--config_file", "my.toml", "--fixes", "all")
    plain("-m", "sdxl_train", *words)
    process = environment.start("-m", "sdxl_fixes.kohya", *words, cwd=checkout)
    assert process.stdout == f"launched {['-m', 'sdxl_fixes.kohya', *words]}\n" and process.stderr == ""


def test_other_programs_import_nothing_more(environment, tmp_path):
    (tmp_path / "other.py").write_text("import sys; print(sorted(sys.modules))\n")
    here = environment.start("other.py", cwd=tmp_path).stdout
    with environment.without(autostart.PTH):
        (environment.site / "idle.pth").write_text(
            "import sys\n"
        )  # reading one imports a codec in Python 3.13
        assert environment.start("other.py", cwd=tmp_path).stdout == here != ""
        (environment.site / "idle.pth").unlink()


def test_a_half_uninstalled_module_is_no_noise(environment, plain):
    with environment.without(MODULE):
        plain("sdxl_train.py", "--config_file", "my.toml")


@pytest.mark.parametrize("left", [False, True], ids=["all gone", "an empty folder left"])
def test_a_missing_launcher_ends_the_run_with_one_sentence(environment, checkout, plain, left):
    with environment.without("sdxl_fixes"):
        if left:
            (environment.site / "sdxl_fixes").mkdir()
        process = environment.start("sdxl_train.py", "--config_file", "my.toml", cwd=checkout)
        plain("sdxl_train.py", "--seed", "1")
        if left:
            (environment.site / "sdxl_fixes").rmdir()
    sentence = (
        "sdxl-fixes: my.toml uses flags of ours (terminal_sigma), but sdxl_fixes is not installed here: "
    )
    sentence += "install it again, or leave them out\n"
    assert (process.returncode, process.stdout, process.stderr) == (2, "", sentence)


def test_installed_says_whether_plain_starts_are_guarded(environment, tmp_path):
    ask = ("-c", "import _sdxl_fixes_autostart; print(_sdxl_fixes_autostart.installed())")
    assert environment.start(*ask, cwd=tmp_path).stdout == "True\n"
    with environment.without(autostart.PTH):
        assert environment.start(*ask, cwd=tmp_path).stdout == "False\n"


WINDOWS = """
import os, sys, _sdxl_fixes_autostart
os.name = "nt"  # there a process cannot become another program
_sdxl_fixes_autostart._become([sys.executable, "-c", sys.argv[1]])
"""


@pytest.mark.parametrize(
    ("program", "status"), [("print(7); raise SystemExit(5)", 5), ("import os; os.abort()", 1)]
)
def test_on_windows_the_process_ends_as_its_child(environment, tmp_path, program, status):
    process = environment.start("-c", WINDOWS, program, cwd=tmp_path)
    assert process.returncode == status and process.stdout == ("7\n" if status == 5 else "")


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
@pytest.mark.parametrize("early", [False, True], ids=["while it waits", "as the child starts"])
def test_on_windows_an_interrupt_is_the_childs_to_answer(environment, early):
    program = "print('up', flush=True); input(); raise SystemExit(5)"
    starting = "import signal, subprocess\nclass Early(subprocess.Popen):\n    def __init__(self, command):\n"
    starting += "        super().__init__(command)\n        signal.raise_signal(signal.SIGINT)\n"
    starting += "subprocess.Popen = Early\n"
    with subprocess.Popen(
        [str(environment.python), "-c", starting * early + WINDOWS, program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=ENVIRON,
    ) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        process.communicate(b"\n")
        assert process.returncode == 5


@pytest.mark.parametrize("editable", [False, True], ids=["wheel", "editable"])
def test_an_installation_is_whole_and_guards_plain_starts_and_uninstalling_it_leaves_nothing(
    built, checkout, tmp_path, editable
):
    """An editable one reads the source, also when it is started in the source folder."""
    python = fresh_python(tmp_path / "venv")
    site = Path(*call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"))
    (site / "zz.pth").write_text(LIBRARIES)  # appended to its path, and no .pth file there is run
    before = {path.name for path in site.iterdir()} | {"__pycache__"}
    pip(python, "install", "--no-deps", *(["-e", built[0]] if editable else [built[1]]))
    source = built[0]
    read = [source / "sdxl_fixes", *(source / "integrations" / name for name in ("kohya", "diffusers"))]
    held = [site / "sdxl_fixes", *(site / "sdxl_fixes" / name for name in ("kohya", "diffusers"))]
    for folder in (tmp_path, source) if editable else (tmp_path,):
        assert packages(python, folder) == (read if editable else held)
    assert (site / autostart.PTH).is_file() and (site / MODULE).is_file() != editable
    assert call(
        python, "-c", "import _sdxl_fixes_autostart; print(_sdxl_fixes_autostart.installed())", cwd=tmp_path
    ) == ["True"]

    def start(*words):
        return subprocess.run(
            [str(python), *words], capture_output=True, text=True, cwd=checkout, env=ENVIRON, timeout=600
        )

    process = start("-u", "sdxl_train.py", "--config_file", "my.toml")  # as accelerate launch starts it
    assert process.returncode == 1 and process.stdout == ""
    first, *rest = process.stderr.splitlines(keepends=True)
    assert (
        first == IN_FILE and "sdxl-fixes: sd-scripts v0.10.0 or newer is needed" in rest[-1]
    )  # the real launcher on the stand-in
    process = start("-u", "sdxl_train.py", "--seed", "1")
    assert process.stdout == "plain ['sdxl_train.py', '--seed', '1']\n" and process.stderr == ""

    pip(python, "uninstall", "-y", "sdxl-fixes")
    assert {path.name for path in site.iterdir()} | {"__pycache__"} == before
