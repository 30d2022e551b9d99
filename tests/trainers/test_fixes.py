"""A fix as data: which flags ask for it, shape it, do nothing, and are taken away with it."""

from argparse import Namespace

import pytest

from sdxl_fixes.command_line import add_flags
from sdxl_fixes.errors import FlagError
from sdxl_fixes.flags import FLAGS
from sdxl_fixes.trainers.fixes import Fix, allowed, fixes_flag, given, switch_off, without_effect

FIXES = {
    "loss": Fix(
        {"loss_type": ("huber", "smooth_l1")},
        options=("huber_c", "huber_schedule"),
        parts={"masked_loss": "mask"},
    ),
    "noise": Fix({"random_strength": None}, needs=("ip_noise_gamma",)),
    "schedule": Fix({"zero_terminal_snr": None, "terminal_sigma": None}, options=("terminal_sigma_method",)),
    "saving": Fix(due="later", wanted=lambda args: args.worth),
}


@pytest.mark.parametrize(
    ("flag", "value", "is_given"),
    [
        *(("terminal_sigma", value, bool(value)) for value in (None, 0, 0.0, 300.0, float("inf"))),
        *(("zero_terminal_snr", value, value) for value in (False, True)),
        *(("loss_type", value, value != "l2") for value in ("l2", "huber")),
        *(("huber_c", value, value != 0.1) for value in (0.1, 0.2)),
        *(("not_one_of_ours", value, bool(value)) for value in ("", "x", 0, 1)),
    ],
)
def test_a_flag_is_given_if_it_is_neither_off_nor_its_default(flag, value, is_given):
    assert given(Namespace(**{flag: value}), flag) == is_given
    assert not given(Namespace(), flag)


@pytest.mark.parametrize(
    ("fix", "args", "asked"),
    [
        ("loss", dict(loss_type="huber"), True),
        ("loss", dict(loss_type="smooth_l1"), True),
        ("loss", dict(loss_type="l1"), False),  # upstream's own
        ("loss", dict(loss_type="l2", huber_c=0.3), False),
        ("noise", dict(random_strength=True), False),
        ("noise", dict(ip_noise_gamma=0.1), False),
        ("noise", dict(random_strength=True, ip_noise_gamma=0.1), True),
        ("schedule", dict(terminal_sigma_method="tail"), False),
        ("schedule", dict(terminal_sigma=300.0), True),
        ("schedule", dict(zero_terminal_snr=True), True),
        ("saving", dict(worth=True), True),
        ("saving", dict(worth=False), False),
    ],
)
def test_which_arguments_ask_for_a_fix(fix, args, asked):
    assert FIXES[fix].asked(Namespace(**args)) == asked


def test_parts_are_due_if_their_flag_is_given():
    assert FIXES["loss"].marks(Namespace(masked_loss=True)) == ["mask"]
    assert FIXES["loss"].marks(Namespace(masked_loss=False)) == [] == FIXES["loss"].marks(Namespace())


def test_a_fix_says_its_flags_for_people():
    assert FIXES["loss"].text == "--loss_type huber|smooth_l1"
    assert FIXES["schedule"].text == "--zero_terminal_snr, --terminal_sigma" and FIXES["saving"].text == ""


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (dict(huber_c=0.3), ["--huber_c has no effect without --loss_type huber|smooth_l1"]),
        (dict(huber_c=0.3, loss_type="huber"), []),
        (dict(huber_c=0.1), []),  # the default
        (dict(random_strength=True), ["--random_strength has no effect without --ip_noise_gamma"]),
        (dict(ip_noise_gamma=0.1), []),  # the trainer's own
        (
            dict(terminal_sigma_method="tail"),
            ["--terminal_sigma_method has no effect without --zero_terminal_snr, --terminal_sigma"],
        ),
        ({}, []),
    ],
)
def test_flags_that_do_nothing_are_named(args, said):
    assert without_effect(FIXES, Namespace(**{"worth": False, **args})) == said


def test_switching_off_takes_our_flags_and_leaves_the_trainers():
    theirs = dict(loss_type="huber", zero_terminal_snr=True, ip_noise_gamma=0.1)
    args = Namespace(huber_c=0.3, terminal_sigma=300.0, **theirs)
    ours = {name: FLAGS[name] for name in ("huber_c", "terminal_sigma", "terminal_sigma_method")}
    assert switch_off(FIXES, {"noise", "saving"}, ours, args) == ["huber_c", "terminal_sigma"]
    assert args == Namespace(huber_c=0.1, terminal_sigma=None, **theirs)


def test_what_is_switched_off_is_as_if_it_had_not_been_given():
    args = Namespace(zero_terminal_snr=True, loss_type="huber", huber_schedule="constant")
    gone = switch_off(FIXES, (), FLAGS, args)
    assert sorted(gone) == ["huber_schedule", "loss_type", "zero_terminal_snr"]
    assert args == Namespace(zero_terminal_snr=False, loss_type="l2", huber_schedule="snr")


def test_nothing_is_taken_from_fixes_that_may_act():
    args = Namespace(huber_c=0.3, zero_terminal_snr=True)
    assert switch_off(FIXES, FIXES, FLAGS, args) == []
    assert args == Namespace(huber_c=0.3, zero_terminal_snr=True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, set(FIXES)),
        ("", set(FIXES)),
        ("all", set(FIXES)),
        ("none", set()),
        ("loss, noise", {"loss", "noise"}),
        ("all,-loss", set(FIXES) - {"loss"}),
        ("loss,-loss", set()),
        ("-loss,all", set(FIXES)),
    ],
)
def test_fixes_are_allowed_by_name(text, expected):
    assert allowed(text, FIXES) == expected


@pytest.mark.parametrize("text", ["every", "all,-every", "loss;noise"])
def test_an_unknown_name_is_one_sentence(text):
    with pytest.raises(FlagError, match=r"unknown fix '.*': expected all, none, or some of loss, noise"):
        allowed(text, FIXES)


def test_the_flag_names_them():
    import argparse

    parser = argparse.ArgumentParser()
    add_flags(parser, {"fixes": fixes_flag(FIXES)})
    help = " ".join(parser.format_help().split())
    assert parser.parse_args([]).fixes is None and "loss, noise, schedule, saving; -name leaves" in help
