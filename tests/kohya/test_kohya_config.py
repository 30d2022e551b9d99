"""kohya's --config_file: values that argparse never saw, and keys that nobody reads.

tests/kohya/real/test_real_config.py asks the real parser."""

import argparse
import math
import re
from dataclasses import fields
from pathlib import Path

import pytest

from sdxl_fixes.command_line import add_flags
from sdxl_fixes.errors import FlagError
from sdxl_fixes.flags import FLAGS, TrainingFlags
from sdxl_fixes.kohya import chunk_flags, flags, speed_flags
from sdxl_fixes.kohya import run as kohya_run
from sdxl_fixes.trainers import run as core

CONFIG = "my.toml"


def read(given, *words, config=CONFIG):
    """``given`` as the keys of a TOML file, and words of the command line, through a parser like kohya's and
    our patch."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config_file")
    for name in (
        "loss_type",
        "huber_schedule",
        "huber_c",
        "min_snr_gamma",
        "ip_noise_gamma",
        "zero_terminal_snr",
        "noise_offset",
    ):
        FLAGS[name].add_to(parser)
    parser.add_argument("--v_parameterization", action="store_true")
    parser.add_argument("--max_token_length", type=int, choices=[None, 150, 225])
    for name in ("seed", "max_timestep", "gradient_accumulation_steps"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--learning_rate", type=float)
    flags.add_arguments(lambda parser: None, parser)

    def upstream(args, parser):
        return parser.parse_args(words, namespace=argparse.Namespace(config_file=config, **given))

    return flags.read_config(upstream, argparse.Namespace(config_file=config), parser)


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        ("terminal_sigma", "300", 300.0),
        ("terminal_sigma", 300, 300),
        ("terminal_sigma", "inf", math.inf),
        ("terminal_sigma", math.inf, math.inf),
        ("terminal_sigma_start", "900", 900),
        ("huber_c", "0.1", 0.1),
        ("min_snr_gamma", "5", 5.0),
        ("ip_noise_gamma", "1e-1", 0.1),
        ("terminal_timestep_share", "0.3", 0.3),
        ("loss_type", "huber", "huber"),
        ("chunk_layout", "77n", "77n"),
        ("stratified_timesteps", True, True),
        ("zero_terminal_snr", False, False),
        ("zero_terminal_snr", 1, True),
        ("noise_offset", False, False),  # off, as upstream takes it
        ("max_token_length", "225", 225),
        (
            "max_token_length",
            75,
            75,
        ),  # kohya_ss writes it; upstream takes it from a file, not on the command line
        ("max_timestep", 900.0, 900),
        ("seed", "42", 42),
    ],
)
def test_what_the_command_line_would_read_is_read(name, value, kept):
    found = getattr(read({name: value}), name)
    assert found == kept and type(found) is type(kept)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        *(
            (name, value, "true or false, without quotes")
            for name in ("stratified_timesteps", "chunk_buckets")
            for value in ("false", 2)
        ),
        ("zero_terminal_snr", "true", "true or false, without quotes"),
        ("v_parameterization", "false", "true or false, without quotes"),
        ("min_snr_floor", "yes", "true or false, without quotes"),
        ("terminal_sigma", True, "a number"),
        ("terminal_sigma", "high", "a number"),
        ("huber_c", [0.1], "a number"),
        ("ip_noise_gamma", "", "a number"),
        ("terminal_sigma_start", 900.5, "a whole number"),
        ("max_timestep", math.inf, "a whole number"),
        ("seed", True, "a whole number"),
        ("max_token_length", "many", "a whole number"),
        ("loss_type", "hubber", "one of l2, l1, huber, smooth_l1"),
        ("chunk_layout", 77, "one of 75n+2, 77n"),
        ("fixes", ["all", "-noise"], "text in quotes"),
    ],
)
def test_the_rest_is_refused_in_one_sentence(name, value, expected):
    with pytest.raises(FlagError) as error:
        read({name: value})
    said = (
        f"--config_file my.toml: --{name}: expected {expected}, got {value!r}: correct it, or leave "
        "the flag out"
    )
    assert str(error.value) == said and "\n" not in said


@pytest.mark.parametrize("name", [*flags.NAMES, *flags.READ])
def test_no_flag_is_forgotten(name):
    """Every flag that the adapter declares or reads, if the trainer has it: a list is right for none."""
    parser = argparse.ArgumentParser()
    add_flags(parser, FLAGS)
    for theirs in flags.READ:
        parser.add_argument(f"--{theirs}")
    flags.add_arguments(lambda parser: None, parser)
    with pytest.raises(FlagError, match=f"--{name}: expected .*, got \\[1\\]"):
        flags.read_config(
            lambda args, parser: args, argparse.Namespace(config_file=CONFIG, **{name: [1]}), parser
        )


def test_every_argument_that_the_adapter_reads_is_checked():
    files = [*Path(flags.__file__).parent.glob("*.py"), Path(core.__file__)]
    reads = re.compile(r'(?:\bargs(?:\.|, ")|given\.get\(")([a-z_0-9]+)')
    found = {name for file in files for name in reads.findall(file.read_text(encoding="utf-8"))}
    assert {"v_parameterization", "seed", "max_token_length", "fixes"} <= found  # the search finds
    assert found - {*flags.NAMES, *flags.READ} == {
        *("config_file", "optimizer_args"),  # optimizer_args is a list
        "args",  # of a function, in the source of a loop
    }
    for fix in kohya_run.FIXES.values():
        # which prepare() says, from all the flags together, and start(), of what --speed names
        named = {f"speed_{part}" for part in speed_flags.PARTS}
        parts = {*fix.parts} - {"trains_flow", *named}
        assert {*fix.flags, *fix.needs, *fix.options, *parts} <= {*flags.NAMES, *flags.READ}


def test_the_command_line_overrides_a_wrong_value():
    assert read({"terminal_sigma": "high"}, "--terminal_sigma", "300").terminal_sigma == 300


def test_a_forks_own_loss_and_kind_of_value_stay_the_forks():
    parser = argparse.ArgumentParser()
    parser.add_argument("--loss_type", choices=["l2", "wavelet"])
    parser.add_argument("--huber_c", nargs="+", type=float)
    parser.add_argument("--seed", type=lambda text: text)
    given = argparse.Namespace(config_file=CONFIG, loss_type="wavelet", huber_c=[0.1], seed=[1])
    assert vars(flags.read_config(lambda args, parser: args, given, parser)) == vars(given)


def test_the_trainers_other_keys_are_as_upstream_leaves_them():
    given = {"lr_scheduler": 1, "noise_offset_type": "Original"}
    assert vars(read(given)).items() >= given.items()


def test_without_a_file_nothing_is_touched():
    given = argparse.Namespace(config_file=None, stratified_timesteps="false")
    assert vars(flags.read_config(lambda args, parser: args, given, argparse.ArgumentParser())) == {
        "config_file": None,
        "stratified_timesteps": "false",
    }


@pytest.mark.parametrize("ending", ["", ".toml"])  # upstream adds it
def test_a_byte_order_mark_is_refused_in_one_sentence(tmp_path, ending):
    file = tmp_path / "my.toml"
    file.write_text("zero_terminal_snr = true\n", encoding="utf-8-sig")
    given = argparse.Namespace(config_file=f"{tmp_path / 'my'}{ending}")
    with pytest.raises(
        FlagError, match=r"my.*begins with a byte order mark, .*: save it as UTF-8 without one"
    ):
        flags.read_config(pytest.fail, given, argparse.ArgumentParser())
    file.write_text("zero_terminal_snr = true\n", encoding="utf-8")
    assert read({"zero_terminal_snr": True}, config=given.config_file).zero_terminal_snr is True


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("zero_terminal_sr", "zero_terminal_snr"),
        ("--Terminal-Sigma", "terminal_sigma"),
        ("chunk_bucket", "chunk_buckets"),
        ("fixs", "fixes"),
        ("v_parametrization", "v_parameterization"),
        ("v-parameterisation", "v_parameterization"),
    ],
)
def test_a_misspelt_key_of_ours_is_named(key, meant, capsys, monkeypatch):
    read({key: True})
    said = (
        f"sdxl-fixes: WARNING: --config_file my.toml: the trainer has no flag {key!r} and ignores it: "
        f"did you mean {meant}?\n"
    )
    assert capsys.readouterr().err == said
    monkeypatch.setenv("RANK", "1")  # once for all processes
    read({key: True})
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "key",
    [
        "noise_offset_type",
        "noise_offset_range",
        "lr_schedule",
        "max_timesteps",
        "learning_rte",
        "resolution_x",
    ],
)
def test_other_keys_are_nobodys_business(key, capsys):
    read({key: 1, "zero_terminal_snr": True})
    assert capsys.readouterr().err == ""


def test_values_are_checked_without_the_trainers_parser_too():
    assert set(FLAGS) == {f.name for f in fields(TrainingFlags) if f.init}
    assert TrainingFlags.from_args(
        argparse.Namespace(terminal_sigma="300", min_snr_gamma=5)
    ) == TrainingFlags(terminal_sigma=300.0, min_snr_gamma=5)
    for name in FLAGS:
        with pytest.raises(FlagError, match=f"--{name}: expected .*, got \\[1\\]"):
            TrainingFlags.from_args(argparse.Namespace(**{name: [1]}))
    with pytest.raises(
        FlagError, match="--stratified_timesteps: expected true or false, without quotes, got 'false'"
    ):
        TrainingFlags.from_args(argparse.Namespace(stratified_timesteps="false"))
    options = chunk_flags.Options.from_args(argparse.Namespace(chunk_buckets=True, max_token_length="225"))
    assert options is not None and options.limit == 3
    with pytest.raises(FlagError, match="--chunk_buckets: expected true or false"):
        chunk_flags.Options.from_args(argparse.Namespace(chunk_buckets="false", max_token_length=225))
