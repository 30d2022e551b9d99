"""Flags stated once: what argparse, a TOML file and the reference page make of a field."""

import argparse
import inspect
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest

from sdxl_fixes import NoiseSchedule
from sdxl_fixes.cli import main, make_parser
from sdxl_fixes.command_line import (
    Flag,
    Parser,
    add_flags,
    declared,
    flag,
    flags_of,
    read_values,
    underscored,
)
from sdxl_fixes.diffusers.flags import FLAGS_HERE
from sdxl_fixes.errors import FlagError
from sdxl_fixes.flags import FLAGS, TrainingFlags
from sdxl_fixes.kohya.flags import OURS
from sdxl_fixes.trainers.stable_loss import StableLoss


@dataclass(frozen=True)
class Brush:
    width: float = flag(1.5, "in pixels")
    tip: str | None = flag(None, "its form", choices=("round", "flat"), group="form", unset="round")
    hairs: int | None = flag(None, "how many")
    wet: bool = flag(False, "whether it is")
    name: str = "not a flag"


BRUSH = flags_of(Brush)


def parsers():
    """One from the fields, and one that argparse's own calls make."""
    ours, plain = argparse.ArgumentParser(), argparse.ArgumentParser()
    add_flags(ours, BRUSH)
    plain.add_argument("--width", type=float, default=1.5)
    plain.add_argument("--tip", choices=("round", "flat"))
    plain.add_argument("--hairs", type=int)
    plain.add_argument("--wet", action="store_true")
    return ours, plain


@pytest.mark.parametrize(
    "words", ["", "--width 2", "--tip flat --wet", "--hairs 3", "--tip square", "--hairs 3.5", "--width x"]
)
def test_fields_make_the_parser_that_argparse_makes(words, capsys):
    answers = []
    for parser in parsers():
        try:
            answers.append(vars(parser.parse_args(words.split())))
        except SystemExit as stopped:
            answers.append((stopped.code, capsys.readouterr().err.splitlines()[-1]))
    assert answers[0] == answers[1]


def test_kinds_and_defaults_are_the_fields():
    assert BRUSH["tip"] == Flag("tip", str, None, "its form", ("round", "flat"), "form", "round")
    assert {name: (row.kind, row.default, row.taken) for name, row in BRUSH.items()} == {
        "width": (float, 1.5, "1.5"),
        "tip": (str, None, "round"),
        "hairs": (int, None, ""),
        "wet": (bool, False, ""),
    }
    assert "its form (default round)" in parsers()[0].format_help()


def test_a_parser_tells_what_it_has():
    """Of flags that somebody else added: the same kinds and choices as those of the fields."""
    ours, plain = parsers()
    for parser in (ours, plain):
        found = declared(parser, (*BRUSH, "unknown"))
        assert {name: (row.kind, row.choices) for name, row in found.items()} == {
            name: (row.kind, row.choices) for name, row in BRUSH.items()
        }


def test_values_of_a_file_are_read_as_words_of_the_command_line():
    given = argparse.Namespace(width="2", tip="flat", hairs=3.0, wet=1)
    assert read_values(given, BRUSH) == {"width": 2.0, "tip": "flat", "hairs": 3, "wet": True}
    assert read_values(argparse.Namespace(width=False, tip=None), BRUSH) == {}
    for name, value in (("tip", "square"), ("hairs", 3.5), ("wet", "true"), ("width", True)):
        with pytest.raises(FlagError, match=f"--{name}: expected "):
            read_values(argparse.Namespace(**{name: value}), BRUSH)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--in-place x", "--in_place x"),
        ("--in-place=a-b", "--in_place=a-b"),
        ("--in_place --other-one in-place -i-n", "--in_place --other-one in-place -i-n"),
        ("--in-place -- --in-place", "--in_place -- --in-place"),
    ],
)
def test_hyphens_are_taken_for_underscores_in_flags_that_are_known(words, expected):
    assert underscored(words.split(), {"--in_place"}) == expected.split()


def commands():
    chosen = next(a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return chosen.choices


@pytest.mark.parametrize("command", sorted(commands()))
def test_every_flag_of_every_command_is_taken_in_both_spellings_and_shown_in_one(command):
    parser = commands()[command]
    assert isinstance(parser, Parser)
    flags = [word for word in parser._option_string_actions if word.startswith("--")]
    assert not [word for word in flags if "-" in word[2:]]
    for word in flags:
        action = parser._option_string_actions[word]
        if action.nargs == 0 and word != "--help":
            places = [action for action in parser._actions if not action.option_strings]
            values = [str(next(iter(place.choices or ["x"]))) for place in places]
            hyphened = "--" + word[2:].replace("_", "-")
            assert getattr(make_parser().parse_args([command, hyphened, *values]), action.dest) is True


@pytest.mark.parametrize("word", ["--terminal_sig", "--zero", "--js", "--zero-terminal-sn"])
def test_the_beginning_of_a_flag_is_not_taken_for_it(word, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["schedule", word])
    assert stopped.value.code == 2 and f"unrecognized arguments: {word}" in capsys.readouterr().err


def test_both_spellings_do_the_same(capsys):
    answers = []
    for words in (["--terminal_sigma=300", "--json"], ["--terminal-sigma", "300", "--json"]):
        assert main(["schedule", *words]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] and '"sigma": 300.0' in answers[0]


def test_what_a_flag_that_is_not_given_comes_to_is_what_the_code_takes():
    sdxl = NoiseSchedule.sdxl()
    method = inspect.signature(NoiseSchedule.with_terminal_sigma).parameters["method"].default
    assert FLAGS["terminal_sigma_method"].unset == method
    start = FLAGS["terminal_sigma_start"].unset
    assert sdxl.with_terminal_sigma(300, "tail") == sdxl.with_terminal_sigma(300, "tail", start)
    assert inspect.signature(StableLoss).parameters["images"].default is inspect.Parameter.empty
    assert TrainingFlags() == TrainingFlags(**{name: row.default for name, row in FLAGS.items()})
    assert set(FLAGS) == {field.name for field in fields(TrainingFlags) if field.init}


def test_a_flag_means_the_same_in_both_trainers():
    shared = set(OURS) & set(FLAGS) | set(FLAGS_HERE) & set(FLAGS)
    assert len(shared) == len(FLAGS) - len({"noise_offset", "min_snr_gamma"})
    for table in (OURS, FLAGS_HERE):
        for name in shared & set(table) - {"prediction_type"}:
            assert table[name] is FLAGS[name]
        narrowed, stated = table["prediction_type"], FLAGS["prediction_type"]
        assert set(narrowed.choices) == set(stated.choices) - {"sample"}  # which neither can train on request
        assert replace(narrowed, choices=stated.choices, unset=stated.unset) == stated


def test_the_page_of_flags_is_up_to_date():
    from flags_page import page

    written = Path(__file__).resolve().parent.parent / "docs" / "flags.md"
    assert page() + "\n" == written.read_text(encoding="utf-8"), (
        "run python benchmarks/flags_page.py > docs/flags.md"
    )
